"""The rows of a request while they grow in the engine: their text as it comes, and freeing them when nobody waits for them."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Literal, TypeVar

from starlette.requests import Request

from exactivations.lit_modules.amplification.serving_engine import ServingEngine
from exactivations.lit_modules.amplification.serving_text import GrowingText
from exactivations.lit_modules.amplification.serving_tickets import Ask, Drawn, Ended, EngineDeadError, How, QueueFullError

RETRY_SECONDS = 1
STATUS: dict[str, int] = {"cancelled": 499, "late": 504, "overflow": 422, "memory": 503, "dead": 503}
"""499 is nginx's for a client that has gone: nobody reads it, but it is counted."""

WORDS = {"late": "the deadline passed before it was complete", "cancelled": "the client has gone"}
T = TypeVar("T")


class ServeError(Exception):
    """An answer that is none."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


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
        try:
            return await while_wanted(request, asyncio.create_task(self._all()))
        finally:
            self.close()

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


async def while_wanted(request: Request, work: asyncio.Future[T], seconds: float | None = None) -> T:
    """Returns what comes of some work; cancels it when nobody waits for it any more.

    Args:
        request: Whose client is waited for. Its body has been read.
        work: What is done for it.
        seconds: After which it is given up. Default: never.

    Raises:
        ServeError: If the client has gone, or the time is over.
    """
    gone = asyncio.create_task(_gone(request))
    try:
        either: set[asyncio.Future[Any]] = {gone, work}
        done, _ = await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if work in done:
            return work.result()
        how: How = "cancelled" if gone in done else "late"
        raise ServeError(STATUS[how], WORDS[how])
    finally:
        gone.cancel()
        work.cancel()


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _in_words(event: Ended) -> str:
    return event.why or WORDS[event.how]
