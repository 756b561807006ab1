"""From a request to the engine and back: tokens of its prompts, its rows while they grow, and freeing them when nobody waits."""

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from starlette.requests import Request
from transformers import PreTrainedTokenizerBase

from exactivations.lit_modules.row_sampling import row_seed
from exactivations.lit_modules.serving_engine import (
    Ask,
    Drawn,
    Ended,
    EngineDeadError,
    QueueFullError,
    ServingEngine,
)
from exactivations.lit_modules.serving_text import GrowingText
from exactivations.scripts.serve_schemas import MAX_SEED
from exactivations.store.errors import InvalidInputError

RETRY_SECONDS = 1
STATUS: dict[str, int] = {"cancelled": 499, "late": 504, "overflow": 422, "dead": 503}
"""499 is nginx's for a client that has gone: nobody reads it, but it is counted."""


class ServeError(Exception):
    """An answer that is none."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for.

    Attributes:
        max_completions: Completions, of all its prompts.
        max_prompt_tokens: Tokens of a prompt.
        max_new_tokens: Tokens of a completion.
        seconds: Within which it is answered, or given up.
    """

    max_completions: int = 64
    max_prompt_tokens: int = 2048
    max_new_tokens: int = 1024
    seconds: float = 300.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise InvalidInputError(f"{field.name} must be above 0, got {getattr(self, field.name)}")


class Row:
    """One completion while it grows; `arrived` is filled by the engine's thread, all else belongs to the event loop."""

    def __init__(self, index: int, ask: Ask, text: GrowingText) -> None:
        self.index, self.ask, self.text = index, ask, text
        self.arrived: deque[Drawn | Ended] = deque()
        self.token_ids: list[int] = []
        self.scores: list[dict[str, float]] = []
        self.finish_reason: Literal["eos", "length", "stop"] | None = None

    def take(self, looking: bool) -> str:
        """Takes in what arrived, and returns the text that is certain now; if not looking, only at the end."""
        new = ""
        while self.arrived and self.finish_reason is None:
            event = self.arrived.popleft()
            if isinstance(event, Drawn):
                self.token_ids.append(event.token)
                if event.scores is not None:
                    self.scores.append(event.scores)
                self.text.add(event.token)
                new += self.text.more() if looking else ""
                if self.text.is_stopped:
                    self.finish_reason = "stop"
            elif event.how == "eos" or event.how == "length":
                new += self.text.rest()
                self.finish_reason = "stop" if self.text.is_stopped else event.how
            else:
                raise ServeError(STATUS[event.how], _in_words(event), "alpha" if event.how == "overflow" else None)
        return new


class Flight:
    """The rows of one request, from the queue to their end.

    Args:
        engine: Where they are generated.
        rows: What is asked for.
        seconds: After which it is given up.
        streaming: Whether each token is of interest when it comes.

    Raises:
        ServeError: 429 if the queue is full, 503 if the engine has stopped.
    """

    def __init__(self, engine: ServingEngine, rows: Sequence[Row], seconds: float, *, streaming: bool) -> None:
        self.rows, self._looking = rows, streaming or rows[0].text.needs_looking
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Row]()
        try:
            self._tickets = engine.submit([row.ask for row in rows], [self._listener(row) for row in rows], seconds)
        except QueueFullError as error:
            raise ServeError(429, str(error)) from error
        except EngineDeadError as error:
            raise ServeError(503, str(error)) from error

    def close(self) -> None:
        """Frees the rows that nobody waits for any more."""
        for ticket in self._tickets:
            ticket.cancel()

    async def growing(self) -> AsyncGenerator[tuple[Row, str]]:
        """Yields rows with their new text, each at last with its finish_reason.

        Raises:
            ServeError: If a row was given up.
        """
        n_left = len(self.rows)
        while n_left:
            row = await self._queue.get()
            if row.finish_reason is not None:  # what came after a stop sequence
                continue
            new = row.take(self._looking)
            if row.finish_reason is not None:
                n_left -= 1
                self._tickets[row.index].cancel()  # where it was stopped, its row goes on until now
            if new or row.finish_reason is not None:
                yield row, new

    async def complete(self, request: Request) -> Sequence[Row]:
        """Returns all rows at their end.

        Raises:
            ServeError: If a row was given up, or the client has gone: then the rows are free.
        """
        gone, done = asyncio.create_task(_gone(request)), asyncio.create_task(self._all())
        try:
            await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise ServeError(STATUS["cancelled"], "the client has gone")
            return done.result()
        finally:
            self.close()
            gone.cancel()
            done.cancel()

    async def _all(self) -> Sequence[Row]:
        async for _ in self.growing():
            pass
        return self.rows

    def _listener(self, row: Row) -> Callable[[Drawn | Ended], None]:
        def listen(event: Drawn | Ended) -> None:
            row.arrived.append(event)
            if (self._looking or isinstance(event, Ended)) and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._queue.put_nowait, row)

        return listen


