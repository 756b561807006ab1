"""What is exported is, read by each format's own library, bit for bit the means; what a format cannot hold is refused by name."""

import json
import subprocess
import sys
import zipfile

import gguf
import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file

from exactivations.store.control_vector import OTHER_HINTS, layers_of, model_hint
from exactivations.store.errors import InvalidInputError, StoreError
from exactivations.store.mean_activations import MeanActivations
from exactivations.store.means_export import FORMATS, WHATS, export_means
from exactivations.store.means_file import MeansFile, Part
from exactivations.store.moments import Moments
from exactivations.store.run_folder import fingerprint_of
from exactivations.store.shard_sums import GROUPS, MeanOptions
from exactivations.store.vectors import Vector

WIDTH = 7  # odd, so that GGUF has to pad between tensors
IDENTITY = {"model": "a" * 32, "model_class": "LlamaModel", "dtype": "bfloat16"}
ONE_EACH = [("resid_post.3", "mean"), ("resid_post.1", "mean"), ("resid_post.12", "exp_decay:0.067")]  # of blocks 3, 1 and 12
BAD = {
    "resid_post.0/mean": "of block 0",
    "attn_out.3/mean": "not of a block's output",
    "final_norm/mean": "not of a block's output",
    "module:model.layers.3.mlp/mean": "not of a block's output",
    "resid_post.1+2/mean": "an average over 2 hook points",
    "resid_post.3/long": "4 poolings side by side",
}


def made(*vectors, rows=None, identity=IDENTITY, groups=("bad", "good")):
    """Means of made-up rows, without a model. A vector is (hook point or points, pooling)."""
    vectors = [Vector((points,) if isinstance(points, str) else tuple(points), pooling) for points, pooling in vectors]
    n = 6
    numbers, sums = np.arange(n) % 2, {}
    for seed, vector in enumerate(vectors):
        values = np.random.default_rng(seed).normal(3, 1, (n, WIDTH * len(vector.poolings))) if rows is None else rows
        sums[vector.name] = Moments.of(values)
        sums[vector.name + GROUPS] = Moments.of(values, numbers, len(groups))
    file = MeansFile(
        identity=dict(identity),
        about={"model": "some/model", "revision": "main"},
        options=MeanOptions(tuple(vectors), "label"),
        groups=list(groups),
        parts=[Part("f", "c", n, 60, "some/dataset train", True, {})],
        sums=sums,
        token_hash=np.arange(n * 16, dtype=np.uint8).reshape(n, 16),
        sample_index=np.arange(n, dtype=np.int64),
        part=np.zeros(n, dtype=np.int32),
    )
    return MeanActivations(file)


def read(path):
    """Every vector in a file, by name, read by the format's own library and without pickle."""
    if path.suffix == ".safetensors":
        return {name: values.numpy() for name, values in load_file(path).items()}
    if path.suffix == ".gguf":
        return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    loaded = np.load(path, allow_pickle=False)
    return {name: loaded[name] for name in loaded.files} if path.suffix == ".npz" else {"": loaded}


def same(found, expected):
    """Equal to the bit, in float32 and one dimension."""
    expected = expected.numpy() if isinstance(expected, torch.Tensor) else expected
    return found.dtype == expected.dtype == np.float32 and found.ndim == 1 and found.tobytes() == expected.tobytes()


def refuses(message, error=InvalidInputError):
    return pytest.raises(error, match=message)


@pytest.fixture
def means():
    return made(*ONE_EACH)


@pytest.fixture
def everything():
    """With every kind of name that there is."""
    return made(
        *ONE_EACH, ("resid_post.0", "mean"), ("embed", "last"), ("module:model.layers.3.mlp", "max"), ("resid_post.3", "long"),
        (("resid_post.1", "resid_post.2"), "short"),
    )  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_all_vectors_are_read_back_under_their_names(everything, tmp_path, suffix):
    path = tmp_path / f"all{suffix}"
    assert export_means(everything, path) == everything.names
    found = read(path)
    assert found.keys() == set(everything.names)
    assert all(same(found[name], everything.mean(name)) for name in everything.names)
    assert found["resid_post.3/long"].shape == (4 * WIDTH,)


def test_some_vectors_in_the_order_in_which_they_were_named(everything, tmp_path):
    names = ["embed/last", "resid_post.12/exp_decay:0.067"]
    assert export_means(everything, tmp_path / "some.npz", names=names) == names
    assert list(read(tmp_path / "some.npz")) == names


