"""The engine: whoever asks for what and when, each gets what is generated in process for it alone, and gets it once."""

import itertools
import queue
import random
import threading
import time
import weakref

import pytest
import torch

from exactivations.lit_modules.amplification.decoding import Decoding, Prompts, generate
from exactivations.lit_modules.amplification.model_pair import ModelPair
from exactivations.lit_modules.amplification.serving_engine import MEMORY, ServingEngine, _rows
from exactivations.lit_modules.amplification.serving_tickets import Ask, Drawn, Ended, EngineDeadError, Limits, QueueFullError
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.pairs import EOS, FAMILIES, language_model, pair

ENDING = list(range(EOS, 99, 11))


class Watching:
    def __init__(self):
        self.batches, self.hows, self.n_prompt_tokens = [], [], 0

    def stepped(self, n_rows):
        self.batches.append(n_rows)

    def admitted(self, n_prompt_tokens):
        self.n_prompt_tokens += n_prompt_tokens

    def ended(self, how):
        self.hows.append(how)


def pair_of(family="llama", dtype=torch.float32):
    models = ModelPair(**pair(family, dtype))
    models.after.generation_config.eos_token_id = ENDING
    return models


class Running:
    """An engine that runs inside the `with` block; `hold` makes it wait before its next forward pass."""

    def __init__(self, models=None, **limits):
        self.models, self.seen = models or pair_of(), Watching()
        self.engine = ServingEngine(self.models, Limits(**limits), self.seen)
        self.may_go = threading.Event()
        self.may_go.set()
        self.shapes = []

    def __enter__(self):
        def before(_, __, arguments):
            assert self.may_go.wait(20)
            cache = arguments["past_key_values"]
            self.shapes.append(arguments["input_ids"].shape[0] * (cache.get_seq_length() + arguments["input_ids"].shape[1]))

        self.handle = self.models.after.register_forward_pre_hook(before, with_kwargs=True)
        self.engine.start()
        return self

    def __exit__(self, *_):
        self.may_go.set()
        self.engine.close()
        self.handle.remove()

    def submit(self, *asks, seconds=60.0):
        events = [queue.Queue() for _ in asks]
        for ask in asks:
            self.engine.check(ask)
        return self.engine.submit(asks, [one.put for one in events], seconds), events


def ask_of(draw, **changes):
    known = {
        "prompt_ids": tuple(draw.choice([i for i in range(99) if i not in ENDING]) for _ in range(draw.randint(1, 12))),
        "alpha": draw.choice([-1.0, 0.0, 0.5, 1.0, 2.0]),
        "temperature": draw.choice([0.0, 0.7, 1.0, 1.5]),
        "top_p": draw.choice([0.5, 0.9, 1.0]),
        "seed": draw.randrange(2**63),
        "max_new_tokens": draw.randint(1, 16),
        "ignore_eos": draw.random() < 0.3,
        "scores": draw.random() < 0.3,
    }
    return Ask(**{**known, **changes})


def in_process(models, ask):
    eos = frozenset() if ask.ignore_eos else models.eos_token_ids
    done = generate(
        Decoding(Prompts(models, torch.tensor([ask.prompt_ids])), _rows([ask], [0]), eos_token_ids=eos, scores=ask.scores)
    )
    scores = None if done.scores is None else torch.stack([*vars(done.scores).values()])
    return done.token_ids.tolist(), done.finished[0], scores


def outcome(events):
    """The tokens, the end, and the scores; nothing comes after the end."""
    ids, scores = [], []
    while isinstance(event := events.get(timeout=30), Drawn):
        ids.append(event.token)
        scores += [list(event.scores.values())] if event.scores else []
    assert events.empty()
    return ids, event.how, torch.tensor(scores, dtype=torch.float64).T if scores else None


