"""Which tokens of a forward pass are steered: right with a cache, with padding on either side, and in generation."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from exactivations.store.errors import InvalidInputError, shown


@dataclass(frozen=True)
class Generated:
    """The tokens that were generated: those in columns from `prompt_length` on.

    The first of them is *drawn* from the state of the prompt's last token, which is not steered; steered is how it is read, and so
    everything from the second one on.

    Attributes:
        prompt_length: P, of the prompts int64 [B, P], padding counted: `input_ids.shape[1]`.
    """

    prompt_length: int

    def __post_init__(self) -> None:
        if isinstance(self.prompt_length, bool) or not isinstance(self.prompt_length, int) or self.prompt_length < 1:
            raise InvalidInputError(
                f"Generated: prompt_length must be a number of tokens, 1 or more, got {shown(self.prompt_length)} "
                "(input_ids.shape[1])"
            )


Positions = Literal["all"] | slice | Generated | Tensor
"""Which tokens are steered. Padding (attention mask 0) never is.

- `"all"`: every token.
- `slice(a, b)`: the tokens a to b - 1 of each sample, counted from its first one, wherever padding is; either may be None, and
  tokens that are generated are counted on. So a sample is steered in a batch as it is alone.
- `Generated(prompt_length)`: those that were generated.
- bool [B, P], True for each token of the prompts [B, P] that is steered; what is generated is not. It marks no padding. A pass must
  have B rows: for several beams or sequences of a prompt, repeat its rows as `generate` does (`mask.repeat_interleave(n, 0)`).
"""


def check_positions(positions: Positions) -> None:
    """Refuses what is none of `Positions`.

    Raises:
        InvalidInputError: Saying what was expected.
    """
    if isinstance(positions, Generated) or (isinstance(positions, str) and positions == "all"):
        return
    if isinstance(positions, slice):
        start, stop = positions.start or 0, positions.stop
        ends = [end for end in (positions.start, stop) if end is not None]
        plain = all(isinstance(end, int) and not isinstance(end, bool) and end >= 0 for end in ends) and positions.step in (None, 1)
        if not plain or (stop is not None and start >= stop):
            raise InvalidInputError(
                f"positions {positions} must count forwards from a sample's first token, and hold one at least (where a growing "
                "sample ends is not known: mark tokens at a prompt's end by a bool mask [B, P])"
            )
        return
    if isinstance(positions, Tensor) and positions.dtype == torch.bool and positions.ndim == 2 and positions.numel():
        return
    found = f"{positions.dtype} {list(positions.shape)}" if isinstance(positions, Tensor) else shown(positions)
    raise InvalidInputError(f"positions must be 'all', a slice, Generated(prompt_length) or a bool tensor [B, P], got {found}")


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass reads.

    Attributes:
        n_rows, n_columns: B and L, of the tokens that it reads.
        n_before: How many columns a cache holds from before; None if the cache does not tell.
        attention: bool [B, n_before + L], False for padding ([B, L] at least if n_before is None); None if there is none.
        device: Of the tokens.
    """

    n_rows: int
    n_columns: int
    n_before: int | None
    attention: Tensor | None
    device: torch.device

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "ForwardPass":
        """Reads it off the arguments of a model's forward.

        Raises:
            InvalidInputError: If there are no tokens among them, or the attention mask does not say which of them are padding.
        """
        named = _by_name(module, args, kwargs)
        tokens = named.get("input_ids") if named.get("input_ids") is not None else named.get("inputs_embeds")
        if not isinstance(tokens, Tensor) or tokens.ndim < 2:
            found = "none" if tokens is None else shown(getattr(tokens, "shape", tokens))
            raise InvalidInputError(f"steering needs input_ids [B, L] or inputs_embeds [B, L, D] in each forward pass, got {found}")
        (n_rows, n_columns), n_before = tokens.shape[:2], _n_before(named)
        attention = named.get("attention_mask")
        if attention is not None:
            fits = isinstance(attention, Tensor) and attention.ndim == 2 and len(attention) == n_rows
            width = attention.shape[1] if fits else 0
            if not fits or (width < n_columns if n_before is None else width != n_before + n_columns):
                found = str(list(attention.shape)) if isinstance(attention, Tensor) else type(attention).__name__
                raise InvalidInputError(
                    f"steering: attention_mask must be [{n_rows}, {n_columns + (n_before or 0)}], 1 for tokens and 0 for padding, "
                    f"so that padding is known; it is {found} (a static cache makes such ones: generate with the default cache)"
                )
            attention = attention.detach() != 0
        return cls(n_rows, n_columns, n_before, attention, tokens.device)

    def marked(self, positions: Positions) -> Tensor:
        """Returns which of its tokens are steered, bool [B, L].

        Raises:
            InvalidInputError: If that cannot be known, or a mask does not fit.
        """
        real = torch.ones(self.n_rows, self.n_columns, dtype=torch.bool, device=self.device)
        if self.attention is not None:
            real = self.attention[:, -self.n_columns :].to(self.device)
        if isinstance(positions, str):
            return real
        if self.n_before is None:
            raise InvalidInputError(
                "steering: how many tokens came before this pass is not known, since the model's cache does not tell: steer 'all' "
                "positions, or run it without a cache (use_cache=False)"
            )
        if isinstance(positions, slice):
            place = self._places(self.n_before)
            inside = place >= (positions.start or 0)
            return real & (inside if positions.stop is None else inside & (place < positions.stop))
        width = positions.prompt_length if isinstance(positions, Generated) else positions.shape[1]
        end = self.n_before + self.n_columns
        if end < width:
            raise InvalidInputError(
                f"steering: positions are of prompts of {width} tokens (padding counted), and this forward pass ends after {end}: "
                "give the prompts' own width, and let the model read them in one pass"
            )
        if isinstance(positions, Generated):
            column = torch.arange(self.n_before, end, device=self.device)
            return real & (column >= width)
        return self._by_mask(positions, real, self.n_before)

    def _places(self, n_before: int) -> Tensor:
        """Returns the place of each token in its sample, padding not counted, int64 [B, L] or [1, L]."""
        if self.attention is None:
            return torch.arange(n_before, n_before + self.n_columns, device=self.device)[None]
        return (self.attention.long().cumsum(dim=1) - 1)[:, -self.n_columns :].to(self.device)

    def _by_mask(self, mask: Tensor, real: Tensor, n_before: int) -> Tensor:
        if len(mask) != self.n_rows:
            raise InvalidInputError(
                f"steering: positions mark {len(mask)} rows, this forward pass has {self.n_rows}: a mask is [B, P] of these very "
                "rows (for several sequences of a prompt: mask.repeat_interleave(n, 0))"
            )
        marked = torch.zeros_like(real)
        inside = mask[:, n_before : n_before + self.n_columns].to(self.device)
        marked[:, : inside.shape[1]] = inside
        padding = marked & ~real
        if inside.shape[1] and self.attention is not None and padding.any():  # else nothing can be padding, and nobody waits
            row, column = padding.nonzero()[0].tolist()
            raise InvalidInputError(
                f"steering: positions mark column {n_before + column} of row {row}, which is padding: the mask is of other "
                "prompts, or of ones padded on the other side"
            )
        return marked


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a module's forward by name."""
    names = [
        name
        for name, p in inspect.signature(module.forward).parameters.items()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _n_before(named: Mapping[str, Any]) -> int | None:
    """Returns how many columns the cache holds; None if it does not tell."""
    cache = named.get("past_key_values")
    cache = named.get("cache_params") if cache is None else cache
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # none at all, or a state of all that came before, as Mamba's
        return None
