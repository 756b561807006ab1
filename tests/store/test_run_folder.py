"""A run folder takes its own run and no other, says why not, and can be started again after any interruption."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from exactivations.store import run_folder as run_folder_module
from exactivations.store.errors import CorruptShardError, IdentityError, InvalidInputError, StoreError
from exactivations.store.lock import RunLock
from exactivations.store.run_folder import ENVIRONMENT_FIELDS, RunFolder, fingerprint_of, first_difference
from exactivations.store.shard import write_shard
from tests.store.stores import IDENTITY, make_store, run_info, sample_table

LENGTHS = [3, 1, 2]
TABLE = sample_table([0, 1, 2], LENGTHS, [0, 1, 1], [0, 0, 1], label=["a", "b", "c"])


def prepare(path, identity=IDENTITY, table=TABLE, *, overwrite=False, allow=(), **changes):
    path.mkdir(exist_ok=True, parents=True)
    folder = RunFolder(path)
    info = run_info(2, LENGTHS, identity=dict(identity), **changes)
    folder.prepare(info, [table], overwrite=overwrite, allow_changed=frozenset(allow))
    return folder


def publish(folder, shard, fingerprint=None):
    metadata = {"shard": shard, "fingerprint": fingerprint or folder.read_info().fingerprint}
    write_shard(folder.shard_path(shard), {"sample_index": torch.tensor([shard])}, metadata)


def names(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def test_a_new_folder_holds_what_was_given_and_nothing_else(tmp_path):
    folder = prepare(tmp_path)
    assert names(tmp_path) == ["run.json", "samples.parquet", "shards"]
    assert folder.read_samples().equals(TABLE)
    assert folder.read_info() == run_info(2, LENGTHS)
    assert folder.published(folder.read_info()) == set()


def test_the_same_run_goes_on_and_changes_nothing(tmp_path):
    folder = prepare(tmp_path)
    publish(folder, 1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    prepare(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert folder.published(folder.read_info()) == {1}


def test_every_differing_field_is_named_with_both_values(tmp_path):
    prepare(tmp_path)
    with pytest.raises(IdentityError) as refusal:
        prepare(tmp_path, IDENTITY | {"model": "other", "dtype": "bfloat16", "new_field": 5})
    message = str(refusal.value)
    for line in ("  model: 'm' there, 'other' now", "  dtype: 'float32' there, 'bfloat16' now", "  new_field: None there, 5 now"):
        assert line in message.splitlines()
    assert "dataset:" not in message and "--allow-changed" not in message and "--overwrite" in message


def test_a_field_that_is_gone_is_named_too(tmp_path):
    prepare(tmp_path)
    with pytest.raises(IdentityError, match="model: 'm' there, None now"):
        prepare(tmp_path, {name: value for name, value in IDENTITY.items() if name != "model"})


def test_a_changed_environment_is_refused_unless_allowed_and_then_recorded(tmp_path):
    folder = prepare(tmp_path)
    publish(folder, 0)
    changed = IDENTITY | {"torch": "2.1", "cpu_threads": 4}
    with pytest.raises(IdentityError, match="--allow-changed cpu_threads torch"):
        prepare(tmp_path, changed)
    with pytest.raises(IdentityError, match=r"(?s)--allow-changed cpu_threads\).*cpu_threads: 1 there, 4 now"):
        prepare(tmp_path, changed, allow=["torch"])
    prepare(tmp_path, changed, allow=["torch", "cpu_threads"])
    info = folder.read_info()
    assert info.identity == IDENTITY and info.present_identity == changed
    assert info.changes == [
        {"fields": {"cpu_threads": [1, 4], "torch": ["2.0", "2.1"]}, "fingerprint": fingerprint_of(changed)},
    ]
    assert info.fingerprints == [fingerprint_of(IDENTITY), fingerprint_of(changed)]
    publish(folder, 1)
    assert folder.published(info) == {0, 1}  # made before and after
    prepare(tmp_path, changed)  # needs no further permission
    assert folder.read_info().changes == info.changes
    prepare(tmp_path, IDENTITY, allow=["torch", "cpu_threads"])  # and back
    assert folder.read_info().present_identity == IDENTITY and folder.published(folder.read_info()) == {0, 1}


@pytest.mark.parametrize("field", sorted(IDENTITY.keys() - ENVIRONMENT_FIELDS))
def test_fields_that_are_no_environment_cannot_be_allowed(tmp_path, field):
    prepare(tmp_path)
    with pytest.raises(IdentityError, match=f"{field}: .* there, 'other' now"):
        prepare(tmp_path, IDENTITY | {field: "other"}, allow=[field, *ENVIRONMENT_FIELDS])


def test_a_changed_dataset_names_the_first_sample_and_column(tmp_path):
    prepare(tmp_path)
    column = TABLE.column_names.index("label")
    changed = TABLE.set_column(column, "label", pa.array(["a", "x", "y"]))
    with pytest.raises(IdentityError, match="samples: the dataset changed: sample 1 has label 'b' there, 'x' now"):
        prepare(tmp_path, table=changed)


def test_differences_between_sample_tables():
    assert first_difference(TABLE, TABLE) is None
    assert first_difference(TABLE, TABLE.slice(0, 2)) == "3 samples there, 2 now"
    assert "columns are" in str(first_difference(TABLE, TABLE.drop_columns("label")))
    skipped = sample_table([0, 4, 9], LENGTHS, [0, 1, 1], [0, 0, 1], label=["a", "b", "c"])
    other = skipped.set_column(6, "label", pa.array(["a", "b", None]))
    assert "sample 9 has label 'c' there, None now" in str(first_difference(skipped, other))  # its own index, not its position


def test_missing_numbers_are_equal_to_themselves_and_to_nothing_else(tmp_path):
    table = TABLE.append_column("score", pa.array([1.0, float("nan"), 2.0])).append_column(
        "scores", pa.array([[float("nan")], [], [0.5]])
    )
    prepare(tmp_path, table=table)
    prepare(tmp_path, table=table)
    with pytest.raises(IdentityError, match=r"sample 1 has score nan there, 0\.0 now"):
        prepare(tmp_path, table=table.set_column(table.column_names.index("score"), "score", pa.array([1.0, 0.0, 2.0])))


@pytest.mark.parametrize(("version", "remedy"), [(4, "or a newer one"), (2, "or make it anew with --overwrite")])
def test_another_format_version_is_refused(tmp_path, version, remedy):
    folder = prepare(tmp_path)
    content = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(content | {"format_version": version}))
    for attempt in (folder.read_info, lambda: prepare(tmp_path)):
        with pytest.raises(StoreError, match=f"store format version {version}, this exactivations reads version 3: .*{remedy}$"):
            attempt()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format_version": 1}', "\udcff"])
def test_an_unreadable_run_file_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content, errors="surrogateescape")
    with pytest.raises(StoreError, match=r"run\.json"):
        RunFolder(tmp_path).read_info()


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "samples.parquet").write_text("not ours: there is no run.json")
    for overwrite in (False, True):
        with pytest.raises(StoreError, match=r"not empty and not a run folder \(it holds samples.parquet, thesis.tex\)"):
            prepare(tmp_path, overwrite=overwrite)
    assert names(tmp_path) == ["samples.parquet", "thesis.tex"]


def test_a_folder_that_is_no_run_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StoreError, match="is not a run folder"):
            RunFolder(path).read_info()


def test_overwriting_removes_the_files_of_the_run_and_no_other(tmp_path):
    folder = prepare(tmp_path)
    publish(folder, 0)
    for stranger in ("notes.txt", "shards/notes.txt"):
        (tmp_path / stranger).write_text("mine")
    (tmp_path / "shards" / ".00001.safetensors.12.tmp").write_text("left over")
    prepare(tmp_path, IDENTITY | {"model": "other"}, overwrite=True)
    assert names(tmp_path) == ["notes.txt", "run.json", "samples.parquet", "shards", "shards/notes.txt"]
    assert folder.read_info().identity["model"] == "other"


def test_what_a_killed_write_left_is_removed(tmp_path):
    prepare(tmp_path)
    leftovers = ["shards/.00001.safetensors.12.tmp", ".run.json.tmp", ".samples.parquet.tmp"]
    for name in leftovers:
        (tmp_path / name).write_text("half")
    prepare(tmp_path)
    assert names(tmp_path) == ["run.json", "samples.parquet", "shards"]


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_start_killed_at_any_step_can_be_made_again(tmp_path, monkeypatch, overwrite):
    """Every change of the folder is a step; the process ends before the first, the second, and so on."""
    steps = 0
    for kill_at in range(100):
        path = tmp_path / str(kill_at)
        if overwrite:
            publish(prepare(path, IDENTITY | {"model": "old"}), 0)
        steps, finished = 0, False

        def step(change):
            def counted(*args, **kwargs):
                nonlocal steps
                steps += 1
                if steps > kill_at:  # noqa: B023  # called within this round only
                    raise Killed
                return change(*args, **kwargs)

            return counted

        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "write_text", "mkdir"):
                patch.setattr(type(path), name, step(getattr(type(path), name)))
            patch.setattr(run_folder_module.pq.ParquetWriter, "write_table", step(run_folder_module.pq.ParquetWriter.write_table))
            try:
                folder = RunFolder(path)
                os.makedirs(path, exist_ok=True)
                folder.prepare(run_info(2, LENGTHS), [TABLE], overwrite=overwrite, allow_changed=frozenset())
                finished = True
            except Killed:
                pass
        prepare(path, overwrite=overwrite)
        assert names(path) == ["run.json", "samples.parquet", "shards"]
        assert folder.read_info().identity == IDENTITY and folder.read_samples().equals(TABLE)
        if finished:
            break
    assert finished and steps >= 5


def test_a_foreign_shard_is_refused(tmp_path):
    folder = prepare(tmp_path)
    publish(folder, 0, fingerprint="another")
    with pytest.raises(IdentityError, match=r"00000\.safetensors was made by another run: its fingerprint is another"):
        folder.published(folder.read_info())


def test_a_renamed_shard_is_refused(tmp_path):
    folder = prepare(tmp_path)
    publish(folder, 0)
    folder.shard_path(0).rename(folder.shard_path(1))
    with pytest.raises(CorruptShardError, match="holds shard 0, not 1: it was renamed"):
        folder.published(folder.read_info())


@pytest.mark.parametrize("name", ["00002", "000001", "1", "extra", "00001 (copy)", "\u0661"])
def test_a_file_that_is_no_shard_of_the_plan_is_refused(tmp_path, name):
    folder = prepare(tmp_path)
    publish(folder, 1)
    shutil.copy(folder.shard_path(1), folder.shard_folder / f"{name}.safetensors")
    with pytest.raises(IdentityError, match="does not belong to this run, which has shards 00000"):
        folder.published(folder.read_info())


def test_a_truncated_shard_is_refused(tmp_path):
    folder = prepare(tmp_path)
    publish(folder, 0)
    content = folder.shard_path(0).read_bytes()
    folder.shard_path(0).write_bytes(content[:-1])
    with pytest.raises(CorruptShardError, match="not a whole shard"):
        folder.published(folder.read_info())


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")  # the tests may run as root, whom permissions do not stop
    folder = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(StoreError, match="cannot write to the run folder"):
        folder.prepare(run_info(2, LENGTHS), [TABLE], overwrite=False, allow_changed=frozenset())
    with pytest.raises(StoreError, match="cannot write to the run folder"):
        RunLock(folder.path, "run").acquire(lambda: None)
    with pytest.raises(StoreError, match="not a run folder"):
        folder.read_info()


def test_a_full_disk_while_starting_is_told_and_a_later_start_goes_on(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder_module.pq.ParquetWriter, "write_table", full)
        with pytest.raises(StoreError, match="No space left on device"):
            prepare(tmp_path)
    assert prepare(tmp_path).read_samples().equals(TABLE)


def test_a_column_that_parquet_cannot_hold_is_named(tmp_path):
    with pytest.raises(InvalidInputError, match="struct type 'extra'"):
        prepare(tmp_path, table=TABLE.append_column("extra", pa.array([{}, {}, {}])))


def test_flipped_bits_in_the_sample_table_are_found(tmp_path):
    folder = make_store(tmp_path / "run", list(range(50)), [2] * 50, text=[f"text {i}" for i in range(50)])
    path = tmp_path / "run" / "samples.parquet"
    whole, table = path.read_bytes(), folder.read_samples()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")  # has no checksum of its own in Parquet
    found = 0
    positions = range(4, footer, 2)
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            assert folder.read_samples().equals(table), position  # a page's header has none either: it may change no value
        except StoreError:
            found += 1
    assert found > len(positions) / 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_another_rank_begins_while_the_folder_is_looked_at_is_no_stranger(tmp_path, monkeypatch, when):
    look = Path.iterdir

    def with_another_rank(path):
        if when == "before":
            (tmp_path / "run.json").write_text("{}")
        names = list(look(path))
        (tmp_path / "run.json").write_text("{}")
        return iter(names)

    monkeypatch.setattr(Path, "iterdir", with_another_rank)
    RunFolder(tmp_path).refuse_strangers()
