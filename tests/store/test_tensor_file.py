"""A file that is written piece by piece is what safetensors itself would have written, and nothing before it is whole."""

import json
import os

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exactivations.store.tensor_file import DTYPES, METADATA_KEY, TensorFile, checksum, shapes_of

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8).filter(lambda name: name != "__metadata__")


def made(dtype, shape, seed):
    if dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    kinds=st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES)), st.integers(0, 9), st.integers(0, 5)), max_size=6),
)
def test_pieces_of_any_size_in_any_turn_give_the_file_that_safetensors_writes(tmp_path_factory, data, kinds):
    tensors = {name: made(dtype, (n, width), n) for name, (dtype, n, width) in kinds.items()}
    path, metadata = tmp_path_factory.mktemp("file") / "f", {"shard": 3, "text": '" \\ \u00e9'}
    file = TensorFile(path, shapes_of(tensors), metadata)
    left = {
        name: list(data.draw(st.sampled_from([values.split(2), values.split(5), (values,)]))) for name, values in tensors.items()
    }
    while left:
        name = data.draw(st.sampled_from(sorted(left)))
        file.append(name, left[name].pop(0))
        left = {name: pieces for name, pieces in left.items() if pieces}
    file.finish()
    described = json.dumps({**metadata, "checksum": checksum(tensors, metadata)}, sort_keys=True)
    theirs = safetensors.torch.save(tensors, {METADATA_KEY: described})
    if len({dtype.itemsize for dtype, _, _ in kinds.values()}) == len({dtype for dtype, _, _ in kinds.values()}):
        assert path.read_bytes() == theirs  # of several dtypes as wide, theirs has an order of its own
    found = safetensors.torch.load_file(path)
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        assert found[name].dtype == values.dtype and found[name].shape == values.shape
        assert found[name].view(torch.uint8).equal(values.view(torch.uint8)) if values.numel() else True


def test_rows_that_are_not_contiguous_are_written_as_they_read(tmp_path):
    values = torch.arange(24.0).view(4, 6)
    file = TensorFile(tmp_path / "f", {"x": (torch.float32, (6, 3))}, {})
    file.append("x", values.T[:, 1:])
    file.finish()
    assert safetensors.torch.load_file(tmp_path / "f")["x"].equal(values.T[:, 1:])


def test_the_system_may_write_less_than_it_was_given(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, content, position: pwrite(descriptor, content[:7], position))
    file = TensorFile(tmp_path / "f", {"x": (torch.int64, (5,))}, {"a": 1})
    file.append("x", torch.arange(5))
    file.finish()
    assert safetensors.torch.load_file(tmp_path / "f")["x"].tolist() == list(range(5))


def test_before_it_is_finished_nobody_can_read_it(tmp_path):
    file = TensorFile(tmp_path / "f", {"x": (torch.int64, (5,))}, {})
    file.append("x", torch.arange(5))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load_file(tmp_path / "f")
    file.close()
    file.close()


def test_what_was_not_planned_is_refused(tmp_path):
    file = TensorFile(tmp_path / "f", {"x": (torch.int64, (5,)), "y": (torch.bool, (2,))}, {})
    with pytest.raises(AssertionError, match=r"x: planned torch\.int64, got torch\.float32"):
        file.append("x", torch.ones(2))
    file.append("x", torch.arange(4))
    with pytest.raises(AssertionError, match="x: more rows than were planned"):
        file.append("x", torch.arange(2))
    with pytest.raises(AssertionError, match="rows are missing"):
        file.finish()
    file.close()


@pytest.mark.parametrize(
    ("shapes", "metadata", "message"),
    [
        ({"x": (torch.complex64, (2,))}, {}, r"x: torch\.complex64 is written nowhere here"),
        ({"__metadata__": (torch.bool, (2,))}, {}, "name of the metadata"),
        ({"x": (torch.bool, (2,))}, {"checksum": "0"}, "the checksum is made here"),
    ],
)
def test_what_cannot_be_written_is_refused_before_there_is_a_file(tmp_path, shapes, metadata, message):
    with pytest.raises(AssertionError, match=message):
        TensorFile(tmp_path / "f", shapes, metadata)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_takes_nothing_more_is_an_error_and_no_endless_loop(tmp_path, monkeypatch):
    file = TensorFile(tmp_path / "f", {"x": (torch.int64, (5,))}, {})
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="took no more bytes"):
        file.append("x", torch.arange(5))
    file.close()


def test_a_descriptor_is_closed_once_even_if_closing_fails(tmp_path, monkeypatch):
    file, close, closed = TensorFile(tmp_path / "f", {"x": (torch.int64, (0,))}, {}), os.close, []

    def close_and_fail(descriptor):
        closed.append(descriptor)
        close(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "close", close_and_fail)
    with pytest.raises(OSError, match="No space left"):
        file.finish()
    file.close()
    assert len(closed) == 1