def test_npy_holds_one_vector(means, tmp_path):
    assert export_means(means, str(tmp_path / "one.npy"), names=["resid_post.1/mean"]) == ["resid_post.1/mean"]
    assert same(read(tmp_path / "one.npy")[""], means.mean("resid_post.1/mean"))
    export_means(made(("embed", "last")), tmp_path / "only.npy")  # without a name, if there is but one
    with refuses(r"holds one vector, these are 3: resid_post.3/mean, resid_post.1/mean, .*--vector"):
        export_means(means, tmp_path / "three.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npy", "only.npy"]


def test_gguf_is_a_control_vector(means, tmp_path):
    path = tmp_path / "control.gguf"
    assert export_means(means, path) == means.names
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 3
    assert reader.get_field("controlvector.layer_count").types == [gguf.GGUFValueType.UINT32]
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.3", "direction.12"]
    assert all(
        tensor.tensor_type == gguf.GGMLQuantizationType.F32 and tensor.shape.tolist() == [WIDTH] for tensor in reader.tensors
    )
    found = read(path)
    for layer, name in {1: "resid_post.1/mean", 3: "resid_post.3/mean", 12: "resid_post.12/exp_decay:0.067"}.items():
        assert same(found[f"direction.{layer}"], means.mean(name))
    assert json.loads(reader.get_field("exactivations.about").contents())["what"] == "mean"


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("what", WHATS)
def test_every_quantity_in_every_format(tmp_path, what, suffix):
    means, name = made(("resid_post.1", "mean")), "resid_post.1/mean"
    groups = ("good", "bad") if "difference" in what else None
    export_means(means, tmp_path / f"x{suffix}", what=what, groups=groups)
    (found,) = read(tmp_path / f"x{suffix}").values()
    good, bad = (means.mean(name, group).double() for group in ("good", "bad"))
    if what == "mean":
        assert same(found, means.mean(name))
    elif what == "normalised":
        assert same(found, means.normalised(name))
    elif what == "difference":
        assert same(found, means.difference(name, "good", "bad"))
        assert np.allclose(found, (good - bad).numpy(), atol=1e-6)
    else:
        assert abs(np.linalg.norm(found.astype(np.float64)) - 1) < 1e-6
        assert np.allclose(found, ((good - bad) / (good - bad).norm()).numpy(), atol=1e-6)


