"""Before the engine: what is asked for waits for the tokenizer within the limits, and what is wrong is told in few errors."""

import asyncio
import threading
import time

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from exactivations.lit_modules.amplification.serving_engine import ServingEngine
from exactivations.lit_modules.amplification.serving_tickets import Limits
from exactivations.scripts.serve_flight import ServeError
from exactivations.scripts.serve_metrics import Metrics
from exactivations.scripts.serve_openai import CompletionsRequest
from exactivations.scripts.serve_run import KEY_VARIABLE, address, api_key_from
from exactivations.scripts.serve_schemas import MAX_FIELDS, MAX_PROMPTS, GenerateLdaBatchRequest, GenerateRequest
from exactivations.scripts.serve_work import RequestLimits, Service

from .served import PROMPT, models, tokenizer

SAMPLING = {"temperature": 1.0, "top_p": 1.0}


class Held:
    """The tokenizer, which waits until it may go on, and counts what it is given."""

    def __init__(self):
        self.may_go, self.given = threading.Event(), []

    def __deepcopy__(self, _):
        return tokenizer()

    def get_vocab(self):
        return tokenizer().get_vocab()

    def __call__(self, text):
        self.given.append(text)
        assert self.may_go.wait(20)
        return tokenizer()(text)


class Client:
    """A request whose client goes away when it is told to."""

    def __init__(self):
        self.leaves = asyncio.Event()

    async def receive(self):
        await self.leaves.wait()
        return {"type": "http.disconnect"}


def service_of(held, **limits):
    engine = ServingEngine(models(), Limits(max_waiting=3), Metrics())  # not started: all that is submitted waits
    return Service(engine, held, RequestLimits(**limits))


async def ask(service, client=None, *, prompts=(PROMPT,), rollouts=1):
    return await service.flight(
        client or Client(), prompts, 1, name="prompt", alpha=1.0, max_new_tokens=2, rollouts=rollouts, **SAMPLING
    )


def test_what_waits_for_the_tokenizer_is_counted_and_freed_when_its_client_goes():
    async def all_of_it():
        held = Held()
        service = service_of(held)
        first, leaving = asyncio.create_task(ask(service)), Client()
        second = asyncio.create_task(ask(service, leaving, rollouts=2))
        await asyncio.sleep(0)
        with pytest.raises(ServeError, match="3 completions wait, 1 more are asked for, 3 may") as refused:
            await ask(service)
        assert refused.value.status == 429
        leaving.leaves.set()
        with pytest.raises(ServeError, match="the client has gone") as gone:
            await second
        assert gone.value.status == 499
        third = asyncio.create_task(ask(service, prompts=["import"], rollouts=2))
        await asyncio.sleep(0)
        held.may_go.set()
        await asyncio.gather(first, third)
        assert held.given == [PROMPT, "import"] and service.engine.n_waiting == 3  # nobody waited for the second

    asyncio.run(all_of_it())


def test_the_deadline_runs_from_the_arrival_on():
    async def all_of_it():
        held = Held()
        service = service_of(held, seconds=0.2)
        with pytest.raises(ServeError, match="deadline") as late:
            await ask(service)
        assert late.value.status == 504
        held.may_go.set()
        service, begun = service_of(held, seconds=5.0), time.monotonic()
        held.may_go.clear()
        asyncio.get_running_loop().call_later(0.3, held.may_go.set)
        await ask(service)
        assert service.engine._waiting[0].deadline < begun + 5.2

    asyncio.run(all_of_it())


def test_a_text_that_is_certainly_too_long_is_not_tokenized():
    held = Held()
    held.may_go.set()
    longest = max(map(len, tokenizer().get_vocab()))
    for text, n_given in (("a" * (4 * longest + 1), 0), ("a" * 4 * longest, 1)):
        with pytest.raises(ServeError, match="4 is the most") as refused:
            asyncio.run(ask(service_of(held, max_prompt_tokens=4), prompts=[text]))
        assert refused.value.status == 422 and refused.value.param == "prompt" and len(held.given) == n_given


def test_texts_are_decoded_with_another_tokenizer_than_that_of_the_prompts():
    service = Service(ServingEngine(models(), Limits(), Metrics()), tokenizer(), RequestLimits())
    assert service.decoder.backend_tokenizer is not tokenizer().backend_tokenizer
    assert service.decoder.decode([70, 71, 72]) == tokenizer().decode([70, 71, 72])


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (CompletionsRequest, {"model": "m", "prompt": [""] * 30_000, "nothing": 1}),
        (CompletionsRequest, {"model": "m", "prompt": [-1] * 30_000}),
        (CompletionsRequest, {"model": "m", "prompt": "a", "stop": [""] * 30_000}),
        (CompletionsRequest, {"model": "m", "prompt": [[]] * 30_000}),
        (GenerateRequest, {"prompt": [0.5] * 30_000}),
        (GenerateLdaBatchRequest, {"prompts": [None] * 30_000}),
        (GenerateLdaBatchRequest, {"prompts": ["a"], "seeds": [-1] * 30_000}),
        (GenerateLdaBatchRequest, {"prompts": ["a"] * (MAX_PROMPTS + 1)}),
        (GenerateRequest, {"prompt": "a", **{f"f{number}": 1 for number in range(MAX_FIELDS)}}),
    ],
)
def test_a_body_that_is_wrong_in_each_of_its_elements_has_few_errors(model, fields):
    with pytest.raises(ValidationError) as raised:
        model.model_validate(fields)
    assert 1 <= raised.value.error_count() <= 8
    assert RequestValidationError(raised.value.errors()).errors()


def test_addresses_and_keys_as_they_are_used(monkeypatch):
    assert (address("::1", 8000), address("127.0.0.1", 80)) == ("[::1]:8000", "127.0.0.1:80")
    monkeypatch.setenv(KEY_VARIABLE, " secret\n")
    assert api_key_from(None) == "secret"
