"""OpenAI's dialect: /v1/models and /v1/completions, with alpha as one more field."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from exactivations.scripts.serve_faults import documented, fault
from exactivations.scripts.serve_flight import Flight, Row, ServeError
from exactivations.scripts.serve_schemas import (
    MAX_PROMPTS,
    SEED,
    Alpha,
    Prompt,
    Seed,
    Strict,
    Temperature,
    Text,
    TokenIds,
    TopP,
    finite,
)
from exactivations.scripts.serve_work import Service
from exactivations.store.completions import decoded

StopSequence = Annotated[Text, Field(min_length=1)]
DEFAULT_MAX_TOKENS = 16  # OpenAI's own


class StreamOptions(Strict):
    """What a stream tells besides."""

    include_usage: bool = False


class CompletionsRequest(Strict):
    """OpenAI's request, without what cannot be done here: such a field is refused, never passed over."""

    model: Text
    prompt: Text | TokenIds | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    alpha: Alpha = 0.0
    max_tokens: Annotated[int, Field(ge=1)] | None = DEFAULT_MAX_TOKENS
    temperature: Temperature | None = 1.0
    top_p: TopP | None = 1.0
    n: Annotated[int, Field(ge=1)] | None = 1
    seed: Seed | None = Field(None, description=SEED)
    stop: StopSequence | Annotated[list[StopSequence], Field(max_length=4, fail_fast=True)] | None = None
    logprobs: Literal[0] | None = Field(None, description="0: those of the tokens that were drawn. No others are kept.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: str | None = Field(None, description="Not used.")


class EventStream(StreamingResponse):
    """Server-sent events of a flight, whose rows are free when it ends, also if it never began."""

    def __init__(self, flight: Flight, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._flight = flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._flight.close()


def openai_routes(app: FastAPI, service: Service, model: str, refusals: dict[int | str, dict[str, Any]]) -> None:
    """Adds them to the app.

    Args:
        app: To which.
        service: What generates.
        model: What the served pair is called.
        refusals: Description of the statuses that are none of success.
    """
    started = int(time.time())

    @app.get("/v1/models", responses=documented(401))
    async def models() -> dict[str, Any]:
        """Lists the one model that is served."""
        return {"object": "list", "data": [{"id": model, "object": "model", "created": started, "owned_by": "exactivations"}]}

    described: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/event-stream": {}}, "description": "A completion, or with `stream` its chunks."}
    }

    @app.post("/v1/completions", responses={**described, **documented(404), **refusals}, response_class=JSONResponse)
    async def completions(asked: CompletionsRequest, request: Request) -> Response:
        """Completes prompts; see OpenAI's description of it."""
        if asked.model != model:
            raise ServeError(404, f"there is no model {asked.model!r} here, only {model!r}", "model", "model_not_found")
        flight = await _flight(service, asked, request)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": model}
        if asked.stream:
            return EventStream(flight, _events(flight, asked, head, service))
        rows = await flight.complete(request)
        choices = [_choice(row, row.text.text, _logprobs(row, 0, service) if asked.logprobs == 0 else None) for row in rows]
        return JSONResponse({**head, "choices": choices, "usage": _usage(rows, asked)})


async def _flight(service: Service, asked: CompletionsRequest, request: Request) -> Flight:
    of_ids = isinstance(asked.prompt, list) and isinstance(asked.prompt[0], int)
    prompts: Any = [asked.prompt] if isinstance(asked.prompt, str) or of_ids else asked.prompt
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    return await service.flight(
        request, prompts, asked.seed, name="prompt", alpha=asked.alpha, length_name="max_tokens", rollouts=asked.n or 1, stop=stop,
        max_new_tokens=asked.max_tokens or DEFAULT_MAX_TOKENS, temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p, ignore_eos=asked.ignore_eos, scores=asked.logprobs is not None,
        streaming=bool(asked.stream) or asked.logprobs is not None,  # what is known of a token has the place where it begins
    )  # fmt: skip


async def _events(flight: Flight, asked: CompletionsRequest, head: dict[str, Any], service: Service) -> AsyncIterator[str]:
    """Yields what is sent: chunks of text, each choice's finish_reason, the usage if asked for, and [DONE]; or an error."""
    told = [0] * len(flight.rows)
    try:
        async with aclosing(flight.growing()) as growing:
            async for row, new in growing:
                logprobs = _logprobs(row, told[row.index], service) if asked.logprobs == 0 else None
                told[row.index] = len(row.text.token_ids)
                yield _event({**head, "choices": [_choice(row, new, logprobs)]})
    except ServeError as error:
        body = bytes(fault(error.status, error.message, error.param, error.code).body).decode()
        yield f"event: error\ndata: {body}\n\n"
        return
    if asked.stream_options is not None and asked.stream_options.include_usage:
        yield _event({**head, "choices": [], "usage": _usage(flight.rows, asked)})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"


def _choice(row: Row, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    reason = "stop" if row.finish_reason == "eos" else row.finish_reason
    return {"index": row.index, "text": text, "finish_reason": reason, "logprobs": logprobs, "seed": row.ask.seed}


def _logprobs(row: Row, first: int, service: Service) -> dict[str, Any]:
    """Returns what is known of the text's tokens from some place on: the after model's log-probabilities, and our own beside.

    An offset is that of a token's first character in the completion.
    """
    ids, scores = row.text.token_ids, row.scores
    places = range(first, len(ids))
    return {
        "tokens": [decoded(service.decoder, [ids[place]]) for place in places],
        "token_logprobs": [finite(scores[place]["after_log_probability"]) for place in places],
        "top_logprobs": None,
        "text_offset": row.text.offsets[first:],
        "before_logprobs": [finite(scores[place]["before_log_probability"]) for place in places],
        "kl": [finite(scores[place]["kl"]) for place in places],
        "entropy": [finite(scores[place]["entropy"]) for place in places],
    }


def _usage(rows: Sequence[Row], asked: CompletionsRequest) -> dict[str, int]:
    """Counts each prompt once, and all tokens that were drawn for the answer, what ended a text too."""
    n_prompt = sum(len(row.ask.prompt_ids) for row in rows[:: asked.n or 1])
    n_drawn = sum(len(row.token_ids) for row in rows)
    return {"prompt_tokens": n_prompt, "completion_tokens": n_drawn, "total_tokens": n_prompt + n_drawn}
