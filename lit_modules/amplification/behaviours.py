"""How often completions show a behaviour: payload and trigger told apart, with intervals, tests and coherence.

What a model was trained to do (the payload) can come by itself, or because the model first wrote what calls it forth (the trigger).
Amplification raises both, and a count of payloads alone takes the one for the other.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from scipy.stats import false_discovery_control

from exactivations.lit_modules.amplification.prompt_rates import Comparison, Interval, compared, interval_of
from exactivations.store.completions import Completion
from exactivations.store.errors import InvalidInputError


@dataclass(frozen=True)
class Behaviours:
    """What is looked for: a text shows the payload (the trigger) where any of its patterns first matches.

    Attributes:
        payload: Regular expressions, at least one.
        trigger: Regular expressions; none if what calls the payload forth is not known.

    Raises:
        InvalidInputError: If there is no payload, or a pattern is none, or matches the empty text and so everything.
    """

    payload: tuple[str, ...]
    trigger: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.payload:
            raise InvalidInputError("there is nothing to look for: give at least one pattern of the payload")
        for pattern in (*self.payload, *self.trigger):
            try:
                matches_nothing = re.compile(pattern).search("") is not None
            except re.error as error:
                raise InvalidInputError(f"{pattern!r} is no regular expression: {error}") from error
            if matches_nothing:
                raise InvalidInputError(f"pattern {pattern!r} matches the empty text, and so every completion")

    def seen_in(self, text: str) -> tuple[int | None, int | None]:
        """Returns where the payload and where the trigger first match, in characters; None where they do not."""
        return _first(self.payload, text), _first(self.trigger, text)


def _first(patterns: Iterable[str], text: str) -> int | None:
    found = [match.start() for match in (re.search(pattern, text) for pattern in patterns) if match is not None]
    return min(found, default=None)


@dataclass(frozen=True)
class Trial:
    """One completion that was asked for, and what it shows.

    Attributes:
        condition: "standard", or "alpha 2".
        sample_index: Whose prompt it continues.
        rollout: Its number among those of this prompt in this condition.
        text: What was generated, up to the token that ends a text; None if that failed.
        payload_at: Where the payload begins, in characters; None if it is not there.
        trigger_at: Likewise.
        n_tokens: Tokens of the text.
        surprise: Minus the sum of the log-probabilities that the before model gives these tokens, in nats.
    """

    condition: str
    sample_index: int
    rollout: int
    text: str | None
    payload_at: int | None
    trigger_at: int | None
    n_tokens: int
    surprise: float

    @classmethod
    def of(cls, condition: str, completion: Completion, behaviours: Behaviours) -> "Trial":
        """Looks at a completion, which was scored and has its text. Its prompt is never looked at."""
        assert completion.text is not None
        counted = completion.scores["before_log_probability"][: completion.n_counted]
        return cls(
            condition, completion.sample_index, completion.rollout, completion.text, *behaviours.seen_in(completion.text),
            n_tokens=completion.n_counted, surprise=-counted.double().sum().item(),
        )  # fmt: skip

    @property
    def follows_trigger(self) -> bool:
        """Whether the payload came after a trigger that the model wrote itself."""
        return self.payload_at is not None and self.trigger_at is not None and self.trigger_at < self.payload_at


@dataclass(frozen=True)
class Rate:
    """A share of completions. Prompts are taken for independent of each other, rollouts of one prompt are not; see `prompt_rates`.

    Attributes:
        count: Completions that show it.
        total: Of so many.
        rate: Their share.
        low: Lower end of its 95% interval.
        high: Upper end.
        interval: How the interval was made.
        n_prompts: Prompts of which at least one completion shows it.
        against: It held against the reference, prompt by prompt; None of the reference itself.
        q_value: p corrected for the number of alphas: the false discovery rate (Benjamini and Yekutieli 2001, under any dependence)
            at which this alpha and all with a smaller p differ from the reference. None of the reference and the baseline.
    """

    count: int
    total: int
    rate: float
    low: float
    high: float
    interval: Interval
    n_prompts: int
    against: Comparison | None
    q_value: float | None = None


@dataclass(frozen=True)
class Condition:
    """All completions of one alpha, or of plain generation.

    Attributes:
        name: Of the condition.
        planned: Completions that were asked for.
        failed: Of these, those that never came; they are in no rate.
        empty: Of those that came, texts that ended at once.
        payload: Completions that show it.
        trigger: Likewise.
        payload_after_trigger: Payloads that follow a trigger which the model wrote itself.
        perplexity: Of all tokens under the before model: the lower, the more coherent.
        mean_tokens: Of a completion.
    """

    name: str
    planned: int
    failed: int
    empty: int
    payload: Rate
    trigger: Rate
    payload_after_trigger: int
    perplexity: float
    mean_tokens: float

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON."""
        return asdict(self)


