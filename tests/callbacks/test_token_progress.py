"""Progress counts tokens, shows them and the time left on a terminal, and is silent anywhere else."""

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exactivations.callbacks import TokenProgress, token_progress
from exactivations.store.batches import ActivationBatch
from tests.callbacks.conftest import TEXTS

N_TOKENS = sum(len(text.split()) for text in TEXTS)


def test_every_token_is_counted_and_nothing_is_shown_where_there_is_no_terminal(tmp_path, predict, capfd):
    progress = TokenProgress()
    predict(tmp_path / "run", progress)
    assert progress.n_tokens == N_TOKENS
    assert progress.seconds > 0
    assert "tokens" not in capfd.readouterr().err  # Lightning may say something of its own


def test_a_terminal_shows_tokens_and_the_time_left(tmp_path, start):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # a new one has no columns
    to_terminal = f"os.dup2(os.open({os.ttyname(theirs)!r}, os.O_RDWR | os.O_NOCTTY), 2)"
    run = start(tmp_path / "run", seconds_per_batch=0.05, before=to_terminal)
    shown, deadline = b"", time.monotonic() + 60
    while run.processes[0].is_alive() or select.select([ours], [], [], 0)[0]:
        assert time.monotonic() < deadline
        if select.select([ours], [], [], 0.1)[0]:
            shown += os.read(ours, 65536)
    os.close(theirs)
    os.close(ours)
    run.succeed()
    text = shown.decode()
    assert re.search(r"extracting +\d+%\|.*\| [\d.]+k?/[\d.]+k? tokens \[.*tokens/s, \d\d:\d\d left\]", text), text
    assert "extracting 100%|" in text and "00:00 left" in text.rpartition("extracting")[2]
    assert f"{N_TOKENS}/{N_TOKENS} tokens" in text


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(token_progress.time, "monotonic", lambda: clock.now)
    return clock


def test_the_time_left_follows_the_predicted_cost_and_not_the_number_of_batches(clock):
    """Three batches of cost 6, 3 and 1; the first takes 12 seconds, so 8 seconds are left, though two of three batches are."""
    plan = SimpleNamespace(
        batches_of=lambda shard: [shard], batch_cost=np.array([6.0, 3.0, 1.0]), batch_tokens=np.array([50, 30, 10])
    )
    data = SimpleNamespace(plan=plan, shards_of=lambda rank, size: [0, 1, 2])
    trainer = SimpleNamespace(datamodule=data, global_rank=0, world_size=1)
    progress, left = TokenProgress(), []
    progress.on_predict_start(trainer, None)
    progress._bar.set_postfix_str = lambda text, refresh: left.append(text)
    clock.now += 100  # what comes before the first step does not count
    progress.on_predict_batch_start(trainer, None, None, 0)
    for seconds, tokens in ((12, 50), (6, 30), (2, 10)):
        clock.now += seconds
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        out = ActivationBatch(torch.tensor([0]), torch.tensor([tokens]), ids[0], ids[0].bool(), {})
        progress.on_predict_batch_end(trainer, None, out, SimpleNamespace(shapes=((1, tokens, tokens),), computed_tokens=tokens), 0)
    progress.on_predict_end(trainer, None)
    assert left == ["00:08 left", "00:02 left", "00:00 left"]
    assert progress.n_tokens == 90 and progress.seconds == 20
