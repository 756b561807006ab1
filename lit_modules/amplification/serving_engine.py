"""ServingEngine: one thread that owns two models and generates for everyone who asks, in one batch that rows enter and leave.

Between two steps, rows that wait are admitted (their prompts are read together, padded on the left, and their keys and values
joined to the running ones), and rows that ended, were cancelled or are late leave. What a row becomes depends on its own prompt,
alpha, sampling and seed, and on none of its neighbours.

Why the thread is our own: LitServe admits nothing into a batch that runs, takes no single row out of it, has no bounded queue that
would answer 429, and does not free what a client that has gone away no longer wants.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence

import torch

from exactivations.lit_modules.amplification.cached_model import checked_left_padding
from exactivations.lit_modules.amplification.decoding import Decoding, Prompts, Rows, Step
from exactivations.lit_modules.amplification.model_pair import ModelPair
from exactivations.lit_modules.amplification.row_sampling import RowSampling
from exactivations.lit_modules.amplification.serving_tickets import (
    Ask,
    Drawn,
    Ended,
    EngineDeadError,
    How,
    Limits,
    Listener,
    Observer,
    QueueFullError,
    Ticket,
    queue_is_full,
)
from exactivations.lit_modules.models.language_model import body_of
from exactivations.lit_modules.models.model_facts import length_dependent_rope
from exactivations.store.errors import InvalidInputError

OVERFLOW = "its largest logit is not finite: alpha is too large, or a model overflows in its dtype"
MEMORY = "the device has no memory left for it: the server has to be started with a lower --max-batch-tokens"


class ServingEngine:
    """Generates in its own thread from `start` to `close`; `submit` may be called from any.

    Args:
        pair: The models. Nobody else may run them meanwhile.
        limits: Bounds on what is in the batch and on what waits.
        observer: Told of each step.

    Raises:
        InvalidInputError: If a row would depend on its neighbours: rotary angles that change with the batch's longest row.
    """

    def __init__(self, pair: ModelPair, limits: Limits, observer: Observer) -> None:
        for name in ("before", "after"):
            if kinds := length_dependent_rope(body_of(getattr(pair, name))):
                raise InvalidInputError(
                    f"the {name} model's rotary embedding is {', '.join(sorted(kinds))}: its angles change with the longest row "
                    "of a batch, so that a text would depend on its neighbours: use `exactivations amplify` instead"
                )
        self.pair, self.limits, self._observer = pair, limits, observer
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._entering: list[Ticket] = []
        self._running: dict[int, Ticket] = {}
        self._decoding: Decoding | None = None
        self._error: BaseException | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="serving-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends all rows, and the thread when its step is done."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def n_waiting(self) -> int:
        """Rows that wait."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Rows in the batch."""
        return len(self._running)

    @property
    def trouble(self) -> str | None:
        """Why it does nothing any more; None while it does."""
        if self._error is not None:
            return f"the engine stopped: {type(self._error).__name__}: {self._error}"
        return "the server is closing" if self._is_closing else None

    def check(self, ask: Ask) -> None:
        """Refuses what can never be generated.

        Raises:
            InvalidInputError: Saying what is wrong with it.
        """
        if not ask.prompt_ids:
            raise InvalidInputError("the prompt has no tokens: nothing to continue")
        _rows([ask], [0])
        self.pair.check_ids(torch.tensor([ask.prompt_ids]), torch.tensor([0]))
        self.pair.check_length(ask.n_tokens - 1)
        if ask.n_tokens > self.limits.max_batch_tokens:
            raise InvalidInputError(
                f"prompt and completion are {ask.n_tokens} tokens, the batch holds {self.limits.max_batch_tokens}: "
                "lower max_new_tokens"
            )

    def submit(self, asks: Sequence[Ask], listeners: Sequence[Listener], seconds: float) -> list[Ticket]:
        """Queues completions, all or none. Does not wait.

        Args:
            asks: To which `check` said nothing.
            listeners: One for each, called in the engine's thread with each token and at last with its end. They must not fail.
            seconds: After which those that are not complete are given up.

        Raises:
            QueueFullError: If they would be more than may wait.
            EngineDeadError: If the engine has stopped.
        """
        deadline = time.monotonic() + seconds
        tickets = [Ticket(ask, listener, deadline) for ask, listener in zip(asks, listeners, strict=True)]
        with self._changed:
            if self.trouble is not None:
                raise EngineDeadError(self.trouble)
            if len(self._waiting) + len(tickets) > self.limits.max_waiting:
                raise QueueFullError(queue_is_full(len(self._waiting), len(tickets), self.limits.max_waiting))
            self._waiting += tickets
            self._changed.notify()
        return tickets

    def _run(self) -> None:
        try:
            while self._has_work():
                if not self._advance():
                    self._end_batch("memory", MEMORY)
        except BaseException as error:  # told to everyone who waits, and by `trouble` to all who come
            self._error = error
        finally:
            with self._changed:
                self._is_closing = True
                self._entering += self._waiting
                self._waiting.clear()
            self._end_batch("dead", str(self.trouble))

    def _has_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._waiting or self._running)
            return not self._is_closing

    def _advance(self) -> bool:
        """Frees, admits and steps; returns False if the memory did not suffice, after which the batch is in no state to go on."""
        try:
            self._free()
            self._admit()
            if self._decoding is not None:
                self._step(self._decoding)
        except torch.OutOfMemoryError:
            return False
        return True

    def _free(self) -> None:
        """Gives up what nobody wants any more, and what is late: in the batch and in the queue."""
        leaving = {row: how for row, ticket in self._running.items() if (how := ticket.given_up())}
        self._leave(leaving)
        with self._changed:
            given_up = [(ticket, how) for ticket in self._waiting if (how := ticket.given_up())]
            for ticket, _ in given_up:
                self._waiting.remove(ticket)
        for ticket, how in given_up:
            self._end(ticket, how)

    def _admit(self) -> None:
        """Takes the first ones that wait into the batch, as many as fit."""
        with self._changed:
            self._entering = [self._waiting.popleft() for _ in range(self._n_fitting())]
        if not self._entering:
            return
        read = self._read_prompts(self._entering)
        if read is None:  # the batch itself is as it was
            entering, self._entering = self._entering, []
            for ticket in entering:
                self._end(ticket, "memory", MEMORY)
            return
        for admitted, tickets in read:
            numbers = admitted.living
            if self._decoding is None:
                self._decoding = admitted
            else:
                numbers = self._decoding.join(admitted)
            self._running |= dict(zip(numbers.tolist(), tickets, strict=True))
        for ticket in self._entering:
            self._observer.admitted(len(ticket.ask.prompt_ids))
        self._entering = []

    def _read_prompts(self, entering: Sequence[Ticket]) -> list[tuple[Decoding, list[Ticket]]] | None:
        """Returns tickets as rows that can join the batch, those with scores apart; None if the memory does not suffice.

        The prompts' own keys and values end here: what joins the batch are copies.
        """
        distinct = list(dict.fromkeys(ticket.ask.prompt_ids for ticket in entering))
        read = []
        try:
            prompts = _padded(self.pair, distinct)
            for scores in (False, True):
                of_kind = [ticket for ticket in entering if ticket.ask.scores is scores]
                if of_kind:
                    rows = _rows([t.ask for t in of_kind], [distinct.index(t.ask.prompt_ids) for t in of_kind])
                    # Whether a text's end ends its row is the row's own affair.
                    read.append((Decoding(prompts, rows, eos_token_ids=frozenset(), scores=scores), of_kind))
        except torch.OutOfMemoryError:
            return None
        return read

    def _n_fitting(self) -> int:
        """Returns how many of those that wait fit into the batch, to their end. None overtakes another."""
        n_rows = len(self._running)
        longest = max((ticket.ask.n_tokens for ticket in self._running.values()), default=0)
        for place, ticket in enumerate(self._waiting):
            n_rows, longest = n_rows + 1, max(longest, ticket.ask.n_tokens)
            if n_rows > self.limits.max_rows or n_rows * longest > self.limits.max_batch_tokens:
                return place
        return len(self._waiting)

    def _step(self, decoding: Decoding) -> None:
        try:
            step = decoding.step()
        except InvalidInputError:
            overflowed = decoding.overflowed().tolist()
            if not overflowed:
                raise
            self._leave(dict.fromkeys(overflowed, "overflow"), OVERFLOW)
            return
        self._observer.stepped(len(step.row))
        leaving: dict[int, How] = {}
        for row, drawn, is_complete in zip(step.row.tolist(), _drawn(step, self._running), step.complete.tolist(), strict=True):
            ticket = self._running[row]
            ticket.listener(drawn)
            if drawn.token in self.pair.eos_token_ids and not ticket.ask.ignore_eos:
                leaving[row] = "eos"
            elif is_complete:
                leaving[row] = "length"
        self._leave(leaving)

    def _leave(self, leaving: dict[int, How], why: str = "") -> None:
        """Takes rows out of the batch."""
        if not leaving:
            return
        assert self._decoding is not None
        self._decoding.drop(torch.tensor(list(leaving)))
        if not len(self._decoding.living):
            self._decoding = None
        for row, how in leaving.items():
            self._end(self._running.pop(row), how, why)

    def _end_batch(self, how: How, why: str) -> None:
        """Ends all that is in the batch, and what is about to enter it."""
        left = list(dict.fromkeys([*self._running.values(), *self._entering]))
        self._running, self._entering, self._decoding = {}, [], None
        for ticket in left:
            self._end(ticket, how, why)

    def _end(self, ticket: Ticket, how: How, why: str = "") -> None:
        self._observer.ended(how)
        ticket.listener(Ended(how, why))


