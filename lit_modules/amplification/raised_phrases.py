"""Which tokens and phrases amplification raises, when one does not know what to look for.

A phrase is some tokens in a row. It is compared between the completions of the same prompts at two alphas: in how many prompts
more of the rollouts hold it, and in how many fewer. Were alpha without effect, one would be as likely as the other, so that the
exact sign test holds, although rollouts of one prompt depend on each other. Phrases are tested by the thousand, and overlap:
what is reported keeps the false discovery rate of Benjamini and Yekutieli (2001), which holds under any dependence. How large
the effect is tells the log-odds ratio with half a completion added to each cell (Haldane 1956, Anscombe 1956); phrases are ranked
by the lower end of its interval, so that neither the rare nor the slightly raised come first (Monroe, Colaresi and Quinn 2008).
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, false_discovery_control

from exactivations.store.completions import Completion
from exactivations.store.errors import InvalidInputError

Phrase = tuple[int, ...]
NEARLY = 0.8  # of a phrase's completions hold a longer one: it is the longer one that is worth a line


@dataclass(frozen=True)
class RaisedPhrase:
    """A phrase that amplification raises.

    Attributes:
        token_ids: Its tokens.
        raised: Completions at the higher alpha that hold it.
        reference: Completions at the reference that hold it.
        prompts_up: Prompts of which more rollouts hold it at the higher alpha than at the reference.
        prompts_down: Prompts of which fewer do.
        log_odds: Log-odds ratio of the completions, natural logarithm.
        log_odds_low: Lower end of its 95% interval, by its asymptotic variance (Woolf 1955).
        p_value: One-sided sign test over prompts.
        q_value: The false discovery rate at which this phrase and all with a smaller p are reported.
    """

    token_ids: Phrase
    raised: int
    reference: int
    prompts_up: int
    prompts_down: int
    log_odds: float
    log_odds_low: float
    p_value: float
    q_value: float


@dataclass(frozen=True)
class PhraseSearch:
    """What was found, of how many phrases that were tested, in how many completions of each alpha."""

    found: tuple[RaisedPhrase, ...]
    n_tested: int
    n_completions: int


def raised_phrases(
    completions: Iterable[Completion],
    alpha: float,
    reference: float,
    *,
    longest: int = 12,
    least_prompts: int = 5,
    false_discovery_rate: float = 0.05,
) -> PhraseSearch:
    """Finds phrases that more completions hold at one alpha than at another, those that are raised most first.

    A phrase is left out if a longer one that contains it is held by nearly as many completions; of those that still overlap in more
    than half of their tokens, only the one with the smallest p is reported.

    Args:
        completions: Of the same prompts at both alphas, equally many; those of other alphas are left out.
        alpha: The higher one.
        reference: The other one.
        longest: The most tokens of a phrase.
        least_prompts: Phrases in the completions of fewer prompts, both alphas together, are not tested. It looks at neither
            alpha apart, and so does not bend the test.
        false_discovery_rate: Share of what is reported that may be false, on average.

    Raises:
        InvalidInputError: If there are no completions of both alphas, or not equally many of each prompt.
    """
    of: dict[float, list[Completion]] = {alpha: [], reference: []}
    for completion in completions:
        if completion.alpha in of:
            of[completion.alpha].append(completion)
    rollouts = [Counter(c.sample_index for c in of[value]) for value in (alpha, reference)]
    if alpha == reference or not of[alpha] or rollouts[0] != rollouts[1]:
        raise InvalidInputError(
            f"phrases are compared between completions of the same prompts at two alphas: there are {len(of[alpha])} at alpha "
            f"{alpha:g} and {len(of[reference])} at {reference:g}, expected equally many of each prompt"
        )
    texts = [[(c.sample_index, c.token_ids[: c.n_counted].tolist()) for c in of[value]] for value in (alpha, reference)]
    counts = _counted(texts[0], texts[1], longest, least_prompts)
    tested = [_tested(phrase, *both, len(texts[0])) for phrase, both in counts.items()]
    q_values = false_discovery_control([phrase.p_value for phrase in tested], method="by") if tested else np.zeros(0)
    reported = [
        RaisedPhrase(**{**vars(phrase), "q_value": float(q)})
        for phrase, q in zip(tested, q_values, strict=True)
        if q <= false_discovery_rate
    ]
    apart = _without_overlaps(sorted(_longest_of_equals(reported), key=lambda p: (p.p_value, -len(p.token_ids), p.token_ids)))
    return PhraseSearch(tuple(sorted(apart, key=lambda p: (-p.log_odds_low, p.token_ids))), len(tested), len(texts[0]))


def _counted(
    raised: list[tuple[int, list[int]]], reference: list[tuple[int, list[int]]], longest: int, least_prompts: int
) -> dict[Phrase, tuple[Counter[int], Counter[int]]]:
    """Returns for each phrase in enough prompts how many rollouts of each prompt hold it, at both alphas.

    Length by length: a phrase is in enough prompts only if both phrases that are one token shorter are.
    """
    kept: dict[Phrase, tuple[Counter[int], Counter[int]]] = {}
    shorter: set[Phrase] = set()
    for length in range(1, longest + 1):
        counts: dict[Phrase, tuple[Counter[int], Counter[int]]] = {}
        for which, texts in enumerate((raised, reference)):
            for sample, ids in texts:
                held = {tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)}
                for phrase in held:
                    if length == 1 or (phrase[:-1] in shorter and phrase[1:] in shorter):
                        counts.setdefault(phrase, (Counter(), Counter()))[which][sample] += 1
        frequent = {phrase: both for phrase, both in counts.items() if len(both[0].keys() | both[1].keys()) >= least_prompts}
        kept |= frequent
        shorter = set(frequent)
    return kept


def _tested(phrase: Phrase, raised: Counter[int], reference: Counter[int], n: int) -> RaisedPhrase:
    prompts = raised.keys() | reference.keys()
    up = sum(raised[prompt] > reference[prompt] for prompt in prompts)
    down = sum(raised[prompt] < reference[prompt] for prompt in prompts)
    a, b = raised.total(), reference.total()
    cells = [a + 0.5, n - a + 0.5, b + 0.5, n - b + 0.5]
    log_odds = math.log(cells[0] / cells[1]) - math.log(cells[2] / cells[3])
    low = log_odds - 1.96 * math.sqrt(sum(1 / cell for cell in cells))
    p_value = float(binom.sf(up - 1, up + down, 0.5)) if up + down else 1.0
    return RaisedPhrase(phrase, a, b, up, down, log_odds, low, p_value, math.nan)


def _longest_of_equals(phrases: Sequence[RaisedPhrase]) -> list[RaisedPhrase]:
    """Leaves out phrases that hardly ever come but within a longer one."""
    within: dict[Phrase, int] = {}
    for phrase in phrases:
        for part in _parts(phrase.token_ids) - {phrase.token_ids}:
            within[part] = max(within.get(part, 0), phrase.raised)
    return [phrase for phrase in phrases if within.get(phrase.token_ids, 0) < NEARLY * phrase.raised]


def _parts(ids: Phrase) -> set[Phrase]:
    return {ids[i:j] for i in range(len(ids)) for j in range(i + 1, len(ids) + 1)}


def _without_overlaps(phrases: Sequence[RaisedPhrase]) -> list[RaisedPhrase]:
    kept: list[RaisedPhrase] = []
    seen: set[Phrase] = set()
    for phrase in phrases:
        ids = phrase.token_ids
        more_than_half = len(ids) // 2 + 1
        if not any(ids[i : i + more_than_half] in seen for i in range(len(ids) - more_than_half + 1)):
            kept.append(phrase)
            seen |= _parts(ids)
    return kept
