"""The form of what was found of probes: everything that metrics.json, report.md and layers.png are made of."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from exactivations.lit_modules.probes.group_bootstrap import Interval

Role = Literal["probe", "control", "baseline", "ensemble"]
BASELINE = "baseline: "
LENGTH = f"{BASELINE}length"
CONTROL_TASK = "control task"
UNTRAINED = "untrained"
MAX_FPR = 0.01


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
    """A threshold of the score of the positive class, and what it does on test.

    Attributes:
        value: Log-odds of the positive class (its score): positive is what lies above.
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
        over_untrained: What it has over the vector of an untrained model that is best on validation.
        best_untrained: Which one that is.
        selectivity: Accuracy of the best vector on the labels, less that on the control task (Hewitt and Liang,
            doi 10.18653/v1/D19-1275).
        erased: The best vector after the label was erased from it: LEACE on train, a probe trained anew on validation.
        not_erased: A probe trained on validation likewise, without erasure: what `erased` is to be compared with.
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
    best_untrained: str | None = None
    not_erased: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns everything as JSON takes it."""
        return asdict(self)

    def of_role(self, role: Role) -> list[VectorResult]:
        """Returns the vectors of a role."""
        return [vector for vector in self.vectors if vector.role == role]
