"""What probes are worth on the test part: intervals over groups, beside baselines and shuffled labels, and what to be wary of."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.splits import PARTS
from exactivations.lit_modules.group_bootstrap import (
    MIN_GROUPS,
    Groups,
    Interval,
    auroc_intervals,
    interval_of_difference,
    intervals,
)
from exactivations.lit_modules.probe_metrics import (
    CLASSIFICATION,
    REGRESSION,
    Metric,
    accuracy,
    false_positive_rate_above,
    r2,
    recall_above,
    threshold_at_fpr,
)
from exactivations.lit_modules.probe_scores import headline, headline_of, probabilities
from exactivations.lit_modules.probes import ProbeSweep
from exactivations.store.errors import InvalidInputError

Role = Literal["probe", "control", "baseline", "ensemble"]
BASELINE = "baseline: "
CONTROL_TASK = "control task"
UNTRAINED = "untrained"
MAX_FPR = 0.01
FEW_GROUPS = 20


@dataclass(frozen=True)
class VectorResult:
    """How good the chosen probe of one vector is.

    Attributes:
        name: The vector.
        role: "probe" of the model's activations, "control" (another model's), "baseline" (of the text) or "ensemble" of probes.
        strength: The one that validation chose; None where there was no choice.
        validation: The headline metric there; None of an ensemble that was fitted on validation.
        test: The headline metric on test, of the true labels.
        shuffled: Likewise of each variant with shuffled labels, trained, chosen and tested on those.
    """

    name: str
    role: Role
    strength: float | None
    validation: float | None
    test: Interval
    shuffled: list[Interval] = field(default_factory=list)


@dataclass(frozen=True)
class Threshold:
    """A threshold of the probability of the positive class, and what it does on test.

    Attributes:
        value: Positive is what lies above.
        fixed_on: What its rate of false positives was fixed on: "validation", or a benign source.
        max_fpr: That rate, at most.
        n_negatives: How many negatives it was fixed on.
        recall: Share of test's positives above it.
        false_positive_rate: Share of test's negatives above it.
    """

    value: float
    fixed_on: str
    max_fpr: float
    n_negatives: int
    recall: Interval
    false_positive_rate: Interval


@dataclass(frozen=True)
class ProbeResults:
    """All that was found; `to_json` is the content of metrics.json.

    Attributes:
        label: The column.
        classes: Names of the classes; the second of two is the positive one. Empty for values.
        unit: "sample" or "token".
        headline: The metric that vectors were chosen by: "auroc" or "r2".
        parts: Of each part: examples, samples, groups, and examples of each class.
        group_column: What the intervals resample; None: samples.
        n_resamples: How often.
        best: The vector that validation chose, and that is to be reported.
        vectors: Every vector, in order.
        metrics: All metrics on test, of the best vector and of the best baseline.
        threshold: Of two classes, for the best vector.
        over_baseline: What the best vector has over the baseline that is best on test, in the headline metric.
        best_baseline: Which one that is.
        over_untrained: What it has over the same vector of an untrained model.
        selectivity: Accuracy of the best vector on the labels, less that on the control task (Hewitt and Liang,
            doi 10.18653/v1/D19-1275).
        erased: The best vector after the label was erased from it: LEACE on train, a probe trained anew on validation.
        warnings: What a reader must know.
    """

    label: str
    classes: list[str]
    unit: str
    headline: str
    parts: dict[str, dict[str, Any]]
    group_column: str | None
    n_resamples: int
    best: str
    vectors: list[VectorResult]
    metrics: dict[str, dict[str, Interval]]
    threshold: Threshold | None
    over_baseline: Interval | None
    best_baseline: str | None
    over_untrained: Interval | None
    selectivity: float | None
    erased: Interval | None
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Returns everything as JSON takes it."""
        return asdict(self)

    def of_role(self, role: Role) -> list[VectorResult]:
        """Returns the vectors of a role."""
        return [vector for vector in self.vectors if vector.role == role]


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made; see `group_bootstrap.intervals`."""

    n_resamples: int = 1000
    seed: int = 0

    def of(self, metric: Metric, scores: Tensor, labels: Tensor, groups: Groups) -> Interval:
        """Returns the interval of a metric."""
        return intervals(metric, scores, labels, groups, n_resamples=self.n_resamples, seed=self.seed)

    def headlines(self, scores: Tensor, labels: Tensor, groups: Groups, n_classes: int) -> list[Interval]:
        """Returns the interval of the headline metric of probes with scores [P, n, K']."""
        if not n_classes:
            return [self.of(r2, values, labels, groups) for values in probabilities(scores, 0)]
        of_classes = probabilities(scores, n_classes) if n_classes > 2 else scores[..., 0]
        return auroc_intervals(of_classes, labels, groups, n_resamples=self.n_resamples, seed=self.seed)

    def difference(self, ours: Tensor, theirs: Tensor, labels: Tensor, groups: Groups, n_classes: int) -> Interval:
        """Returns the interval of the difference in the headline metric, of scores [n, K']."""
        if not n_classes:
            pair = probabilities(ours, 0), probabilities(theirs, 0)
            return interval_of_difference(r2, *pair, labels, groups, n_resamples=self.n_resamples, seed=self.seed)
        of = partial(probabilities, n_classes=n_classes)
        a, b = (of(ours), of(theirs)) if n_classes > 2 else (ours[..., 0], theirs[..., 0])
        return auroc_intervals(a[None], labels, groups, baseline=b, n_resamples=self.n_resamples, seed=self.seed)[0]


@dataclass(frozen=True)
class Scored:
    """Scores that were not made by the sweep: of ensembles, or of a baseline that is no linear probe.

    Attributes:
        role: See `VectorResult`.
        validation: [n, K'], the scores on validation; None if they were fitted on it.
        test: [n, K'].
    """

    role: Role
    validation: Tensor | None
    test: Tensor


@dataclass(frozen=True)
class Benign:
    """Probabilities [n] of the positive class that the best probe gives to samples of which all are negative."""

    title: str
    probabilities: Tensor


def chosen_vector(sweep: ProbeSweep, data: ActivationDataModule) -> str:
    """Returns the vector of the source, and of no control or baseline, that is best on validation: the first one of equals."""
    return max(probe_names(data), key=lambda name: float(sweep.validated[name].values[0].max()))


def probe_names(data: ActivationDataModule) -> list[str]:
    """Returns the vectors of the data module's own source."""
    return [name for name in data.names if role_of(name, data) == "probe"]


def role_of(name: str, data: ActivationDataModule) -> Role:
    """Returns what a vector of the data module is."""
    if name.startswith(BASELINE):
        return "baseline"
    return "control" if any(name.startswith(f"{key}: ") for key in data.others) else "probe"


def refuse_few_groups(data: ActivationDataModule) -> None:
    """Refuses a test part that gives no intervals, before anything is trained.

    Raises:
        InvalidInputError: Saying how many groups there are.
    """
    n_groups = len(set(data.groups_of("test")))
    if n_groups < MIN_GROUPS:
        raise InvalidInputError(
            f"test has {n_groups} groups ({data.group or 'each sample is one'}), intervals need {MIN_GROUPS} at least: give test a "
            "larger share (--shares), take another --group, or more samples"
        )


def evaluate(
    sweep: ProbeSweep,
    data: ActivationDataModule,
    *,
    further: Mapping[str, Scored] | None = None,
    benign: Benign | None = None,
    erased: Tensor | None = None,
    bootstrap: Bootstrap | None = None,
) -> ProbeResults:
    """Looks once at the test part.

    Args:
        sweep: After `trainer.fit` and `trainer.test`.
        data: What it was trained on.
        further: Scores of ensembles and baselines that are not the sweep's, by name.
        benign: What the threshold is fixed on, instead of validation's negatives.
        erased: Scores [n, K'] on test of a probe that was trained on erased rows of the best vector, other than those that the
            eraser was made of: on those every linear probe is at chance by construction.
        bootstrap: How intervals are made.

    Raises:
        InvalidInputError: If the test part has fewer than five groups, or a metric is undefined on it.
    """
    bootstrap, n_classes = bootstrap or Bootstrap(), len(data.classes)
    labels, groups = data.targets("test"), _names(data.groups_of("test"))
    tested = {name: scores[0] for name, scores in sweep.tested.items()}
    vectors, best = [], chosen_vector(sweep, data)
    shuffled = [number for number, variant in enumerate(data.variants) if variant.startswith("shuffled ")]
    for name in data.names:
        valid = sweep.validated[name]
        vectors.append(
            VectorResult(
                name, role_of(name, data), sweep.settings[int(valid.chosen[0])].strength, float(valid.values[0].max()),
                bootstrap.headlines(tested[name][None], labels[0], groups, n_classes)[0],
                [bootstrap.headlines(sweep.tested[name][v][None], labels[v], groups, n_classes)[0] for v in shuffled],
            )
        )  # fmt: skip
    of_validation = data.targets("validation")[0]
    for name, scored in (further or {}).items():
        tested[name] = scored.test
        on_validation = None
        if scored.validation is not None:
            on_validation = float(headline(scored.validation[None], of_validation, n_classes)[0])
        test = bootstrap.headlines(scored.test[None], labels[0], groups, n_classes)[0]
        vectors.append(VectorResult(name, scored.role, None, on_validation, test))
    baselines = [vector for vector in vectors if vector.role == "baseline"]
    table = CLASSIFICATION if n_classes else REGRESSION
    metrics = {
        name: {
            what: bootstrap.of(metric, probabilities(tested[name], n_classes), labels[0], groups) for what, metric in table.items()
        }
        for name in [best, *(vector.name for vector in baselines)]
    }
    best_baseline = max(baselines, key=lambda vector: vector.test.estimate).name if baselines else None
    over = None
    if best_baseline is not None:
        over = bootstrap.difference(tested[best], tested[best_baseline], labels[0], groups, n_classes)
    over_untrained = None
    if f"{UNTRAINED}: {best}" in tested:
        over_untrained = bootstrap.difference(tested[best], tested[f"{UNTRAINED}: {best}"], labels[0], groups, n_classes)
    selectivity = None
    if CONTROL_TASK in data.variants:
        of_control = data.variants.index(CONTROL_TASK)
        selectivity = accuracy(probabilities(tested[best], n_classes), labels[0]) - accuracy(
            probabilities(sweep.tested[best][of_control], n_classes), labels[of_control]
        )
    results = ProbeResults(
        label=data.label, classes=data.classes, unit=data.unit, headline=headline_of(n_classes), parts=_parts(data),
        group_column=data.group, n_resamples=bootstrap.n_resamples, best=best, vectors=vectors, metrics=metrics,
        threshold=_threshold(sweep, data, best, benign, bootstrap) if n_classes == 2 else None,
        over_baseline=over, best_baseline=best_baseline, over_untrained=over_untrained, selectivity=selectivity,
        erased=None if erased is None else bootstrap.headlines(erased[None], labels[0], groups, n_classes)[0], warnings=[],
    )  # fmt: skip
    results.warnings.extend(_warnings(results, data))
    return results


def _threshold(sweep: ProbeSweep, data: ActivationDataModule, best: str, benign: Benign | None, bootstrap: Bootstrap) -> Threshold:
    test, labels, groups = probabilities(sweep.tested[best][0], 2), data.targets("test")[0], _names(data.groups_of("test"))
    if benign is None:
        scores, negatives = probabilities(sweep.validated[best].scores[0], 2), data.targets("validation")[0]
    else:
        scores, negatives = benign.probabilities, torch.zeros(len(benign.probabilities), dtype=torch.int64)
    value = threshold_at_fpr(scores, negatives, MAX_FPR)
    return Threshold(
        value, "validation" if benign is None else benign.title, MAX_FPR, int((negatives == 0).sum()),
        bootstrap.of(partial(recall_above, threshold=value), test, labels, groups),
        bootstrap.of(partial(false_positive_rate_above, threshold=value), test, labels, groups),
    )  # fmt: skip


def _parts(data: ActivationDataModule) -> dict[str, dict[str, Any]]:
    found = {}
    for part in PARTS:
        numbers, labels = data.numbers(part), data.targets(part)[0]
        counts = torch.bincount(labels, minlength=len(data.classes)).tolist() if data.classes else []
        found[part] = {
            "examples": len(numbers),
            "samples": len(set(data.sample_of(numbers).tolist())),
            "groups": len(set(data.groups_of(part))),
            "classes": dict(zip(data.classes, counts, strict=True)),
        }
    return found


def _warnings(results: ProbeResults, data: ActivationDataModule) -> list[str]:
    found = []
    chance = 0.5 if data.classes else 0.0
    if results.over_baseline is not None and results.over_baseline.low <= 0:
        found.append(
            f"the text alone is as good: {results.best} has {results.over_baseline.estimate:+.3f} "
            f"[{results.over_baseline.low:+.3f}, {results.over_baseline.high:+.3f}] over {results.best_baseline!r}. The label "
            "can be read off the words; the probe shows nothing of what the model makes of them"
        )
    if results.erased is not None and results.erased.low > chance:
        found.append(
            f"{results.best} still tells the label after erasure ({results.erased.estimate:.3f}): what is left is not linear, or "
            "there were too few training samples to erase it by"
        )
    if results.over_untrained is not None and results.over_untrained.low <= 0:
        found.append(
            f"the untrained model is as good: {results.best} has {results.over_untrained.estimate:+.3f} "
            f"[{results.over_untrained.low:+.3f}, {results.over_untrained.high:+.3f}] over the same vector there. Training has not "
            "put the label in"
        )
    best = next(vector for vector in results.vectors if vector.name == results.best)
    if data.classes and best.test.high < 0.5:
        found.append(f"{results.best} is worse than chance on test: the parts differ in more than the draw")
    off = [
        f"{vector.name} {interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
        for vector in results.vectors
        for interval in vector.shuffled
        if data.classes and not interval.low <= chance <= interval.high
    ]
    n = sum(len(vector.shuffled) for vector in results.vectors)
    if len(off) > max(1, 0.15 * n):
        found.append(f"shuffled labels should give {chance}, but {len(off)} of {n} do not: {', '.join(off[:3])}")
    doubled = _doubled(data)
    if doubled:
        found.append(
            f"{doubled:,} samples of test or validation have the same tokens as a sample of train: what is remembered looks like "
            "what is known. Group by a column that keeps them together"
        )
    if results.threshold is not None and results.threshold.n_negatives < 1 / results.threshold.max_fpr:
        found.append(
            f"the threshold was fixed on {results.threshold.n_negatives} negatives, too few for a rate of "
            f"{results.threshold.max_fpr:.0%}: give a benign store"
        )
    n_groups = results.parts["test"]["groups"]
    if n_groups < FEW_GROUPS:
        found.append(f"test has {n_groups} groups only: the intervals are too narrow (of 12 groups, 95% ones hold 90%)")
    if data.group is None:
        found.append("no --group was given: samples that resemble each other may be in several parts, and intervals too narrow")
    return found


def _doubled(data: ActivationDataModule) -> int:
    hashes = data.source.samples.column("token_hash").to_pylist()
    train = {hashes[place] for place in data.split.train.tolist()}
    return sum(hashes[place] in train for part in PARTS[1:] for place in getattr(data.split, part).tolist())


def _names(groups: list[Any]) -> list[str] | list[int]:
    """Returns groups as the bootstrap takes them: whole numbers stay, all else is made text."""
    return groups if all(isinstance(group, int) for group in groups) else [str(group) for group in groups]