@pytest.mark.parametrize("family", FAMILIES)
def test_many_who_ask_at_once_and_later_get_what_each_gets_alone(family):
    draw = random.Random(family)
    models = pair_of(family)
    with Running(models, max_rows=6, max_batch_tokens=120, max_waiting=200) as running:
        found, threads = {}, []

        def client(number):
            mine = random.Random(f"{family} {number}")
            for _ in range(2):
                asks = [ask_of(mine) for _ in range(mine.randint(1, 3))]
                _, events = running.submit(*asks)
                found.update({ask: outcome(one) for ask, one in zip(asks, events, strict=True)})
                time.sleep(mine.random() / 100)

        threads = [threading.Thread(target=client, args=(draw.random(),)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert running.engine.n_running == running.engine.n_waiting == 0
    assert len(found) > 20 and set(running.seen.hows) == {"eos", "length"} and len(running.seen.hows) == len(found)
    assert 3 < max(running.seen.batches) <= 6 and max(running.shapes) <= 120
    assert running.seen.n_prompt_tokens == sum(len(ask.prompt_ids) for ask in found)
    for ask, (ids, how, scores) in found.items():
        expected, finished, known = in_process(models, ask)
        assert (ids, how) == (expected, finished)
        if known is not None:
            torch.testing.assert_close(scores, known, rtol=1e-3, atol=1e-4)


def test_rows_that_nobody_wants_leave_at_the_next_step_and_the_others_do_not_notice():
    draw = random.Random(0)
    asks = [ask_of(draw, max_new_tokens=30, ignore_eos=True, alpha=1.0) for _ in range(4)]
    with Running(max_rows=3) as running:
        tickets, events = running.submit(*asks)
        events[0].get(timeout=20), events[2].get(timeout=20)
        running.may_go.clear()
        tickets[1].cancel()
        tickets[3].cancel()  # it waits
        running.may_go.set()
        ended = [outcome(one) for one in events]
        assert [how for _, how, _ in ended] == ["length", "cancelled", "length", "cancelled"]
        assert len(ended[1][0]) < 30 and ended[3][0] == []
        tickets[0].cancel()  # has ended: nothing happens
    for place in (0, 2):
        assert ended[place][0] == in_process(running.models, asks[place])[0][1:]


def test_deadlines_pass_in_the_batch_and_in_the_queue():
    draw = random.Random(1)
    with Running(max_rows=1) as running:
        running.may_go.clear()
        asks = [ask_of(draw, max_new_tokens=30, ignore_eos=True, alpha=1.0) for _ in range(2)]
        _, events = running.submit(*asks, seconds=0.1)
        _, (last,) = running.submit(ask_of(draw))
        time.sleep(0.2)
        running.may_go.set()
        assert [outcome(one)[1] for one in events] == ["late", "late"]
        assert outcome(last)[1] in ("eos", "length")


def test_a_row_that_overflows_ends_alone():
    draw = random.Random(2)
    good = ask_of(draw, alpha=1.0)
    with Running() as running:
        _, events = running.submit(good, ask_of(draw, alpha=1e39), ask_of(draw, alpha=-1.0))
        assert outcome(events[1])[:2] == ([], "overflow")
        assert outcome(events[0])[0] == in_process(running.models, good)[0]
        assert outcome(events[2])[1] in ("eos", "length")


def test_the_queue_is_bounded_and_takes_all_of_a_request_or_none():
    draw = random.Random(3)
    with Running(max_rows=1, max_waiting=3) as running:
        running.may_go.clear()
        _, first = running.submit(ask_of(draw, alpha=1.0))
        while running.engine.n_waiting:
            time.sleep(0.01)
        _, three = running.submit(*[ask_of(draw) for _ in range(3)])
        with pytest.raises(QueueFullError, match="3 completions wait, 1 more are asked for, 3 may"):
            running.submit(ask_of(draw))
        running.may_go.set()
        assert all(outcome(one)[1] in ("eos", "length") for one in first + three)
        with pytest.raises(QueueFullError):
            running.submit(*[ask_of(draw) for _ in range(4)])


def test_when_the_engine_dies_everyone_is_told():
    draw = random.Random(4)
    with Running(max_rows=2) as running:
        running.may_go.clear()
        _, events = running.submit(*[ask_of(draw, max_new_tokens=20, ignore_eos=True, alpha=1.0) for _ in range(4)])
        handle = running.models.after.register_forward_pre_hook(lambda *_: 1 / 0)
        running.may_go.set()
        assert [outcome(one)[1] for one in events] == ["dead"] * 4
        handle.remove()
        assert "ZeroDivisionError" in running.engine.trouble
        with pytest.raises(EngineDeadError, match="division by zero"):
            running.submit(ask_of(draw))


def test_closing_ends_what_runs_and_what_waits():
    draw = random.Random(5)
    with Running(max_rows=1) as running:
        running.may_go.clear()
        _, events = running.submit(*[ask_of(draw, max_new_tokens=20, ignore_eos=True, alpha=1.0) for _ in range(3)])
        threading.Timer(0.1, running.may_go.set).start()
        running.engine.close()
        assert [outcome(one)[1] for one in events] == ["dead"] * 3
        with pytest.raises(EngineDeadError, match="closing"):
            running.submit(ask_of(draw))


def test_what_can_never_be_generated_is_refused():
    engine, draw = ServingEngine(pair_of("gpt2"), Limits(max_batch_tokens=40), Watching()), random.Random(6)
    for changes, message in (
        ({"prompt_ids": ()}, "no tokens"),
        ({"prompt_ids": (7, 99)}, "has id 99 at token 1"),
        ({"alpha": float("nan")}, "finite alpha"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 70}, "64 positions"),
        ({"max_new_tokens": 45}, "the batch holds 40"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            engine.check(ask_of(draw, **changes))
    with pytest.raises(InvalidInputError, match="max_rows must be at least 1"):
        Limits(max_rows=0)
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    stretched = ModelPair(after=language_model("llama", 0, rope_parameters=scaled), before=language_model("llama", 1))
    with pytest.raises(InvalidInputError, match="would depend on its neighbours"):
        ServingEngine(stretched, Limits(), Watching())


def out_of_memory(*_):
    raise torch.OutOfMemoryError("too much")


def test_prompts_that_find_no_memory_end_alone_and_the_others_go_on():
    draw = random.Random(7)
    with Running() as running:
        running.may_go.clear()
        good = ask_of(draw, alpha=0.0, scores=False, max_new_tokens=16, ignore_eos=True)
        _, (first,) = running.submit(good)
        while running.engine.n_waiting:
            time.sleep(0.01)
        handle = running.models.before.register_forward_pre_hook(out_of_memory)  # which the first one does not need
        _, (second,) = running.submit(ask_of(draw, alpha=1.0))
        running.may_go.set()
        ended = second.get(timeout=30)
        handle.remove()
        assert ended == Ended("memory", MEMORY)
        assert outcome(first)[0] == in_process(running.models, good)[0]
        _, (third,) = running.submit(good)
        assert outcome(third)[0] == in_process(running.models, good)[0] and running.engine.trouble is None


def test_a_step_that_finds_no_memory_ends_the_batch_and_not_the_engine():
    draw, n_passes = random.Random(8), itertools.count(1)
    with Running() as running:
        asks = [ask_of(draw, alpha=1.0, max_new_tokens=16, ignore_eos=True) for _ in range(2)]
        handle = running.models.before.register_forward_pre_hook(lambda *_: out_of_memory() if next(n_passes) == 4 else None)
        _, events = running.submit(*asks)
        for one in events:
            one.get(timeout=20)
        assert [outcome(one)[1] for one in events] == ["memory"] * 2
        handle.remove()
        _, (again,) = running.submit(asks[0])
        assert outcome(again)[0] == in_process(running.models, asks[0])[0] and running.engine.n_running == 0


def test_the_prompts_own_caches_are_gone_before_rows_join(monkeypatch):
    made, left = [], []

    class Watched(Prompts):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    join = Decoding.join

    def watched_join(self, other):
        left.append([one() for one in made if one() is not None])
        return join(self, other)

    monkeypatch.setattr("exactivations.lit_modules.amplification.serving_engine.Prompts", Watched)
    monkeypatch.setattr(Decoding, "join", watched_join)
    draw = random.Random(9)
    with Running() as running:
        _, events = running.submit(*[ask_of(draw, scores=scores, alpha=1.0) for scores in (False, True)])
        assert {outcome(one)[1] for one in events} <= {"eos", "length"}
    assert left == [[]] and len(made) == 1
