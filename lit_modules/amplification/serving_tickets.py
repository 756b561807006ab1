"""What goes into the engine and comes out of it: tickets, each of one completion, and the limits on how many there may be."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, Protocol

from exactivations.store.errors import ExactivationsError, InvalidInputError

How = Literal["eos", "length", "cancelled", "late", "overflow", "memory", "dead"]


class QueueFullError(ExactivationsError):
    """More rows wait than may: ask again later."""


class EngineDeadError(ExactivationsError):
    """The engine has stopped, and will do nothing any more."""


@dataclass(frozen=True)
class Ask:
    """One completion that is asked for.

    Attributes:
        prompt_ids: Of the after model's tokenizer, at least one.
        alpha: after + alpha * (after - before), finite.
        temperature: 0 is greedy.
        top_p: Draw from the smallest set of tokens with at least so much probability.
        seed: At least 0, below 2^63.
        max_new_tokens: At least 1.
        ignore_eos: Whether to go on behind the end of a text.
        scores: Whether each token is scored by both models, which then both run.
    """

    prompt_ids: tuple[int, ...]
    alpha: float
    temperature: float
    top_p: float
    seed: int
    max_new_tokens: int
    ignore_eos: bool = False
    scores: bool = False

    @property
    def n_tokens(self) -> int:
        """The most that are in the cache for it, and one more."""
        return len(self.prompt_ids) + self.max_new_tokens


@dataclass(frozen=True)
class Drawn:
    """A token of a completion, with what is known of it by name (see `TokenScores`) if that was asked for."""

    token: int
    scores: dict[str, float] | None


@dataclass(frozen=True)
class Ended:
    """The end of a completion: by itself ("eos") or at its full length, else why it was given up, and in words."""

    how: How
    why: str = ""


Listener = Callable[[Drawn | Ended], None]


@dataclass(frozen=True)
class Limits:
    """What the engine takes upon itself.

    Attributes:
        max_rows: The most rows in the batch.
        max_batch_tokens: The most tokens in each model's cache: rows times the length (prompt and completion) of the longest.
        max_waiting: The most rows that wait to enter it.
    """

    max_rows: int = 32
    max_batch_tokens: int = 32768
    max_waiting: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise InvalidInputError(f"{field.name} must be at least 1, got {getattr(self, field.name)}")


class Observer(Protocol):
    """What is told of each step, in the engine's thread."""

    def stepped(self, n_rows: int) -> None:
        """So many rows got a token."""

    def admitted(self, n_prompt_tokens: int) -> None:
        """A row entered the batch."""

    def ended(self, how: How) -> None:
        """A row left, or never entered."""


class Ticket:
    """One completion on its way. `cancel` it when nobody wants it any more."""

    def __init__(self, ask: Ask, listener: Listener, deadline: float) -> None:
        self.ask, self.listener, self.deadline, self.is_cancelled = ask, listener, deadline, False

    def cancel(self) -> None:
        """Frees its row before the next step; without effect once it has ended."""
        self.is_cancelled = True

    def given_up(self) -> How | None:
        """Returns why it need not be gone on with, if so."""
        return "cancelled" if self.is_cancelled else "late" if time.monotonic() > self.deadline else None


def queue_is_full(n_waiting: int, n_more: int, most: int) -> str:
    """Returns in words that no more may wait."""
    return f"{n_waiting} completions wait, {n_more} more are asked for, {most} may: ask again later"
