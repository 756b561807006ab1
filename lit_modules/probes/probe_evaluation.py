"""What probes are worth on the test part: intervals over groups, beside baselines and shuffled labels."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.lit_modules.probes.group_bootstrap import (
    MIN_GROUPS,
    Groups,
    Interval,
    auroc_intervals,
    interval_of_difference,
    intervals,
)
from exactivations.lit_modules.probes.probe_inputs import UndefinedMetricError
from exactivations.lit_modules.probes.probe_metrics import (
    CLASSIFICATION,
    REGRESSION,
    Metric,
    accuracy,
    false_positive_rate_above,
    r2,
    recall_above,
    threshold_at_fpr,
)
from exactivations.lit_modules.probes.probe_results import (
    BASELINE,
    CONTROL_TASK,
    MAX_FPR,
    UNTRAINED,
    ProbeResults,
    Role,
    Threshold,
    VectorResult,
)
from exactivations.lit_modules.probes.probe_scores import headline, headline_of, probabilities
from exactivations.lit_modules.probes.probe_sweep import ProbeSweep
from exactivations.lit_modules.probes.probe_warnings import warnings_of
from exactivations.store.errors import InvalidInputError


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
    """Scores [n] (log-odds of the positive class) that the best probe gives to samples of which all are negative."""

    title: str
    scores: Tensor


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


def refuse_few_groups(data: ActivationDataModule, bootstrap: Bootstrap | None = None) -> None:
    """Refuses a test part that gives no intervals, before anything is trained.

    Raises:
        InvalidInputError: Saying how many groups there are, or that resamples of them lack a class too often.
    """
    n_groups = len(set(data.groups_of("test")))
    if n_groups < MIN_GROUPS:
        raise InvalidInputError(
            f"test has {n_groups} groups ({data.group or 'each sample is one'}), intervals need {MIN_GROUPS} at least: give test a "
            "larger share (--shares), take another --group, or more samples"
        )
    n_classes, labels = len(data.classes), data.targets("test")[0]
    if n_classes:
        nothing = torch.zeros(1, len(labels), n_classes if n_classes > 2 else 1)
        (bootstrap or Bootstrap()).headlines(nothing, labels, names_of_groups(data.groups_of("test")), n_classes)


def evaluate(
    sweep: ProbeSweep,
    data: ActivationDataModule,
    *,
    further: Mapping[str, Scored] | None = None,
    benign: Benign | None = None,
    erased: Tensor | None = None,
    not_erased: Tensor | None = None,
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
        not_erased: Scores of a probe that was trained on the same rows without erasure.
        bootstrap: How intervals are made.

    Raises:
        InvalidInputError: If the test part has fewer than five groups, or a metric is undefined on it.
    """
    bootstrap, n_classes = bootstrap or Bootstrap(), len(data.classes)
    labels, groups = data.targets("test"), names_of_groups(data.groups_of("test"))
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
    best_baseline = max(baselines, key=lambda vector: vector.test.estimate).name if baselines else None
    of_vector = {vector.name: vector.test for vector in vectors}
    metrics: dict[str, dict[str, Interval]] = {}
    for name in [best, *([best_baseline] if best_baseline else [])]:
        values, metrics[name] = probabilities(tested[name], n_classes), {headline_of(n_classes): of_vector[name]}
        for what, metric in (CLASSIFICATION if n_classes else REGRESSION).items():
            with contextlib.suppress(UndefinedMetricError):  # predictions that never vary have no correlation: it is left out
                if what not in metrics[name]:
                    metrics[name][what] = bootstrap.of(metric, values, labels[0], groups)
    over = None
    if best_baseline is not None:
        over = bootstrap.difference(tested[best], tested[best_baseline], labels[0], groups, n_classes)
    untrained = [vector for vector in vectors if vector.name.startswith(f"{UNTRAINED}: ") and vector.validation is not None]
    best_untrained = max(untrained, key=lambda vector: vector.validation or 0.0).name if untrained else None
    over_untrained = None
    if best_untrained is not None:
        over_untrained = bootstrap.difference(tested[best], tested[best_untrained], labels[0], groups, n_classes)
    selectivity = None
    if CONTROL_TASK in data.variants:
        of_control = data.variants.index(CONTROL_TASK)
        selectivity = accuracy(probabilities(tested[best], n_classes), labels[0]) - accuracy(
            probabilities(sweep.tested[best][of_control], n_classes), labels[of_control]
        )
    results = ProbeResults(
        label=data.label, classes=data.classes, unit=data.unit, headline=headline_of(n_classes), parts=data.counts(),
        group_column=data.group, n_resamples=bootstrap.n_resamples, best=best, vectors=vectors, metrics=metrics,
        threshold=_threshold(sweep, data, best, benign, bootstrap) if n_classes == 2 else None,
        over_baseline=over, best_baseline=best_baseline, over_untrained=over_untrained, selectivity=selectivity,
        erased=None if erased is None else bootstrap.headlines(erased[None], labels[0], groups, n_classes)[0], warnings=[],
        best_untrained=best_untrained,
        not_erased=None if not_erased is None else bootstrap.headlines(not_erased[None], labels[0], groups, n_classes)[0],
    )  # fmt: skip
    results.warnings.extend(warnings_of(results, data))
    return results


def _threshold(sweep: ProbeSweep, data: ActivationDataModule, best: str, benign: Benign | None, bootstrap: Bootstrap) -> Threshold:
    test, labels, groups = sweep.tested[best][0, :, 0], data.targets("test")[0], names_of_groups(data.groups_of("test"))
    if benign is None:
        scores, negatives = sweep.validated[best].scores[0, :, 0], data.targets("validation")[0]
    else:
        scores, negatives = benign.scores, torch.zeros(len(benign.scores), dtype=torch.int64)
    value = threshold_at_fpr(scores, negatives, MAX_FPR)
    return Threshold(
        value, "validation" if benign is None else benign.title, MAX_FPR, int((negatives == 0).sum()),
        bootstrap.of(partial(recall_above, threshold=value), test, labels, groups),
        bootstrap.of(partial(false_positive_rate_above, threshold=value), test, labels, groups),
    )  # fmt: skip


def names_of_groups(groups: list[Any]) -> list[str] | list[int]:
    """Returns groups as the bootstrap takes them: whole numbers stay, all else is made text."""
    return groups if all(isinstance(group, int) for group in groups) else [str(group) for group in groups]