def _drawn(step: Step, running: dict[int, Ticket]) -> list[Drawn]:
    """Returns a step's tokens, each with its scores if its row has them."""
    known = {} if step.scores is None else {name: iter(values.tolist()) for name, values in vars(step.scores).items()}
    return [
        Drawn(token, {name: next(values) for name, values in known.items()} if running[row].ask.scores else None)
        for row, token in zip(step.row.tolist(), step.token.tolist(), strict=True)
    ]


def _padded(pair: ModelPair, prompts: Sequence[tuple[int, ...]]) -> Prompts:
    """Returns prompts as one batch, with padding on the left if their lengths differ."""
    longest = max(map(len, prompts))
    ids = torch.tensor([(0,) * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.arange(longest) >= longest - torch.tensor([len(prompt) for prompt in prompts])[:, None]
    return Prompts(pair, ids, None if mask.all() else checked_left_padding(mask))


def _rows(asks: Sequence[Ask], prompt: Sequence[int]) -> Rows:
    alpha, temperature, top_p = (
        torch.tensor([getattr(ask, name) for ask in asks], dtype=torch.float64) for name in ("alpha", "temperature", "top_p")
    )
    sampling = RowSampling(temperature, top_p, torch.tensor([ask.seed for ask in asks]))
    return Rows(torch.tensor(prompt), alpha, sampling, torch.tensor([ask.max_new_tokens for ask in asks]))
