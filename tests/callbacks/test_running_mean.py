"""Means of whole runs: on any number of ranks, after any crash, in one step or two, with rows kept or not: the same bits."""

import json
import random
import time

import numpy as np
import pytest
import torch

from exactivations.callbacks import ActivationWriter, GroundTruthCheck, RunningMean
from exactivations.scripts.main import main
from exactivations.store import ActivationStore, MeanActivations, MeanOptions
from exactivations.store.errors import (
    IdentityError,
    IncompleteStoreError,
    InvalidInputError,
    StoreError,
    VerificationError,
)
from exactivations.store.run_folder import RunFolder
from exactivations.store.shard import open_shard
from exactivations.store.vectors import vectors_of
from tests.callbacks.conftest import TEXTS, content, stamps, wait_for_shards

POINTS = ["resid_post.0", "resid_post.1"]
OPTIONS = MeanOptions(vectors_of(POINTS, ["mean"]) + vectors_of(POINTS, ["mean"], average=True), n_positions=8)


@pytest.fixture(scope="session")
def means_arguments(model_path, texts_path):
    """Means of both layers by group, short and long, and by position."""
    return [
        "means", "run", str(model_path), "--dataset", str(texts_path), "--layers", "0", "1", "--mode", "both", "--pooling", "mean",
        "--positions", "20", "--group", "number", "--token-budget", "24", "--shard-tokens", "12", "--accelerator", "cpu",
        "--cpu-threads", "1",
    ]  # fmt: skip


def result(out):
    """Name -> bytes of everything that a run of means leaves and that does not tell the time."""
    return {**content(out), "means": (out / "means.safetensors").read_bytes()}


@pytest.fixture(scope="session")
def whole(start, means_arguments, tmp_path_factory):
    """A run that nothing disturbed, on one rank."""
    out = tmp_path_factory.mktemp("means") / "run"
    start(out, arguments=means_arguments).succeed()
    return out


def test_two_ranks_write_the_bytes_of_one(tmp_path, start, means_arguments, whole):
    start(tmp_path / "run", 2, arguments=means_arguments).succeed()
    assert result(tmp_path / "run") == result(whole)


GATE = """
import glob
computed = ActivationExtractor.predict_step
def gated(*args):
    while len(glob.glob({pattern!r})) >= {most}:
        time.sleep(0.01)
    return computed(*args)
ActivationExtractor.predict_step = gated
"""  # what is under way when so many shards are there is finished, and nothing more


def test_ten_kills_and_as_many_resumes_on_other_numbers_of_ranks_write_the_same_bytes(tmp_path, start, means_arguments, whole):
    dice, out, published = random.Random(1), tmp_path / "run", {}
    n_shards = RunFolder(whole).read_info().n_shards
    assert n_shards > 30  # a kill may let one more through on each rank
    for kill in range(10):
        gate = GATE.format(pattern=str(out / "shards" / "*.safetensors"), most=len(published) + 1)
        run = start(out, 1 + kill % 2, seconds_per_batch=0.05, before=gate, arguments=means_arguments)  # the writer keeps up
        wait_for_shards(out, len(published) + 1, run)
        time.sleep(dice.uniform(0, 0.05))
        run.kill()
        now = stamps(out)
        assert published.items() <= now.items()  # what was published is never computed again
        assert len(published) < len(now) < n_shards and not (out / "means.safetensors").exists()
        with pytest.raises(IncompleteStoreError, match=r"are missing\. Start the same command again"):
            MeanActivations.load(out)
        published = now
    start(out, 2, arguments=means_arguments).succeed()
    assert result(out) == result(whole)


