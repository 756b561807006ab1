"""The check at the end of a run, on one rank and several: what it draws, what it leaves, and how a run ends that fails it."""

import json
import shutil

import lightning.pytorch as pl
import pytest

from exactivations.callbacks import ActivationWriter, GroundTruthCheck
from exactivations.lit_modules.verification.sample_check import SampleCheck
from exactivations.scripts.main import main
from exactivations.store import ActivationStore
from exactivations.store.errors import InvalidInputError, StoreError, VerificationError

from .conftest import stamps, wait_for_shards

SPOIL = """
import exactivations.lit_modules.extraction.extractor as extraction
predict_step = extraction.ActivationExtractor.predict_step
def spoiled(self, step, batch_idx=0):
    out = predict_step(self, step, batch_idx)
    if os.environ.get("LOCAL_RANK", "0") == {rank!r}:
        for name, values in out.activations.items():
            if name.endswith("/mean"):
                out.activations[name] = values.roll(1, dims=1)
    return out
extraction.ActivationExtractor.predict_step = spoiled
"""


def verdict(out):
    return json.loads((out / "verification.json").read_text())


def errors_of(run):
    return [line for line in run.stderr.splitlines() if "exactivations: error: " in line]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_checks_samples_of_its_own_shards(ranks, tmp_path, start):
    told = start(tmp_path / "run", ranks).succeed().stdout
    found = verdict(tmp_path / "run")
    assert found["passed"] and 16 <= len(found["samples"]) < 16 + ranks and found["failures"] == []
    assert 0 < found["share"] < 1 and {figures["name"] for figures in found["figures"]} == {
        f"resid_post.{i}/{pooling}" for i in (0, 1) for pooling in ("tokens", "mean")
    }
    assert f"verified: {len(found['samples'])} samples, computed again alone in float32, agree with the store" in told
    shards = set(ActivationStore(tmp_path / "run").samples.take(found["samples"]).column("shard").to_pylist())
    assert len(shards) >= ranks


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_fault_on_one_rank_ends_all_ranks_with_one_message_and_marks_the_store(rank, tmp_path, start):
    out = tmp_path / "run"
    run = start(out, 2, before=SPOIL.format(rank=rank))
    assert run.wait() == [1, 1]
    (message,) = errors_of(run)
    assert "failed its verification" in message
    found = verdict(out)
    assert not found["passed"] and 0 < len(found["failed_samples"]) < len(found["samples"])
    for refused in (lambda: ActivationStore(out), lambda: ActivationStore(out, allow_incomplete=True)):
        with pytest.raises(VerificationError, match=r"failed its verification of .*\n  sample \d+: resid_post.0/mean is not"):
            refused()
    assert len(ActivationStore(out, allow_unverified=True)) == 90


def test_a_store_that_failed_is_checked_again_with_the_samples_that_failed_until_it_is_made_anew(tmp_path, start):
    out = tmp_path / "run"
    assert start(out, before=SPOIL.format(rank="0")).wait() == [1]
    failed, before = verdict(out)["failed_samples"], stamps(out)
    assert start(out).wait() == [1]  # the fault is mended, the rows in the store are not
    assert stamps(out) == before and set(failed) <= set(verdict(out)["failed_samples"])
    start(out, 2, "--overwrite").succeed()
    assert verdict(out)["passed"] and len(ActivationStore(out)) == 90


def test_a_verified_run_is_not_verified_again_but_one_whose_shard_was_lost_is(tmp_path, start):
    out = tmp_path / "run"
    start(out).succeed()
    first = (out / "verification.json").read_bytes()
    assert "nothing new was computed; verified: " in start(out, 2).succeed().stdout
    assert (out / "verification.json").read_bytes() == first
    (out / "shards" / "00003.safetensors").unlink()
    assert "nothing new" not in start(out).succeed().stdout
    assert (out / "verification.json").read_bytes() != first


def test_a_run_killed_while_it_verifies_is_verified_when_it_is_started_again(tmp_path, start):
    out = tmp_path / "run"
    check = "from exactivations.lit_modules.verification.sample_check import SampleCheck as C"
    slow = f"import time\n{check}\nC.draw = lambda *a, **k: time.sleep(600)"
    run = start(out, 2, before=slow)
    n_shards = json.loads((out / "run.json").read_text())["n_shards"] if (out / "run.json").exists() else 10**9
    while n_shards == 10**9 and any(process.is_alive() for process in run.processes):
        wait_for_shards(out, 1, run)
        n_shards = json.loads((out / "run.json").read_text())["n_shards"]
    wait_for_shards(out, n_shards, run)
    run.kill()
    with pytest.raises(VerificationError, match=r"is not verified: .* exactivations verify "):
        ActivationStore(out)
    before = stamps(out)
    start(out).succeed()
    assert stamps(out) == before and verdict(out)["passed"] and len(ActivationStore(out)) == 90


def test_ranks_without_shards_and_more_samples_than_there_are(tmp_path, start):
    start(tmp_path / "run", 3, "--shard-tokens", "1000000", "--verify-samples", "1000").succeed()
    assert len(verdict(tmp_path / "run")["samples"]) == 90


