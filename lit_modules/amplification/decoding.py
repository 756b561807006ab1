"""The decoding loop: several completions of each prompt, of two models at once, each row by its own alpha, sampling and length.

Each model reads the prompts once; its keys and values are then repeated for all rows of a prompt. A model runs those rows only that
need it. A row that has finished, or is dropped, leaves the computation; rows of another decoding may join between two steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from exactivations.lit_modules.amplification.cached_model import CachedModel, checked_left_padding
from exactivations.lit_modules.amplification.logit_difference import logit_difference
from exactivations.lit_modules.amplification.model_pair import ModelPair, restricted
from exactivations.lit_modules.amplification.row_sampling import RowSampling
from exactivations.store.errors import InvalidInputError

Finished = Literal["eos", "length"]
WITHOUT = {"before": 0.0, "after": -1.0}
"""The alpha at which a model is not needed."""


@dataclass(frozen=True)
class Rows:
    """What is to be generated: R rows, all on the host.

    Attributes:
        prompt: int64 [R], which row of the prompts each continues.
        alpha: float64 [R], finite.
        sampling: Temperature, top-p and seed of each.
        max_new_tokens: int64 [R], at least 1.

    Raises:
        InvalidInputError: Naming the row and what is wrong with it.
    """

    prompt: Int64[Tensor, " r"]
    alpha: Float64[Tensor, " r"]
    sampling: RowSampling
    max_new_tokens: Int64[Tensor, " r"]

    def __post_init__(self) -> None:
        lengths = {len(self.prompt), len(self.alpha), len(self.sampling.seed), len(self.max_new_tokens)}
        if len(lengths) > 1 or lengths == {0}:
            raise InvalidInputError(f"all that is said of rows must be of equally many, at least one, got {sorted(lengths)}")
        wrong = (~self.alpha.isfinite() | (self.max_new_tokens < 1)).nonzero()[:, 0].tolist()
        if wrong:
            raise InvalidInputError(
                f"row {wrong[0]}: alpha is {self.alpha[wrong[0]].item()} and max_new_tokens {int(self.max_new_tokens[wrong[0]])}; "
                "expected a finite alpha and at least one token"
            )

    def select(self, rows: Tensor) -> "Rows":
        """Returns some of them, given as int64 indices or a bool mask."""
        return Rows(self.prompt[rows], self.alpha[rows], self.sampling.select(rows), self.max_new_tokens[rows])

    def joined(self, other: "Rows") -> "Rows":
        """Returns these and the others; `prompt` still counts each one's own prompts."""
        sampling = {f.name: torch.cat([getattr(rows.sampling, f.name) for rows in (self, other)]) for f in fields(RowSampling)}
        return Rows(
            torch.cat([self.prompt, other.prompt]),
            torch.cat([self.alpha, other.alpha]),
            RowSampling(**sampling),
            torch.cat([self.max_new_tokens, other.max_new_tokens]),
        )


@dataclass(frozen=True)
class TokenScores:
    """What is known of each generated token, float64 [T]. All distributions are over the ids that both models share.

    Attributes:
        after_log_probability: Of the token, by the after model, at temperature 1.
        before_log_probability: Of the token, by the before model, likewise.
        kl: KL(after || before) of the two models' predictions where the token stands, in nats.
        entropy: Of the distribution that the token was drawn from: amplified, at its temperature, within top-p. In nats.
    """

    after_log_probability: Tensor
    before_log_probability: Tensor
    kl: Tensor
    entropy: Tensor

    @classmethod
    def joined(cls, parts: Sequence["TokenScores"]) -> "TokenScores":
        """Makes those of all parts' tokens, one part after the other."""
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})

    def select(self, tokens: Tensor) -> "TokenScores":
        """Returns those of some tokens, given as int64 indices."""
        return TokenScores(**{field.name: getattr(self, field.name)[tokens] for field in fields(self)})


@dataclass(frozen=True)
class Generated:
    """Completions of R rows, T tokens together, on the host: only what was generated, never the prompt.

    Attributes:
        n_tokens: int64 [R].
        token_ids: int64 [T], row after row; a row that ended by itself has its EOS token as the last one.
        finished: What ended each row: "eos", or "length".
        scores: If they were asked for.
    """

    n_tokens: Tensor
    token_ids: Tensor
    finished: tuple[Finished, ...]
    scores: TokenScores | None


@dataclass(frozen=True)
class Step:
    """What one step gave, on the host: for each row that was still there its number and its token, and if that was its last one.

    Attributes:
        row: int64 [b].
        token: int64 [b].
        ended: bool [b], the token was an EOS token.
        complete: bool [b], the row is finished.
        scores: float64 [s] each, of the rows that are scored; None if none is.
    """

    row: Tensor
    token: Tensor
    ended: Tensor
    complete: Tensor
    scores: TokenScores | None


