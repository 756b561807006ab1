"""Completions are found by sample, say only what was generated before the end of a text, and go out as JSONL."""

import json
import shutil

import lightning.pytorch as pl
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from exactivations.callbacks.completion_writer import CompletionWriter
from exactivations.datamodules.completions import open_completions
from exactivations.datamodules.embedded import DEMO_MODEL
from exactivations.datamodules.plan import PlanOptions
from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.amplification.amplifier import AmplifyOptions, LogitDiffAmplifier
from exactivations.store.completions import CompletionStore
from exactivations.store.errors import CorruptShardError, IncompleteStoreError, InvalidInputError, StoreError

TEXTS = [f"def f{i}(a, b):\n    return a" + " + b" * (i % 3) for i in range(7)]


def generate(out, **options):
    """Completions, half of them of a module's end, after which the demo model ends the text more often than not."""
    texts = [text + ("\n\nif __name__ == '__main__':\n    unittest.main()\n" if i % 2 else "") for i, text in enumerate(TEXTS)]
    data = TextDataModule(texts, "demo", plan_options=PlanOptions(token_budget=40, shard_tokens=40))
    asked = AmplifyOptions(**{"alphas": (0.0, 0.5), "rollouts": 2, "max_new_tokens": 16, "seed": 4} | options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
    trainer = pl.Trainer(accelerator="cpu", callbacks=[CompletionWriter(out)], **quiet)
    trainer.predict(
        LogitDiffAmplifier(before="demo", after="demo", options=asked, cpu_threads=1), datamodule=data, return_predictions=False
    )
    return out, texts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def test_completions_come_by_sample_alpha_and_rollout_and_hold_no_prompt(run, tokenizer):
    out, texts = run
    store = open_completions(out)
    found = list(store)
    assert [(c.sample_index, c.alpha, c.rollout) for c in found] == [
        (i, alpha, rollout) for i in range(7) for alpha in (0.0, 0.5) for rollout in (0, 1)
    ]
    assert len(store) == 28 and store.n_planned == 14 and [c.seed for c in store[5]] == [c.seed for c in found[20:24]]
    assert {c.finished for c in found} == {"eos", "length"}
    for c in found:
        assert c.prompt == texts[c.sample_index] and c.prompt_ids.tolist() == tokenizer(c.prompt)["input_ids"]
        ended = [i for i, token in enumerate(c.token_ids.tolist()) if token == tokenizer.eos_token_id]
        assert ended == ([len(c.token_ids) - 1] if c.finished == "eos" else [])
        assert c.text == tokenizer.decode(c.token_ids[: c.n_counted].tolist()) and "<|endoftext|>" not in c.text
        assert c.n_counted == len(c.token_ids) - len(ended) and c.scores == {}


def test_what_comes_behind_the_end_of_a_text_is_kept_but_not_said(run, tmp_path):
    out, _ = generate(tmp_path / "run", ignore_eos=True, scores=True)
    ended, fixed = open_completions(run[0]), open_completions(out)
    for short, long in zip(ended, fixed, strict=True):
        assert len(long.token_ids) == 16 == len(long.scores["kl"]) and long.finished == "length"
        assert long.text == short.text and long.n_counted == short.n_counted
        assert long.token_ids[: len(short.token_ids)].equal(short.token_ids)


def test_jsonl_holds_all_of_them(run, tmp_path):
    store = open_completions(run[0])
    store.to_jsonl(tmp_path / "all.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert rows == [c.to_json() for c in store] and rows[9]["text"] == store[2][1].text
    assert [path.name for path in tmp_path.iterdir()] == ["all.jsonl"]
    with pytest.raises(StoreError, match="cannot write"):
        store.to_jsonl(tmp_path / "none" / "all.jsonl")


def test_missing_damaged_and_foreign_shards_are_told(run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run[0], out)
    samples = pq.read_table(out / "samples.parquet")
    shard_of, shards = samples.column("shard").to_pylist(), sorted((out / "shards").iterdir())
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(IncompleteStoreError, match=f"1 of {len(shards)} shards are missing"):
        CompletionStore(out)
    store = CompletionStore(out, allow_incomplete=True)
    left = [i for i in range(7) if shard_of[i] != 1]
    assert store.sample_index.tolist() == left and len(store) == 4 * len(left) and store[left[0]][0].text is None
    with pytest.raises(IncompleteStoreError, match="shard 1"):
        store[shard_of.index(1)]
    with pytest.raises(InvalidInputError, match="no sample 7"):
        store[7]
    data = bytearray(shards[0].read_bytes())
    data[-1] ^= 1
    shards[0].write_bytes(data)
    with pytest.raises(CorruptShardError, match="is damaged"):
        CompletionStore(out, allow_incomplete=True, verify_checksums=True)
    turned = samples.set_column(0, "sample_index", [samples.column("sample_index").to_numpy() + 1])
    pq.write_table(turned, out / "samples.parquet")
    with pytest.raises(CorruptShardError, match="other samples than samples"):
        list(CompletionStore(out, allow_incomplete=True))


def test_another_tokenizer_and_another_kind_of_run_are_refused(run, tmp_path):
    changed = AutoTokenizer.from_pretrained(DEMO_MODEL)
    changed.add_tokens(["<new>"])
    changed.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(InvalidInputError, match="is not the one that the prompts"):
        open_completions(run[0], tmp_path / "tokenizer")
    shutil.copytree(run[0], tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    info = json.loads(path.read_text())
    del info["identity"]["alphas"]
    path.write_text(json.dumps(info))
    with pytest.raises(StoreError, match="holds no completions"):
        CompletionStore(tmp_path / "run")
