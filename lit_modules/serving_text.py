"""GrowingText: the text of a completion while its tokens come, of which nothing is given out that may still change."""

from collections.abc import Sequence

from exactivations.store.completions import Tokenizer

INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no character, or none yet


class GrowingText:
    """The text of tokens that come one by one. What `more` and `rest` return, one after the other, is the text.

    The text ends before the first EOS token, whether or not ids go on behind it, and before the first stop sequence: the one that
    is complete first, and of those that one token completes the one that begins first.

    Args:
        tokenizer: Makes texts of ids.
        eos_token_ids: What ends a text.
        stop: Sequences that end it too, none of them empty.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: frozenset[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._eos, self._stop = tokenizer, eos_token_ids, tuple(stop)
        self.token_ids: list[int] = []
        self.text = ""
        self.is_stopped = False
        self._is_over = False

    @property
    def needs_looking(self) -> bool:
        """Whether each token may be the last one, so that `more` must be called after each."""
        return bool(self._stop)

    def add(self, token: int) -> None:
        """Takes a token in."""
        self._is_over = self._is_over or token in self._eos
        if not self._is_over:
            self.token_ids.append(token)

    def more(self) -> str:
        """Returns what is certain since the last time: no half characters, nothing that may be the beginning of a stop sequence."""
        return self._new(self._decoded().rstrip(INCOMPLETE), is_all=False)

    def rest(self) -> str:
        """Returns what is left when no more tokens come."""
        return self._new(self._decoded(), is_all=True)

    def _new(self, text: str, is_all: bool) -> str:
        if self.is_stopped:
            return ""
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.is_stopped = self._is_over = True
            text = text[: min(found)]
        elif not is_all:
            text = text[: len(text) - self._n_held_back(text)]
        if not text.startswith(self.text):
            raise RuntimeError(f"the tokenizer's text of more tokens does not begin with that of fewer: {self.text!r}, {text!r}")
        new, self.text = text[len(self.text) :], text
        return new

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self.token_ids, skip_special_tokens=False))

    def _n_held_back(self, text: str) -> int:
        longest = max(map(len, self._stop), default=1)
        return next(
            (n for n in range(min(longest - 1, len(text)), 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop)), 0
        )