class Prompts:
    """Prompts, which each model that is needed reads once, whatever is generated of them.

    Args:
        pair: The models.
        input_ids: int64 [B, L] on the host.
        attention_mask: [B, L] for prompts that are padded on the left; None if none is.

    Attributes:
        n_tokens: int64 [B], of each prompt, padding not counted.

    Raises:
        InvalidInputError: If models and prompts do not fit each other.
    """

    def __init__(self, pair: ModelPair, input_ids: Int64[Tensor, "b l"], attention_mask: Tensor | None = None) -> None:
        mask = None if attention_mask is None else checked_left_padding(attention_mask.cpu())
        if mask is not None:
            input_ids = torch.where(mask, input_ids, input_ids[:, -1:])  # any id will do, and what pads may not be shared
        pair.check_ids(input_ids, torch.arange(len(input_ids)))
        self.pair, self.input_ids, self._mask = pair, input_ids, mask
        self.n_tokens = torch.full((len(input_ids),), input_ids.shape[1]) if mask is None else mask.sum(dim=1)
        self._read: dict[str, tuple[CachedModel, Tensor]] = {}

    @torch.no_grad()
    def read(self, name: str) -> tuple[CachedModel, Tensor]:
        """Returns the "after" or the "before" model with the prompts read, and the logits [B, C] of what follows them."""
        if name not in self._read:
            model = CachedModel(getattr(self.pair, name))
            device = self.pair.after.device
            logits = model.read(self.input_ids.to(device), None if self._mask is None else self._mask.to(device))
            self._read[name] = model, restricted(logits, self.pair.common)
        return self._read[name]


class Decoding:
    """Rows on their way, a token each with every `step`.

    Args:
        prompts: What is continued; several of these may continue the same.
        rows: What is to be generated.
        eos_token_ids: What ends a row; empty lets all run to their max_new_tokens.
        scores: Whether tokens are scored. Both models then run all of these rows; else each only those that need it.

    Attributes:
        living: int64 [b], the numbers of the rows that are not finished: 0 to R - 1, and on from there for those that join.

    Raises:
        InvalidInputError: If rows and prompts do not fit each other.
    """

    def __init__(self, prompts: Prompts, rows: Rows, *, eos_token_ids: frozenset[int], scores: bool = False) -> None:
        n_prompts, n_rows = len(prompts.input_ids), len(rows.prompt)
        if not 0 <= int(rows.prompt.min()) <= int(rows.prompt.max()) < n_prompts:
            raise InvalidInputError(f"rows continue prompts {sorted(set(rows.prompt.tolist()))}, there are {n_prompts}")
        prompts.pair.check_length(int((prompts.n_tokens[rows.prompt] + rows.max_new_tokens).max()) - 1)
        self.living = torch.arange(n_rows)
        self._n_numbers, self._pair, self._rows = n_rows, prompts.pair, rows
        self._scored, self._n_drawn = torch.full((n_rows,), scores), torch.zeros(n_rows, dtype=torch.int64)
        self._unread: Tensor | None = None
        self._eos = torch.tensor(sorted(eos_token_ids), dtype=torch.int64)
        self._models: dict[str, CachedModel] = {}
        self._logits: dict[str, Tensor] = {}
        for name in WITHOUT:
            needed = self._needing(name)
            if needed.any():
                prompt = rows.prompt[needed].to(prompts.pair.after.device)
                model, logits = prompts.read(name)
                self._models[name], self._logits[name] = model.fork(prompt), logits[prompt]

    @torch.no_grad()
    def step(self) -> Step:
        """Reads what was drawn last, and draws a token for each living row. Waits for the device.

        Raises:
            InvalidInputError: If a model's logits overflow: `overflowed` tells in which rows. Nothing was drawn then.
        """
        assert len(self.living), "all rows are finished"
        self._read()
        distribution = self._rows.sampling.distribution(self._amplified().double())
        n_drawn = self._n_drawn.to(distribution.device)
        drawn = self._rows.sampling.draw(distribution, n_drawn)
        token = drawn.cpu()
        self._n_drawn = self._n_drawn + 1
        ended = torch.isin(token, self._eos)
        complete = ended | (self._rows.max_new_tokens == self._n_drawn)
        scores = None
        if self._scored.any():
            scored = self._scored.to(drawn.device)
            before, after = (self._spread(name)[scored].double() for name in WITHOUT)
            scores = token_scores(before=before, after=after, distribution=distribution[scored], token=drawn[scored])
        step = Step(self.living, token, ended, complete, scores)
        self._unread = token
        self._keep(~complete)
        return step

    def join(self, other: "Decoding") -> Int64[Tensor, " r"]:
        """Takes over the rows of another decoding of these models, which is used up, and returns their numbers here.

        They go on at their own step, seed and length; prompts of other lengths are padded on the left.
        """
        assert len(self.living) and len(other.living) and other._pair is self._pair and torch.equal(other._eos, self._eos)
        self._read()
        other._read()
        numbers = other.living + self._n_numbers
        self._n_numbers += other._n_numbers
        self.living = torch.cat([self.living, numbers])
        self._rows = self._rows.joined(other._rows)
        self._scored = torch.cat([self._scored, other._scored])
        self._n_drawn = torch.cat([self._n_drawn, other._n_drawn])
        for name, model in other._models.items():
            if name in self._models:
                self._models[name].join(model)
                self._logits[name] = torch.cat([self._logits[name], other._logits[name]])
            else:
                self._models[name], self._logits[name] = model, other._logits[name]
        return numbers

    def drop(self, rows: Int64[Tensor, " r"]) -> None:
        """Ends rows, given by their numbers: they leave before the next step. Those that are finished already do nothing."""
        self._keep(~torch.isin(self.living, rows))

    @torch.no_grad()
    def overflowed(self) -> Int64[Tensor, " r"]:
        """Returns the numbers of the rows whose largest logit is not finite, from which nothing can be drawn."""
        self._read()
        return self.living[~self._amplified().amax(dim=1).isfinite().cpu()]

    def _needing(self, name: str) -> Tensor:
        """Returns which living rows need a model, bool [b]: it has read these, and no others."""
        return self._scored | (self._rows.alpha != WITHOUT[name])

    def _read(self) -> None:
        if self._unread is not None:
            for name, model in self._models.items():
                following = self._unread[self._needing(name), None].to(model.model.device)
                self._logits[name] = restricted(model.read(following), self._pair.common)
            self._unread = None

    def _amplified(self) -> Tensor:
        if len(self._logits) == 1:  # all rows have the alpha that is this one model
            return next(iter(self._logits.values()))
        before, after = (self._spread(name) for name in WITHOUT)
        return logit_difference(before=before, after=after, alpha=self._rows.alpha.to(after.device))

    def _spread(self, name: str) -> Tensor:
        """Returns a model's logits [b, C]; zeros for rows that do not need it, whose alpha leaves these out."""
        needed, logits = self._needing(name), self._logits[name]
        if needed.all():
            return logits
        spread = logits.new_zeros(len(needed), logits.shape[1])
        spread[needed.to(logits.device)] = logits
        return spread

    def _keep(self, kept: Tensor) -> None:
        if kept.all():
            return
        for name in list(self._models):
            of_model = kept[self._needing(name)]
            if not of_model.any():
                del self._models[name], self._logits[name]
            elif not of_model.all():
                rows = of_model.nonzero()[:, 0].to(self._pair.after.device)
                self._models[name].select(rows)
                self._logits[name] = self._logits[name][rows]
        self.living, self._scored, self._n_drawn = self.living[kept], self._scored[kept], self._n_drawn[kept]
        self._unread = None if self._unread is None else self._unread[kept]
        if len(self.living):
            self._rows = self._rows.select(kept)