def test_nodes_with_folders_of_their_own_each_keep_the_verdict_over_all(tmp_path, start):
    environments = [
        {"WORLD_SIZE": "2", "NODE_RANK": str(node), "LOCAL_RANK": "0", "OUT": str(tmp_path / f"node{node}")} for node in (0, 1)
    ]
    run = start(None, 2, "--num-nodes", "2", "--devices", "1", environments=environments).succeed()
    assert "are in other nodes' folders" in run.stdout
    one, other = (verdict(tmp_path / f"node{node}") for node in (0, 1))
    assert one["samples"] == other["samples"] and one["passed"]
    shutil.copytree(tmp_path / "node1", tmp_path / "node0", dirs_exist_ok=True)
    assert len(ActivationStore(tmp_path / "node0")) == 90


def test_without_verification_readers_are_told_how_to_get_it(tmp_path, start, arguments, capsys):
    out = tmp_path / "run"
    assert f"until you run: exactivations verify {out}" in start(out, 1, "--verify-samples", "0").succeed().stdout
    with pytest.raises(VerificationError, match="is not verified"):
        ActivationStore(out)
    main(["show", str(out)])
    assert "NOT VERIFIED" in capsys.readouterr().out
    main(["verify", str(out), "--samples", "5"])
    assert f"{out}: VERIFIED" in capsys.readouterr().out
    assert len(ActivationStore(out)) == 90
    main(["show", str(out)])
    assert "5 samples, computed again alone in float32, agree" in capsys.readouterr().out


def test_verify_from_the_command_line_fails_for_a_spoiled_store_and_for_another_dataset(tmp_path, start, capsys):
    out = tmp_path / "run"
    start(out, 1, "--verify-samples", "0", before=SPOIL.format(rank="0")).succeed()
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(out), "--samples", "3"])
    told = capsys.readouterr()
    assert stop.value.code == 1 and f"{out}: FAILED" in told.out and "/mean is not what the sample gives alone" in told.err
    main(["show", str(out)])
    assert "FAILED its verification" in capsys.readouterr().out
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "w1 w2", "number": 0}\n')
    marked = (out / "verification.json").read_bytes()
    with pytest.raises(SystemExit):
        main(["verify", str(out), "--dataset", str(other)])
    assert "was not made of this model and data" in capsys.readouterr().err
    assert (out / "verification.json").read_bytes() == marked  # of another dataset nothing can be said


def test_it_stands_before_the_writer_and_nowhere_else(tmp_path, parts):
    for callbacks in ([GroundTruthCheck()], [ActivationWriter(tmp_path / "run"), GroundTruthCheck()]):
        trainer = pl.Trainer(accelerator="cpu", devices=1, callbacks=callbacks, logger=False, use_distributed_sampler=False,
                             enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
        extractor, data = parts()
        with pytest.raises(InvalidInputError, match="list it before one among the callbacks"):
            trainer.predict(extractor, datamodule=data, return_predictions=False)
    with pytest.raises(InvalidInputError, match="at least 1"):
        GroundTruthCheck(0)


def test_an_error_of_ours_while_verifying_ends_the_run_and_leaves_the_store_unverified(tmp_path, predict, monkeypatch):
    monkeypatch.setattr(SampleCheck, "check", lambda self, index: 1 / 0)
    with pytest.raises(StoreError, match="could not verify: ZeroDivisionError"):
        predict(tmp_path / "run", before=[GroundTruthCheck()])
    assert not (tmp_path / "run" / "verification.json").exists()
    assert len(ActivationStore(tmp_path / "run", allow_unverified=True)) == 90


def flip_a_bit(out):
    path = sorted((out / "shards").glob("*.safetensors"))[2]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    return path


def test_a_checksum_that_failed_is_not_cleared_by_starting_the_run_again(tmp_path, start, capsys):
    out = tmp_path / "run"
    start(out).succeed()
    path = flip_a_bit(out)
    with pytest.raises(SystemExit):
        main(["verify", str(out), "--samples", "2"])
    assert "and 1 shards are damaged" in capsys.readouterr().out
    run = start(out)
    assert run.wait() == [1] and f"{path.name} is damaged" in run.stderr
    path.unlink()
    start(out).succeed()
    assert verdict(out)["passed"] and len(ActivationStore(out)) == 90


def test_a_verdict_does_not_hold_for_shards_that_were_computed_after_it(tmp_path, start):
    out = tmp_path / "run"
    start(out).succeed()
    (out / "shards" / "00002.safetensors").unlink()
    start(out, 1, "--verify-samples", "0", before=SPOIL.format(rank="0")).succeed()
    with pytest.raises(VerificationError, match="is not verified"):
        ActivationStore(out)
    run = start(out, 1, "--verify-samples", "90")  # 16 might miss the few samples of one shard
    assert run.wait() == [1] and "is not what the sample gives alone" in run.stderr


def test_a_verdict_does_not_hold_for_a_table_of_samples_that_was_changed_after_it(tmp_path, start):
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = tmp_path / "run"
    start(out).succeed()
    table = pq.read_table(out / "samples.parquet")
    column = table.column_names.index("number")
    pq.write_table(table.set_column(column, "number", pa.array(table.column("number").to_pylist()[::-1])), out / "samples.parquet")
    with pytest.raises(VerificationError, match=r"or its samples\.parquet were changed after"):
        ActivationStore(out)


def test_more_samples_than_were_verified_before_are_verified(tmp_path, start):
    out = tmp_path / "run"
    start(out, 1, "--verify-samples", "2").succeed()
    assert "nothing new" not in start(out, 1, "--verify-samples", "30").succeed().stdout
    assert len(verdict(out)["samples"]) == 30
    assert "nothing new was computed; verified: 30 samples" in start(out).succeed().stdout
