"""From a request to the engine: what it may ask for, the tokens of its prompts, and its rows."""

import asyncio
import copy
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import torch
from starlette.requests import Request
from transformers import PreTrainedTokenizerBase

from exactivations.lit_modules.amplification.row_sampling import row_seed
from exactivations.lit_modules.amplification.serving_engine import ServingEngine
from exactivations.lit_modules.amplification.serving_text import GrowingText
from exactivations.lit_modules.amplification.serving_tickets import Ask, queue_is_full
from exactivations.scripts.serve_flight import Flight, Row, ServeError, while_wanted
from exactivations.scripts.serve_schemas import MAX_SEED
from exactivations.store.errors import InvalidInputError


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


class Service:
    """What all endpoints share: the engine, the after model's tokenizer, and limits.

    Args:
        engine: Generates.
        tokenizer: The after model's.
        limits: Of one request.

    Attributes:
        decoder: A copy of the tokenizer, for the event loop: one is not made for several threads at once.
    """

    def __init__(self, engine: ServingEngine, tokenizer: PreTrainedTokenizerBase, limits: RequestLimits) -> None:
        self.engine, self.tokenizer, self.limits = engine, tokenizer, limits
        self.decoder = copy.deepcopy(tokenizer)
        self._tokenizing = ThreadPoolExecutor(1, "serving-tokenizer")
        self._n_tokenizing = 0
        self._longest_token = max(map(len, tokenizer.get_vocab()))

    async def flight(
        self,
        request: Request,
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
            request: Who asks, and may go away meanwhile.
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
        limits, n_rows, deadline = self.limits, len(prompts) * rollouts, time.monotonic() + self.limits.seconds
        if n_rows > limits.max_completions:
            raise ServeError(422, f"{n_rows} completions are asked for, {limits.max_completions} may be", name)
        if max_new_tokens > limits.max_new_tokens:
            raise ServeError(422, f"{length_name} is {max_new_tokens}, {limits.max_new_tokens} is the most", length_name)
        if self.engine.trouble is not None:
            raise ServeError(503, self.engine.trouble)
        ids = await self._tokenized(request, prompts, name, n_rows, limits.seconds)
        drawn = seeds_of(seeds, len(prompts), alpha, rollouts)
        rows = []
        for place, seed in enumerate(drawn):
            ask = Ask(ids[place // rollouts], alpha, seed=seed, max_new_tokens=max_new_tokens, **sampling)
            if place % rollouts == 0:
                try:
                    self.engine.check(ask)
                except InvalidInputError as error:
                    raise ServeError(422, str(error), _numbered(name, place // rollouts, len(prompts))) from error
            rows.append(Row(place, ask, GrowingText(self.decoder, self.engine.pair.eos_token_ids, stop)))
        return Flight(self.engine, rows, deadline - time.monotonic(), streaming=streaming)

    async def _tokenized(
        self, request: Request, prompts: Sequence[str | Sequence[int]], name: str, n_rows: int, seconds: float
    ) -> list[tuple[int, ...]]:
        """Returns the prompts' ids. Those whose prompts wait for the tokenizer are counted with those that wait for the engine."""
        limit = self.limits.max_prompt_tokens
        for place, prompt in enumerate(prompts):
            if isinstance(prompt, str) and len(prompt) > limit * self._longest_token:
                named = _numbered(name, place, len(prompts))
                raise ServeError(
                    422, f"{named} has {len(prompt)} characters, too many for {limit} tokens: {limit} is the most", named
                )
        n_waiting, most = self.engine.n_waiting + self._n_tokenizing, self.engine.limits.max_waiting
        if n_waiting + n_rows > most:
            raise ServeError(429, queue_is_full(n_waiting, n_rows, most))
        self._n_tokenizing += n_rows
        try:
            work = asyncio.get_running_loop().run_in_executor(self._tokenizing, self._ids_of, prompts, name)
            return await while_wanted(request, work, seconds)
        finally:
            self._n_tokenizing -= n_rows

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


def _numbered(name: str, place: int, of: int) -> str:
    return name if of == 1 and name == "prompt" else f"{name}.{place}"
