"""Parts that a column or an earlier run says are taken as they are, and what cannot be a split is refused by name."""

import json

import numpy as np
import pytest

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.official_splits import official_split
from exactivations.datamodules.splits import PARTS
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.probe_stores import GROUPS, N, demo_like, write_rows

SAID = ["train" if group < 20 else "val" if group < 30 else "test" for group in range(GROUPS)]


def stored(path, said=SAID, **more):
    """A store with a column that says of each module in which part it is."""
    rows, columns = demo_like()
    of_sample = [said[int(module[1:])] for module in columns["module"]]
    name = "resid_post.1/mean"
    return write_rows(path, {name: rows[name]}, sample_index=range(5, 5 + N), **columns, part=of_sample, **more), of_sample


def data_of(store, **options):
    data = ActivationDataModule(store, "label", **{"group": "module", "split_column": "part"} | options)
    data.setup()
    return data


def refused(store, message, **options):
    with pytest.raises(InvalidInputError, match=message):
        data_of(store, **options)


def test_every_sample_is_where_the_column_says(tmp_path):
    store, said = stored(tmp_path / "run")
    data = data_of(store)
    for part, name in zip(PARTS, ("train", "val", "test"), strict=True):
        np.testing.assert_array_equal(data.numbers(part), np.flatnonzero(np.array(said) == name))
    assert data.split.shares == pytest.approx([said.count(name) / N for name in ("train", "val", "test")])
    assert data.how_split == "those of column 'part'"


@pytest.mark.parametrize("group", ["module", None])
@pytest.mark.parametrize("label", ["label", "kind", "value"])
def test_without_validation_it_is_drawn_from_train_alone_by_group(tmp_path, group, label):
    store, said = stored(tmp_path / "run", [name.replace("val", "train") for name in SAID])
    data = ActivationDataModule(store, label, group=group, split_column="part", shares=(0.6, 0.2, 0.2))
    data.setup()
    np.testing.assert_array_equal(data.numbers("test"), np.flatnonzero(np.array(said) == "test"))
    both = np.sort(np.concatenate([data.numbers("train"), data.numbers("validation")]))
    np.testing.assert_array_equal(both, np.flatnonzero(np.array(said) == "train"))
    assert len(data.numbers("validation")) == pytest.approx(len(both) / 4, abs=8)
    assert "validation, of which it has none, was drawn from its train part" in data.how_split
    if group:
        assert not set(data.groups_of("train")) & set(data.groups_of("validation"))
    again = ActivationDataModule(store, label, group=group, split_column="part", shares=(0.6, 0.2, 0.2))
    np.testing.assert_array_equal(again.split.validation, data.split.validation)


def test_what_is_no_split_is_refused_by_name(tmp_path):
    dealt = ["train", "test"] * (N // 2)
    store, _ = stored(tmp_path / "run", other=["train"] * N, typo=[*SAID, "tets"] * 5 + SAID[: N - 5 * (GROUPS + 1)], dealt=dealt)
    refused(store, r"'typo' says of sample 45 that it is in 'tets' \(5 of 240 samples", split_column="typo")
    refused(store, "'other' says of no sample that it is in test", split_column="other")
    refused(store, r"samples \d+ and \d+ are of one group of column 'module', and 'dealt' puts them into", split_column="dealt")
    refused(store, "no column 'absent'", split_column="absent")
    refused(store, "not both", split_file="x")
    _, columns = demo_like()
    numbers = np.array([name == "yes" for name in columns["label"]]).astype(np.int64)
    values = ["test" if number else "train" for number in numbers]
    with pytest.raises(
        InvalidInputError, match=r"class 'no' is absent from test, as 'part' has it \(\d+ samples of it are in train"
    ):
        official_split(values, numbers, column="part", sample_index=np.arange(N), classes=["no", "yes"])


def test_a_recorded_split_gives_the_same_parts_to_another_run(tmp_path):
    store, _ = stored(tmp_path / "run")
    first = data_of(store, split_column=None, seed=7)
    (tmp_path / "probes").mkdir()
    path = tmp_path / "probes" / "split.json"
    path.write_text(json.dumps(first.split.to_json(store.sample_index)))
    for where in (path, path.parent):
        second = data_of(store, split_column=None, split_file=where, seed=1)
        for part in PARTS:
            np.testing.assert_array_equal(second.numbers(part), first.numbers(part))
    rows, columns = demo_like()
    shorter = write_rows(tmp_path / "other", {"resid_post.1/mean": rows["resid_post.1/mean"]}, **columns)
    refused(shorter, r"split.json: sample \d+ of the recorded split is not there", split_column=None, split_file=path)
    path.write_text("[]")
    refused(store, "cannot be read as a split: it holds no object", split_column=None, split_file=path)