def test_means_are_those_of_the_rows_that_a_run_with_rows_keeps(tmp_path, predict, parts):
    predict(tmp_path / "rows", before=[GroundTruthCheck()])
    store, (_, data) = ActivationStore(tmp_path / "rows"), parts()
    writer = RunningMean(tmp_path / "means", OPTIONS)
    predict(None, before=[GroundTruthCheck()], writer=writer, data=data)
    means = MeanActivations.load(tmp_path / "means")
    first, second = (store.pooled(point, "mean").double() for point in POINTS)
    for name, rows in [("resid_post.0/mean", first), ("resid_post.1/mean", second), ("resid_post.0+1/mean", (first + second) / 2)]:
        torch.testing.assert_close(means.mean(name), rows.mean(0).float(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(means.variance(name), rows.var(0).float(), rtol=1e-6, atol=1e-8)
        assert means.count(name) == len(TEXTS)
    total, count = torch.zeros(8, 16, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)
    for sample in store:  # positions counted from the end, one sample at a time
        for i, state in enumerate(sample.activations["resid_post.1/tokens"][sample.token_mask].flip(0)[:8]):
            total[i] += state.double()
            count[i] += 1
    found, counts = means.by_position("resid_post.1")
    assert torch.equal(counts, count)
    torch.testing.assert_close(found, (total / count[:, None]).float(), rtol=1e-6, atol=1e-8)


def test_rows_may_be_kept_beside_the_means_and_taken_later_the_means_are_the_same_bits(tmp_path, predict):
    predict(None, before=[GroundTruthCheck()], writer=RunningMean(tmp_path / "means", OPTIONS))
    predict(None, before=[GroundTruthCheck()], writer=ActivationWriter(tmp_path / "both", means=OPTIONS))
    predict(tmp_path / "rows", before=[GroundTruthCheck()])
    main(["means", "from-store", str(tmp_path / "rows"), "--positions", "8", "--pooling", "mean"])
    of = {name: MeanActivations.load(tmp_path / name).file.sums for name in ("means", "both", "rows")}
    for name in of["rows"]:
        for other in ("means", "both"):
            assert np.array_equal(of["rows"][name].total, of[other][name].total)
            assert np.array_equal(of["rows"][name].count, of[other][name].count)
    assert len(ActivationStore(tmp_path / "both")) == len(TEXTS)


def test_a_store_of_rows_that_lack_what_the_means_need_is_refused(tmp_path, predict):
    with pytest.raises(InvalidInputError, match=r"the means need resid_post.0/last, .*extracted are resid_post.0/tokens"):
        predict(None, writer=RunningMean(tmp_path / "run", MeanOptions(vectors_of(POINTS, ["last"]))))
    predict(tmp_path / "rows")
    with pytest.raises(InvalidInputError, match=r"means need resid_post\.0/max"):
        main_raises(["means", "from-store", str(tmp_path / "rows"), "--pooling", "max"])


def main_raises(arguments):
    """Runs a command without the message that ends it."""
    from exactivations.scripts import main as program

    parsed = program.command_line_parser().parse_args(program.to_parser_spelling(arguments))
    program.MEANS[parsed.means.subcommand](**{k: v for k, v in parsed.means[parsed.means.subcommand].items() if k != "config"})


def test_only_witnesses_rows_are_kept_and_the_folder_says_what_it_is(tmp_path, predict):
    predict(None, before=[GroundTruthCheck()], writer=RunningMean(tmp_path / "run", OPTIONS))
    with pytest.raises(StoreError, match=r"keeps means, and not the rows of its samples: read it with MeanActivations.load"):
        ActivationStore(tmp_path / "run")
    store = ActivationStore(tmp_path / "run", allow_witnesses=True)
    assert 16 <= len(store) < len(TEXTS)
    absent = next(i for i in range(len(TEXTS)) if i not in store.sample_index)
    with pytest.raises(IndexError, match=rf"the rows of sample {absent} were not kept: it went into the means only"):
        store[absent]


def test_a_witness_that_is_not_what_its_text_gives_fails_the_run_and_no_means_are_written(tmp_path, predict, parts):
    class Mixed(type(parts()[0])):
        def predict_step(self, step, batch_idx=0):
            out = super().predict_step(step, batch_idx)
            for values in out.activations.values():
                values[:] = values.flip(0)
            return out

    extractor = Mixed(*(lambda e: (e.model_name, e.hook_point_names, e.poolings))(parts()[0]), cpu_threads=1)
    with pytest.raises(VerificationError, match="is not what the sample gives alone"):
        predict(None, before=[GroundTruthCheck()], writer=RunningMean(tmp_path / "run", OPTIONS), extractor=extractor)
    with pytest.raises(StoreError):
        MeanActivations.load(tmp_path / "run")


def test_means_of_an_unverified_run_are_refused_until_it_is_verified(tmp_path, start, means_arguments, model_path, capsys, whole):
    out = tmp_path / "run"
    start(out, 1, "--verify-samples", "0", arguments=means_arguments).succeed()
    with pytest.raises(VerificationError, match=r"of the 90 samples of .*texts.jsonl none was computed again alone"):
        MeanActivations.load(out)
    assert MeanActivations.load(out, allow_unverified=True).n_samples == 90
    threads = torch.get_num_threads()
    main(["verify", str(out)])
    torch.set_num_threads(threads)
    assert result(out) == result(whole)


def test_a_run_that_is_overwritten_leaves_no_old_result(tmp_path, predict):
    predict(None, before=[GroundTruthCheck()], writer=RunningMean(tmp_path / "run", OPTIONS))
    other = MeanOptions(vectors_of(POINTS, ["mean"]))
    with pytest.raises(IdentityError, match=r"means: .* there, .* now"):
        predict(None, writer=RunningMean(tmp_path / "run", other))
    writer = RunningMean(tmp_path / "run", other, overwrite=True)
    writer._fold = lambda trainer: None  # as if it had ended just before
    predict(None, before=[GroundTruthCheck()], writer=writer)
    with pytest.raises(StoreError, match="not folded yet"):
        MeanActivations.load(tmp_path / "run")


def test_adding_what_is_the_next_shard_gives_the_bits_of_one_run(tmp_path, start, means_arguments, texts_path):
    """The samples of shard 0, then those of shard 1, against both: the same shards, so the same sums to the last bit."""
    rows = [json.loads(line) for line in texts_path.read_text().splitlines()]
    options = ["--shard-tokens", "450", "--token-budget", "4000"]  # a batch per length, so that a part's batches are the whole's
    texts = {}
    start(tmp_path / "all", 1, *options, arguments=change(means_arguments, write(tmp_path, "all", rows))).succeed()
    samples = RunFolder(tmp_path / "all").read_samples(["shard"]).column("shard").to_numpy()
    assert set(samples.tolist()) == {0, 1}
    for shard in (0, 1):
        texts[shard] = [row for row, where in zip(rows, samples, strict=True) if where == shard]
        write(tmp_path, str(shard), texts[shard])
    start(tmp_path / "run", 1, *options, arguments=change(means_arguments, tmp_path / "0.jsonl")).succeed()
    add = [
        "means", "add", str(tmp_path / "run"), "--dataset", str(tmp_path / "1.jsonl"), "--accelerator", "cpu", "--cpu-threads", "1",
    ]  # fmt: skip
    start(tmp_path / "added", 1, *options, arguments=add).succeed()
    one, two = (MeanActivations.load(tmp_path / name).file for name in ("all", "run"))
    assert [part.n_samples for part in two.parts] == [len(texts[0]), len(texts[1])]
    for name, moments in one.sums.items():
        assert np.array_equal(moments.count, two.sums[name].count)
        assert np.array_equal(moments.total, two.sums[name].total), name
        assert moments.squares is None or np.array_equal(moments.squares, two.sums[name].squares), name
    again = start(tmp_path / "third", 1, *options, arguments=add)
    assert again.wait() == [1]
    assert "samples are in the means already, by the hash of their tokens" in again.stderr


def change(arguments, dataset):
    return [str(dataset) if before == "--dataset" else word for before, word in zip(["", *arguments], arguments, strict=False)]


def write(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_adding_what_is_planned_otherwise_equals_one_run_to_1e_12(tmp_path, start, model_path, texts_path):
    """Of rows that do not depend on their batch: an embedding is looked up. Others differ in their last places (float32)."""
    rows = [json.loads(line) for line in texts_path.read_text().splitlines()]
    first, second = write(tmp_path, "first", rows[:30]), write(tmp_path, "second", rows[30:])
    run = [
        "means", str(model_path), "--dataset", str(texts_path), "--hooks", "embed", "resid_post", "--layers", "1",
        "--pooling", "last", "--token-budget", "48", "--shard-tokens", "48", "--accelerator", "cpu", "--cpu-threads", "1",
    ]  # fmt: skip
    start(tmp_path / "whole", arguments=run).succeed()
    start(tmp_path / "run", arguments=change(run, first)).succeed()
    add = ["means", "add", str(tmp_path / "run"), "--dataset", str(second), "--accelerator", "cpu", "--cpu-threads", "1"]
    start(tmp_path / "added", 2, "--allow-duplicates", arguments=add).succeed()
    one, two = MeanActivations.load(tmp_path / "whole").file, MeanActivations.load(tmp_path / "run").file
    assert two.n_samples == 90
    for name, tolerance in [("embed/last", 1e-12), ("resid_post.1/last", 1e-6)]:
        was, now = one.sums[name], two.sums[name]
        assert np.array_equal(was.count, now.count)
        assert np.abs(was.total - now.total).max() <= tolerance * np.abs(was.total).max()
        assert np.abs(was.squares - now.squares).max() <= tolerance * np.abs(was.squares).max()
    samples = {(int(part), int(index)) for part, index in zip(two.part, two.sample_index, strict=True)}
    assert samples == {(0, i) for i in range(30)} | {(1, i) for i in range(60)}


def test_a_shard_holds_sums_and_a_few_rows_and_is_small(whole):
    folder = RunFolder(whole)
    info = folder.read_info()
    for shard in range(info.n_shards):
        tensors, _ = open_shard(folder.shard_path(shard))
        assert len(tensors["sample_index"]) <= 4
        assert int(tensors["sums/resid_post.0/short/count"]) >= len(tensors["sample_index"])
