"""What is in the folder after a run is what that run wrote, and what is none of its results."""

from types import SimpleNamespace

import pytest

from exactivations.callbacks.attribution_writer import AttributionWriter
from exactivations.store.attributions import read_attributions, write_attributions
from tests.scripts.attribution_results import attributions_of


def write(folder, names, *, separate):
    told = []
    writer = AttributionWriter({"sets.json": folder}, separate=separate, tell=lambda found, paths: told.extend(paths))
    writer.on_predict_batch_end(None, None, [attributions_of(names)], [SimpleNamespace(file="sets.json")], 0)
    return told


@pytest.mark.parametrize("separate", [True, False])
def test_results_of_sets_that_are_gone_are_removed_and_nothing_else(separate, tmp_path):
    other = write_attributions(tmp_path / "other", attributions_of(("seed_0",)))  # of another run: not called as its set
    write(tmp_path, ("seed_0", "seed_7", "seed_9"), separate=True)
    (tmp_path / "seed_9" / "picture.png").write_bytes(b"drawn")
    write(tmp_path, ("seed_0", "seed_1"), separate=not separate)
    told = write(tmp_path, ("seed_1", "seed_0"), separate=separate)
    assert {*tmp_path.rglob("*.safetensors")} == {other, *told} and len(told) == 1 + separate
    assert {*tmp_path.rglob("*.json")} == {path.with_suffix(".json") for path in (other, *told)}
    assert [name for path in told for name in read_attributions(path).set_names] == ["seed_1", "seed_0"]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"other", "seed_9", *(("seed_0", "seed_1") * separate)}
    assert [path.name for path in (tmp_path / "seed_9").iterdir()] == ["picture.png"]
