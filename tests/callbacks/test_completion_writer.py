"""Completions are committed by shard: any number of ranks and any kill give the same bytes, and no other run is continued."""

import time

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from exactivations.callbacks.completion_writer import CompletionWriter
from exactivations.datamodules.completions import open_completions
from exactivations.datamodules.plan import PlanOptions
from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.amplification.amplifier import AmplifyOptions, LogitDiffAmplifier
from exactivations.scripts.main import main
from exactivations.store.errors import InvalidInputError, StoreError
from tests.callbacks.conftest import content, stamps, wait_for_shards

SLOW = (
    "from exactivations.lit_modules.amplification.amplifier import LogitDiffAmplifier\n"
    "step = LogitDiffAmplifier.predict_step\n"
    "LogitDiffAmplifier.predict_step = lambda *args: (time.sleep(0.05), step(*args))[1]\n"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, model_path):
    """Two GPT-2s with random weights and one tokenizer, on disk."""
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=100, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=7, bos_token_id=7)
        model = GPT2LMHeadModel(config)
        model.transformer.wte.weight.data.mul_(20)  # as sharp as a trained model, so that texts differ
        paths.append(tmp_path_factory.mktemp("lm"))
        model.save_pretrained(paths[-1])
        AutoTokenizer.from_pretrained(model_path).save_pretrained(paths[-1])
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def command(pair, texts_path):
    return [
        "amplify", *pair, "--dataset", str(texts_path), "--alpha", "0", "1.5", "--rollouts", "2", "--max-new-tokens", "6",
        "--scores", "--max-rows", "8", "--token-budget", "24", "--shard-tokens", "60", "--accelerator", "cpu",
        "--cpu-threads", "1", "--show", "0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def reference(start, command, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "run"
    start(out, arguments=command).succeed()
    found = content(out)
    assert len(found) > 9
    return found


def test_killed_runs_that_go_on_with_other_numbers_of_ranks_write_the_same_bytes(tmp_path, start, command, reference):
    out, published = tmp_path / "run", {}
    for ranks in (2, 1):
        run = start(out, ranks, arguments=command, before=SLOW)
        wait_for_shards(out, len(published) + 2, run)
        run.kill()
        now = stamps(out)
        assert published.items() <= now.items() and len(published) < len(now) < len(reference) - 1
        published = now
    run = start(out, 2, arguments=command).succeed()
    assert published.items() <= stamps(out).items()
    assert content(out) == reference
    assert f"({len(published)} were there already)" in run.stdout


def test_every_field_that_differs_is_named_and_the_run_that_is_there_stays(tmp_path, pair, command, capsys, texts_path):
    out = tmp_path / "run"
    main([*command, "--out", str(out), "--num-samples", "8"])
    before = content(out)
    other = tmp_path / "other.jsonl"
    other.write_text(texts_path.read_text().replace('"w', '"w1 w', 1))
    for change, fields in (
        (["--alpha", "0", "2"], ["alphas: [0.0, 1.5] there, [0.0, 2.0] now"]),
        (["--seed", "3", "--temperature", "0.5"], ["seed: 0 there, 3 now", "temperature: 1.0 there, 0.5 now"]),
        (["--max-rows", "9", "--ignore-eos"], ["max_rows: 8 there, 9 now", "ignore_eos: False there, True now"]),
        (["--dataset", str(other)], ["dataset: '", "samples: the dataset changed: sample 0"]),
    ):
        with pytest.raises(SystemExit):
            main([*command, "--num-samples", "8", *change, "--out", str(out)])
        error = capsys.readouterr().err
        assert "holds another run" in error and all(f"\n  {field}" in error for field in fields), error
    with pytest.raises(SystemExit):
        main([command[0], pair[1], pair[0], *command[3:], "--num-samples", "8", "--out", str(out)])
    error = capsys.readouterr().err
    assert "\n  after_model: '" in error and "\n  before_model: '" in error and "seed" not in error
    assert content(out) == before


def amplifier(pair, **changes):
    options = AmplifyOptions(**{"alphas": (0.0, 1.5), "rollouts": 2, "max_new_tokens": 6, "max_rows": 8, "scores": True} | changes)
    return LogitDiffAmplifier(before=pair[0], after=pair[1], options=options, cpu_threads=1)


def test_what_is_read_back_is_what_was_generated(tmp_path, pair, predict, texts_path):
    data = TextDataModule(str(texts_path), pair[1], num_samples=20)
    module = amplifier(pair)
    predict(tmp_path / "run", writer=CompletionWriter(tmp_path / "run"), extractor=module, data=data)
    store = open_completions(tmp_path / "run")
    assert len(store) == 20 * 4 and {c.finished for c in store} == {"eos", "length"}
    for index in (19, 0, 7):
        batch = data.batch_with(index)
        found, row = module(batch), batch.sample_index.tolist().index(index)
        ids = found.token_ids.split(found.n_tokens.tolist())
        ends = [0, *found.n_tokens.cumsum(0).tolist()]
        for place, completion in enumerate(store[index], start=4 * row):
            assert completion.token_ids.tolist() == ids[place].tolist()
            assert completion.prompt_ids.tolist() == batch.input_ids[row].tolist()
            assert (completion.alpha, completion.rollout) == (found.alpha[place], found.rollout[place])
            assert completion.seed == found.seed[place] and completion.finished == found.finished[place]
            for name, values in vars(found.scores).items():
                assert completion.scores[name].equal(values[ends[place] : ends[place + 1]].float())


def test_a_module_that_completes_nothing_and_a_shard_that_was_not_filled_are_refused(tmp_path, pair, predict, parts, texts_path):
    extractor, data = parts()
    with pytest.raises(InvalidInputError, match="works with a LogitDiffAmplifier and a TextDataModule, got ActivationExtractor"):
        predict(tmp_path / "run", writer=CompletionWriter(tmp_path / "run"), extractor=extractor, data=data)
    data = TextDataModule(str(texts_path), pair[1], num_samples=20, plan_options=PlanOptions(token_budget=48))
    loader, data.predict_dataloader = data.predict_dataloader, lambda: DataLoader(list(loader())[1:], batch_size=None)
    with pytest.raises(StoreError, match="shard 0 was not filled"):
        predict(tmp_path / "run", writer=CompletionWriter(tmp_path / "run"), extractor=amplifier(pair), data=data)
    assert stamps(tmp_path / "run") == {}
    started = time.monotonic()
    data = TextDataModule(str(texts_path), pair[1], num_samples=20, plan_options=PlanOptions(token_budget=48))
    predict(tmp_path / "run", writer=CompletionWriter(tmp_path / "run"), extractor=amplifier(pair), data=data)
    assert time.monotonic() - started < 9  # the folder was given back: nobody waits for its lock
