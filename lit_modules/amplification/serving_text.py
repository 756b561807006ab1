"""GrowingText: the text of a completion while its tokens come, of which nothing is given out that may still change."""

from collections.abc import Sequence

from exactivations.store.completions import Tokenizer, decoded

INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no character, or none yet
CHARACTER = 4  # bytes of the longest character, and so the most tokens that one is of
BROKEN = 16  # tokens without a whole character after which those in front are taken for broken


class GrowingText:
    """The text of tokens that come one by one. What `more` and `rest` return, one after the other, is the text.

    The text ends before the first EOS token, whether or not ids go on behind it, and before the first stop sequence: the one that
    is complete first, and of those that one token completes the one that begins first.

    A token is decoded with those in front of it that its text can depend on, and not with all. What was given out once stays, where
    a decoder would take it back (SentencePiece's, of bytes that are no characters).

    Args:
        tokenizer: Makes texts of ids.
        eos_token_ids: What ends a text.
        stop: Sequences that end it too, none of them empty.

    Attributes:
        token_ids: Before the one that ends the text.
        offsets: For each of them the length of the text that was certain when it came: where its first character is, if `more` was
            called after each token.
        text: What was given out.
        is_stopped: Whether a stop sequence has ended it.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: frozenset[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._eos, self._stop = tokenizer, eos_token_ids, tuple(stop)
        self.token_ids: list[int] = []
        self.offsets: list[int] = []
        self.text = ""
        self.is_stopped = False
        self._is_over = False
        self._held_back = ""
        self._first = self._settled = 0  # places in token_ids: what is decoded still, and what of it is there for its sake only
        self._n_taken = 0  # characters of what is decoded still that were taken already

    @property
    def needs_looking(self) -> bool:
        """Whether each token may be the last one, so that `more` must be called after each."""
        return bool(self._stop)

    def add(self, token: int) -> None:
        """Takes a token in."""
        self._is_over = self._is_over or token in self._eos
        if not self._is_over:
            self.token_ids.append(token)
            self.offsets.append(len(self.text) + len(self._held_back))

    def more(self) -> str:
        """Returns what is certain since the last time: no half characters, nothing that may be the beginning of a stop sequence."""
        window = self._decoded(self._first)
        n_certain = len(window.rstrip(INCOMPLETE))
        end, n_settled = self._settling(window)
        taken = window[self._n_taken : max(n_certain, n_settled)]
        self._n_taken = max(self._n_taken, n_certain, n_settled)
        if end > self._settled:
            self._first, self._settled = self._settled, end
            self._n_taken += len(self._decoded(self._first, end)) - n_settled
        return self._new(taken, is_all=False)

    def rest(self) -> str:
        """Returns what is left when no more tokens come."""
        return self._new(self._decoded(self._first)[self._n_taken :], is_all=True)

    def _settling(self, window: str) -> tuple[int, int]:
        """Returns up to which token the text is settled, and its length in the window: no later token will change it."""
        n_tokens = len(self.token_ids)
        if not window.endswith(INCOMPLETE):
            return (n_tokens, len(window)) if len(window) > self._n_taken else (self._settled, 0)
        if n_tokens - self._settled > BROKEN:
            end = n_tokens - CHARACTER
            broken = self._decoded(self._first, end)
            if broken + self._decoded(end) == window:  # no character lies across
                return end, len(broken)
        return self._settled, 0

    def _new(self, taken: str, is_all: bool) -> str:
        if self.is_stopped:
            return ""
        pending = self._held_back + taken
        found = [place for place in (pending.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.is_stopped = self._is_over = True
            new, self._held_back = pending[: min(found)], ""
        else:
            n_new = len(pending) - (0 if is_all else self._n_beginning(pending))
            new, self._held_back = pending[:n_new], pending[n_new:]
        self.text += new
        return new

    def _decoded(self, first: int, end: int | None = None) -> str:
        return decoded(self._tokenizer, self.token_ids[first:end])

    def _n_beginning(self, text: str) -> int:
        """Returns how much at its end may be the beginning of a stop sequence."""
        longest = max(map(len, self._stop), default=1)
        return next(
            (n for n in range(min(longest - 1, len(text)), 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop)), 0
        )