def token_scores(
    *,
    before: Float64[Tensor, "b v"],
    after: Float64[Tensor, "b v"],
    distribution: Float64[Tensor, "b v"],
    token: Int64[Tensor, " b"],
) -> TokenScores:
    """Returns what is known of tokens, on the host, from both models' logits and those of what they were drawn from."""
    before, after, drawn_from = (logits.log_softmax(dim=1) for logits in (before, after, distribution))
    return TokenScores(
        after_log_probability=after.gather(1, token[:, None])[:, 0].cpu(),
        before_log_probability=before.gather(1, token[:, None])[:, 0].cpu(),
        kl=_expectation(after, after - before).cpu(),
        entropy=_expectation(drawn_from, -drawn_from).cpu(),
    )


def generate_in_parts(
    prompts: Prompts, rows: Rows, max_rows: int, *, eos_token_ids: frozenset[int], scores: bool = False
) -> Generated:
    """Generates rows, not more than max_rows at a time, which bounds the memory for keys and values; see `Decoding`."""
    parts = [rows.select(part) for part in torch.split(torch.arange(len(rows.prompt)), max_rows)]
    done = [generate(Decoding(prompts, part, eos_token_ids=eos_token_ids, scores=scores)) for part in parts]
    scored = [part.scores for part in done if part.scores is not None]
    return Generated(
        n_tokens=torch.cat([part.n_tokens for part in done]),
        token_ids=torch.cat([part.token_ids for part in done]),
        finished=tuple(how for part in done for how in part.finished),
        scores=TokenScores.joined(scored) if scored else None,
    )


def generate(decoding: Decoding) -> Generated:
    """Steps until all rows are finished, and returns what they became, in the order in which they were given."""
    n_rows, steps = len(decoding.living), []
    while len(decoding.living):
        steps.append(decoding.step())
    row = torch.cat([step.row for step in steps])
    order = row.argsort(stable=True)
    ended = torch.zeros(n_rows, dtype=torch.bool)
    ended[row[torch.cat([step.ended for step in steps])]] = True
    scores = [step.scores for step in steps if step.scores is not None]
    return Generated(
        n_tokens=row.bincount(minlength=n_rows),
        token_ids=torch.cat([step.token for step in steps])[order],
        finished=tuple("eos" if by_itself else "length" for by_itself in ended.tolist()),
        scores=TokenScores.joined(scores).select(order) if scores else None,
    )


def _expectation(log_probabilities: Tensor, values: Tensor) -> Tensor:
    """Returns the mean [B] of values [B, V], those without probability left out (they may be infinite)."""
    return torch.where(log_probabilities.isneginf(), 0.0, log_probabilities.exp() * values).sum(dim=1)
