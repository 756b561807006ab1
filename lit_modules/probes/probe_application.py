"""What saved probes are worth on other samples than those of their run: nothing is trained or chosen, thresholds stay."""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from torch import Tensor

from exactivations.lit_modules.probes.group_bootstrap import Interval
from exactivations.lit_modules.probes.probe_evaluation import Bootstrap, names_of_groups
from exactivations.lit_modules.probes.probe_file import SavedProbes
from exactivations.lit_modules.probes.probe_inputs import UndefinedMetricError
from exactivations.lit_modules.probes.probe_metrics import (
    CLASSIFICATION,
    REGRESSION,
    Metric,
    false_positive_rate_above,
    recall_above,
)
from exactivations.lit_modules.probes.probe_results import LENGTH
from exactivations.lit_modules.probes.probe_scores import headline_of, probabilities
from exactivations.lit_modules.probes.probe_warnings import FEW_EXAMPLES, FEW_GROUPS, as_good_as

RECALL, FALSE_POSITIVES = "recall_above_threshold", "false_positive_rate_above_threshold"


@dataclass(frozen=True)
class ProbeApplication:
    """What was found; `to_json` is the content of metrics.json.

    Attributes:
        label: The column.
        classes: Those of the probes; empty for values.
        unit: "sample" or "token".
        headline: "auroc" or "r2".
        n_samples: Samples that were tested.
        n_examples: Samples or tokens with a label.
        n_left_out_as_seen: Samples that were left out, as the probes had been trained or chosen on them or others of their group.
        n_of_class: Examples of each class.
        n_groups: Groups that intervals resample, and group_column, which they are the values of; None: samples.
        validation: The headline metric on the validation part of the training run, by probe; None of ensembles.
        threshold: The log-odds that training fixed, by probe; None where there is none.
        metrics: By probe and the length baseline; those that the samples do not define are left out. Of a threshold, the shares of
            positives and of negatives above it.
        over_length: What each probe has over the length baseline in the headline metric; empty without one.
        warnings: What a reader must know.
    """

    label: str
    classes: list[str]
    unit: str
    headline: str
    n_samples: int
    n_examples: int
    n_left_out_as_seen: int
    n_of_class: dict[str, int]
    n_groups: int
    group_column: str | None
    n_resamples: int
    validation: dict[str, float | None]
    threshold: dict[str, float | None]
    metrics: dict[str, dict[str, Interval]]
    over_length: dict[str, Interval]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Returns everything as JSON takes it."""
        return asdict(self)


def applied(
    probes: SavedProbes,
    scores: Mapping[str, Float[Tensor, "n k"]],
    length: Float[Tensor, "n k"] | None,
    labels: Shaped[Tensor, " n"],
    groups: list[Any],
    *,
    label: str,
    n_samples: int,
    n_left_out: int,
    group_column: str | None,
    bootstrap: Bootstrap,
    warnings: list[str],
) -> ProbeApplication:
    """Holds scores against labels.

    Args:
        probes: What scored.
        scores: Of vectors or ensembles, by name; of the same n samples or tokens each.
        length: Of the length baseline.
        labels: Class numbers as the probes count them, int64 [n], or values, float64 [n].
        groups: Of each sample or token [n].
        label: The column.
        n_samples: How many samples these are.
        n_left_out: How many more there were that the probes know.
        group_column: What the groups are; None if every sample is its own.
        bootstrap: How intervals are made.
        warnings: What is known to be doubtful already.

    Raises:
        InvalidInputError: If there are fewer than five groups, or a metric is undefined in most resamples of them.
    """
    classes, named = probes.classes, names_of_groups(groups)
    thresholds = {name: probes.threshold_of(name) for name in scores}
    everything = {**scores, **({} if length is None else {LENGTH: length})}
    metrics = {
        name: _metrics(values, labels, named, thresholds.get(name), bootstrap, len(classes)) for name, values in everything.items()
    }
    what, over = headline_of(len(classes)), {}
    if length is not None:
        with contextlib.suppress(UndefinedMetricError):
            over = {name: bootstrap.difference(values, length, labels, named, len(classes)) for name, values in scores.items()}
    known = probes.content["vectors"]
    counts = np.bincount(labels.numpy(), minlength=len(classes)).tolist() if classes else []
    found = ProbeApplication(
        label=label, classes=classes, unit=str(probes.content["unit"]), headline=what, n_samples=n_samples, n_examples=len(labels),
        n_left_out_as_seen=n_left_out, n_of_class=dict(zip(classes, counts, strict=True)), n_groups=len(set(groups)),
        group_column=group_column, n_resamples=bootstrap.n_resamples,
        validation={name: known.get(name, {}).get(f"validation_{what}") for name in scores}, threshold=thresholds,
        metrics=metrics, over_length=over, warnings=list(warnings),
    )  # fmt: skip
    found.warnings.extend(_warnings(found, list(scores)))
    return found


def _metrics(
    scores: Tensor, labels: Tensor, groups: list[str] | list[int], threshold: float | None, bootstrap: Bootstrap, n_classes: int
) -> dict[str, Interval]:
    what, values, found = headline_of(n_classes), probabilities(scores, n_classes), dict[str, Interval]()
    with contextlib.suppress(UndefinedMetricError):  # samples of one class have a rate above the threshold, and no AUROC
        found[what] = bootstrap.headlines(scores[None], labels, groups, n_classes)[0]
    for name, metric in (CLASSIFICATION if n_classes else REGRESSION).items():
        with contextlib.suppress(UndefinedMetricError):
            if name != what:
                found[name] = bootstrap.of(metric, values, labels, groups)
    above: tuple[tuple[str, Any], ...] = ((RECALL, recall_above), (FALSE_POSITIVES, false_positive_rate_above))
    for name, rate in above if threshold is not None else ():
        with contextlib.suppress(UndefinedMetricError):
            at_threshold: Metric = partial(rate, threshold=threshold)
            found[name] = bootstrap.of(at_threshold, scores[:, 0], labels, groups)
    return found


def _warnings(found: ProbeApplication, names: list[str]) -> list[str]:
    warnings = []
    if found.group_column is None:
        warnings.append("no --group was given: if samples resemble each other, intervals are too narrow")
    if found.n_groups < FEW_GROUPS:
        warnings.append(f"there are {found.n_groups} groups only: the intervals are too narrow (of 12 groups, 95% ones hold 90%)")
    missing = [name for name, n in found.n_of_class.items() if not n]
    if missing:
        warnings.append(
            f"no {found.unit} is of class {', '.join(map(repr, missing))}: {found.headline} and whatever else needs every "
            "class is left out"
        )
    rare = min(((n, name) for name, n in found.n_of_class.items() if n), default=(FEW_EXAMPLES, ""))
    if rare[0] < FEW_EXAMPLES:
        warnings.append(f"there are {rare[0]} {found.unit}s of class {rare[1]!r} only: what is said of them is said of very few")
    for name in names:
        headline = found.metrics[name].get(found.headline)
        if found.classes and headline is not None and headline.high < 0.5:
            warnings.append(f"{name} is worse than chance on these samples: they differ from training's in more than the draw")
        if name in found.over_length and found.over_length[name].low <= 0:
            warnings.append(as_good_as(name, found.over_length[name], LENGTH))
    return warnings