def test_the_metadata_say_what_the_vectors_are(means, tmp_path):
    path = tmp_path / "x.safetensors"
    export_means(means, path, what="difference", groups=("good", "bad"))
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "exactivations"} and metadata["format"] == "pt"
    about = json.loads(metadata["exactivations"])
    assert about == {
        "what": "difference",
        "groups": [{"name": "good", "n_samples": 3}, {"name": "bad", "n_samples": 3}],
        "n_samples": 6,
        "datasets": ["some/dataset train"],
        "verified": True,
        "model": {"model": "some/model", "revision": "main"},
        "identity": IDENTITY,
        "fingerprint": fingerprint_of(IDENTITY),
    }


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_means_give_the_same_bytes(means, tmp_path, suffix):
    names = means.names[:1] if suffix == ".npy" else None
    contents = set()
    for number in range(8):  # safetensors alone would give two orders of its metadata
        path = tmp_path / f"{number}{suffix}"
        export_means(means, path, names=names)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_no_time_is_in_an_npz(means, tmp_path):
    export_means(means, tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_tensors_of_a_safetensors_file_stay_aligned(means, tmp_path):
    for length in range(8):
        export_means(made(*ONE_EACH, identity={"x": "x" * length}), tmp_path / "x.safetensors", overwrite=True)
        content = (tmp_path / "x.safetensors").read_bytes()
        assert int.from_bytes(content[:8], "little") % 8 == 0
        assert same(read(tmp_path / "x.safetensors")["resid_post.1/mean"], means.mean("resid_post.1/mean"))


@pytest.mark.parametrize(("name", "reason"), BAD.items())
def test_what_cannot_be_a_direction_is_refused_by_name(tmp_path, name, reason):
    place, _, pooling = name.rpartition("/")
    points = ("resid_post.1", "resid_post.2") if "+" in place else place
    means = made(("resid_post.5", "mean"), (points, pooling))
    assert means.names[1] == name
    with pytest.raises(InvalidInputError) as caught:
        export_means(means, tmp_path / "x.gguf")
    message = str(caught.value)
    assert message.startswith(f"{name} cannot be in a control vector") and reason in message and "--vector" in message
    assert not list(tmp_path.iterdir())
    assert export_means(means, tmp_path / "x.gguf", names=["resid_post.5/mean"]) == ["resid_post.5/mean"]
    assert export_means(means, tmp_path / "x.npz") == means.names


def test_two_directions_of_one_block_are_refused(tmp_path):
    means = made(("resid_post.3", "mean"), ("resid_post.4", "mean"), ("resid_post.3", "last"))
    with refuses("resid_post.3/mean and resid_post.3/last are both of block 3.*add up.*--vector"):
        export_means(means, tmp_path / "x.gguf")
    assert layers_of(map(means.vector, means.names[1:])) == {4: "resid_post.4/mean", 3: "resid_post.3/last"}


def test_hints_are_names_that_llama_cpp_knows():
    known = set(gguf.MODEL_ARCH_NAMES.values())
    classes = ["LlamaModel", "GPTNeoXModel", "Qwen2Model", "Qwen3MoeModel", "Gemma2Model", "GPT2Model", "MistralModel", "Phi3Model"]
    hints = [model_hint(name) for name in classes]
    assert hints == ["llama", "gptneox", "qwen2", "qwen3moe", "gemma2", "gpt2", "llama", "phi3"]
    assert {*hints, *OTHER_HINTS.values()} <= known
    assert model_hint("NobodyKnowsModel") == "nobodyknows"


def test_without_gguf_it_is_said_what_to_install(means, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with refuses(r"pip install '\.\[gguf\]' in the clone"):
        export_means(means, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_gguf_is_imported_only_when_it_is_needed():
    code = "import exactivations.store.means_export, sys; sys.exit('gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["x.pt", "x", "x.NPZ", "x.npz.gz"])
def test_other_formats_are_refused(means, tmp_path, name):
    with refuses(r"must end in \.safetensors, \.npz, \.npy, \.gguf"):
        export_means(means, tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": "median"}, "one of mean, normalised, difference, normalised-difference, got 'median'"),
        ({"what": "difference"}, "name two groups, got None"),
        ({"what": "normalised-difference", "groups": ("good", "good")}, "name two groups"),
        ({"groups": ("good", "bad")}, "leave them out"),
        ({"what": "difference", "groups": ("good", "evil")}, "no group 'evil'; there are 'bad', 'good'"),
        ({"names": ["embed/mean"]}, "there is no mean of embed/mean; there are means of resid_post.3/mean"),
        ({"names": []}, r"each once.*got \[\]"),
        ({"names": ["resid_post.3/mean"] * 2}, "each once"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(means, tmp_path, options, message):
    with refuses(message):
        export_means(means, tmp_path / "x.npz", **options)
    assert not list(tmp_path.iterdir())


def test_what_has_no_direction_or_no_value_is_refused(tmp_path):
    alike = made(("resid_post.1", "mean"), rows=np.ones((6, WIDTH)))
    groups = ("good", "bad")
    export_means(alike, tmp_path / "zero.npz", what="difference", groups=groups)
    with refuses("resid_post.1/mean has the same mean in good and bad"):
        export_means(alike, tmp_path / "x.npz", what="normalised-difference", groups=groups)
    with refuses("the mean of resid_post.1/mean is zero"):
        export_means(made(("resid_post.1", "mean"), rows=np.zeros((6, WIDTH))), tmp_path / "x.npz", what="normalised")
    with refuses("the mean of resid_post.1/mean is inf at dimension 0.*float32"):
        export_means(made(("resid_post.1", "mean"), rows=np.full((6, WIDTH), 1e300)), tmp_path / "x.npz")
    with refuses("group ugly of resid_post.1/mean has no samples"):
        empty = made(("resid_post.1", "mean"), groups=("bad", "good", "ugly"))
        export_means(empty, tmp_path / "x.npz", what="difference", groups=("good", "ugly"))
    assert [path.name for path in tmp_path.iterdir()] == ["zero.npz"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_that_is_there_is_replaced_only_when_asked(means, tmp_path, suffix):
    path, names = tmp_path / f"x{suffix}", ["resid_post.1/mean"]
    path.write_text("mine")
    with refuses("is there already: name another file, or pass overwrite=True"):
        export_means(means, path, names=names)
    assert path.read_text() == "mine"
    export_means(means, path, names=names, overwrite=True)
    (found,) = read(path).values()
    assert same(found, means.mean(names[0]))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_failure_leaves_what_was_there(means, tmp_path, suffix, monkeypatch):
    path, names = tmp_path / f"x{suffix}", ["resid_post.1/mean"]
    path.write_text("mine")

    def no_room(temporary, path):
        assert temporary.stat().st_size > 0
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("exactivations.store.shard.publish", no_room)
    with refuses(rf"cannot write .*x\{suffix}: .*No space left", StoreError):
        export_means(means, path, names=names, overwrite=True)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_folder_that_is_not_there_or_a_folder_in_the_way(means, tmp_path, suffix):
    with refuses("cannot write .*see that its folder is there", StoreError):
        export_means(means, tmp_path / "nowhere" / f"x{suffix}", names=["resid_post.1/mean"])
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    with refuses("name a file in it"):
        export_means(means, folder, names=["resid_post.1/mean"], overwrite=True)
    assert list(tmp_path.iterdir()) == [folder]