class Service:
    """What all endpoints share: the engine, the after model's tokenizer, and limits.

    Args:
        engine: Generates.
        tokenizer: The after model's.
        limits: Of one request.
    """

    def __init__(self, engine: ServingEngine, tokenizer: PreTrainedTokenizerBase, limits: RequestLimits) -> None:
        self.engine, self.tokenizer, self.limits = engine, tokenizer, limits
        self._tokenizing = ThreadPoolExecutor(1, "serving-tokenizer")  # a tokenizer is not made for several threads at once

    async def flight(
        self,
        prompts: Sequence[str | Sequence[int]],
        seeds: Sequence[int | None] | int | None,
        *,
        name: str,
        alpha: float,
        max_new_tokens: int,
        length_name: str = "max_new_tokens",
        rollouts: int = 1,
        stop: Sequence[str] = (),
        streaming: bool = False,
        **sampling: Any,
    ) -> Flight:
        """Asks for completions.

        Args:
            prompts: Texts, or ids.
            seeds: One for each prompt, or one for all; see `seeds_of`.
            name: Of the prompts' field, for messages.
            alpha: Of all.
            max_new_tokens: Of each completion.
            length_name: Of that field.
            rollouts: Completions of each prompt.
            stop: Sequences that end a text.
            streaming: See `Flight`.
            sampling: What else an `Ask` has.

        Raises:
            ServeError: If that may not be asked for, or not now.
        """
        limits = self.limits
        if len(prompts) * rollouts > limits.max_completions:
            raise ServeError(422, f"{len(prompts) * rollouts} completions are asked for, {limits.max_completions} may be", name)
        if max_new_tokens > limits.max_new_tokens:
            raise ServeError(422, f"{length_name} is {max_new_tokens}, {limits.max_new_tokens} is the most", length_name)
        if self.engine.trouble is not None:
            raise ServeError(503, self.engine.trouble)
        ids = await asyncio.get_running_loop().run_in_executor(self._tokenizing, self._ids_of, prompts, name)
        drawn = seeds_of(seeds, len(prompts), alpha, rollouts)
        rows = []
        for place, seed in enumerate(drawn):
            ask = Ask(ids[place // rollouts], alpha, seed=seed, max_new_tokens=max_new_tokens, **sampling)
            if place % rollouts == 0:
                try:
                    self.engine.check(ask)
                except InvalidInputError as error:
                    raise ServeError(422, str(error), _numbered(name, place // rollouts, len(prompts))) from error
            rows.append(Row(place, ask, GrowingText(self.tokenizer, self.engine.pair.eos_token_ids, stop)))
        return Flight(self.engine, rows, limits.seconds, streaming=streaming)

    def _ids_of(self, prompts: Sequence[str | Sequence[int]], name: str) -> list[tuple[int, ...]]:
        found = [tuple(self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt) for prompt in prompts]
        for place, ids in enumerate(found):
            if len(ids) > self.limits.max_prompt_tokens:
                named = _numbered(name, place, len(prompts))
                raise ServeError(422, f"{named} has {len(ids)} tokens, {self.limits.max_prompt_tokens} is the most", named)
        return found


def seeds_of(seeds: Sequence[int | None] | int | None, n_prompts: int, alpha: float, rollouts: int) -> list[int]:
    """Returns the seed of each completion.

    A single completion has the seed of its request. Of several, rollout r of prompt p has that which `amplify` gives rollout r of
    sample p in a run with this seed. A request without one gets one at random.
    """
    if isinstance(seeds, Sequence):
        return [secrets.randbelow(MAX_SEED) if seed is None else seed for seed in seeds]
    seed = secrets.randbelow(MAX_SEED) if seeds is None else seeds
    if n_prompts * rollouts == 1:
        return [seed]
    prompt, rollout = torch.cartesian_prod(torch.arange(n_prompts), torch.arange(rollouts)).reshape(-1, 2).unbind(dim=1)
    return row_seed(seed, prompt, torch.full((len(prompt),), alpha, dtype=torch.float64), rollout).tolist()


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection. The body has been read by then."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _numbered(name: str, place: int, of: int) -> str:
    return name if of == 1 and name == "prompt" else f"{name}.{place}"


def _in_words(event: Ended) -> str:
    words = {"late": "the deadline passed before it was complete", "cancelled": "the client has gone"}
    return event.why or words[event.how]