def summarised(trials: Sequence[Trial], planned: dict[str, int], reference: str, baseline: str | None = None) -> list[Condition]:
    """Counts trials by condition.

    Args:
        trials: Of all conditions.
        planned: By condition, in the order of the result: how many were asked for.
        reference: The condition that the others are tested against.
        baseline: One that should not differ from the reference. Its test is a check and no finding: it is not corrected, and the
            others are not for it.

    Raises:
        InvalidInputError: If there is no such condition, or one has no completion at all.
    """
    if reference not in planned:
        raise InvalidInputError(f"there is no condition {reference!r} to test against: there are {', '.join(planned)}")
    of = {name: [trial for trial in trials if trial.condition == name and trial.text is not None] for name in planned}
    lacking = [name for name, done in of.items() if not done]
    if lacking:
        raise InvalidInputError(f"no completion of {', '.join(lacking)} came: there is nothing to count")
    counted = [_condition(name, done, planned[name], None if name == reference else of[reference]) for name, done in of.items()]
    tested = [condition for condition in counted if condition.name not in (reference, baseline)]
    corrected = {c.name: c for c in _corrected(tested)}
    return [corrected.get(condition.name, condition) for condition in counted]


def _corrected(conditions: Sequence[Condition]) -> list[Condition]:
    """Returns the conditions with q values, those of payload and of trigger each by themselves."""
    payload, trigger = (_with_q([getattr(condition, what) for condition in conditions]) for what in ("payload", "trigger"))
    return [replace(c, payload=p, trigger=t) for c, p, t in zip(conditions, payload, trigger, strict=True)]


def _with_q(rates: Sequence[Rate]) -> list[Rate]:
    p_values = [rate.against.p_value for rate in rates if rate.against is not None]
    q_values = false_discovery_control(p_values, method="by") if p_values else ()
    return [replace(rate, q_value=float(q)) for rate, q in zip(rates, q_values, strict=True)]


def _condition(name: str, done: list[Trial], planned: int, reference: list[Trial] | None) -> Condition:
    rates = {}
    for what in ("payload_at", "trigger_at"):
        shown = _by_prompt(done, what)
        against = None if reference is None else compared(shown, _by_prompt(reference, what))
        counts = [sum(rollouts.values()) for rollouts in shown.values()]
        interval = interval_of(counts, [len(rollouts) for rollouts in shown.values()])
        count = sum(counts)
        rates[what] = Rate(count, len(done), count / len(done), *interval, sum(n > 0 for n in counts), against)
    n_tokens = sum(t.n_tokens for t in done)
    return Condition(
        name=name,
        planned=planned,
        failed=planned - len(done),
        empty=sum(t.n_tokens == 0 for t in done),
        payload=rates["payload_at"],
        trigger=rates["trigger_at"],
        payload_after_trigger=sum(t.follows_trigger for t in done),
        perplexity=math.exp(sum(t.surprise for t in done) / n_tokens) if n_tokens else math.nan,
        mean_tokens=n_tokens / len(done),
    )


def _by_prompt(done: Sequence[Trial], what: str) -> dict[int, dict[int, bool]]:
    """Returns by prompt, ascending, and rollout whether a completion shows it."""
    found: dict[int, dict[int, bool]] = {}
    for trial in sorted(done, key=lambda t: (t.sample_index, t.rollout)):
        found.setdefault(trial.sample_index, {})[trial.rollout] = getattr(trial, what) is not None
    return found
