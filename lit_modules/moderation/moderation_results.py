"""What moderators are worth on test: intervals over groups and confusion matrices, beside probes and baselines of the text."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.splits import PARTS
from exactivations.lit_modules.moderation.prototype_diagnosis import PrototypeFinding
from exactivations.lit_modules.moderation.prototype_grid import scores_of
from exactivations.lit_modules.moderation.prototype_moderator import PrototypeModerator
from exactivations.lit_modules.probes.group_bootstrap import Groups, Interval
from exactivations.lit_modules.probes.probe_evaluation import Bootstrap, Scored, names_of_groups
from exactivations.lit_modules.probes.probe_metrics import f1, false_positive_rate_above, recall_above, threshold_at_fpr
from exactivations.lit_modules.probes.probe_results import MAX_FPR, ProbeResults, Role, Threshold, VectorResult
from exactivations.lit_modules.probes.probe_scores import headline, headline_of, probabilities
from exactivations.lit_modules.probes.probe_warnings import warnings_of

RECALL, FALSE_POSITIVES = "recall_at_1%_fpr", "fpr_at_that_threshold"


@dataclass(frozen=True)
class ModerationResults:
    """All that was found; `to_json` is the content of metrics.json.

    Attributes:
        table: Every entry (role "probe") and mixture ("ensemble"), and what they are held against; `best` was chosen on validation.
            Its `metrics` are of the best, of the mixtures, and of what they are held against.
        thresholds: Log-odds of the positive class above which at most 1 % of validation's negatives lie, by name.
        confusion: Samples of test by their class (rows) and the most probable one (columns), by name.
        findings: What makes prototypes useless, by entry.
    """

    table: ProbeResults
    thresholds: dict[str, float]
    confusion: dict[str, list[list[int]]]
    findings: dict[str, list[PrototypeFinding]]

    def to_json(self) -> dict[str, Any]:
        """Returns everything as JSON takes it."""
        findings = {entry: [asdict(finding) for finding in found] for entry, found in self.findings.items() if found}
        return self.table.to_json() | {"thresholds": self.thresholds, "confusion": self.confusion, "findings": findings}


def moderation_results(
    moderator: PrototypeModerator,
    data: ActivationDataModule,
    *,
    further: Mapping[str, Scored] | None = None,
    bootstrap: Bootstrap | None = None,
) -> ModerationResults:
    """Looks once at the test part.

    Args:
        moderator: After `trainer.fit` and `trainer.test`.
        data: What it was made of.
        further: Scores of probes and baselines on the same parts, by name.
        bootstrap: How intervals are made.

    Raises:
        InvalidInputError: If the test part has fewer than five groups, or a metric is undefined on it.
    """
    bootstrap, n_classes = bootstrap or Bootstrap(), len(data.classes)
    truth = {part: data.targets(part)[0] for part in PARTS}
    groups = names_of_groups(data.groups_of("test"))
    scored = {name: _scored(moderator, name) for name in moderator.grid.names} | dict(further or {})
    everything = torch.stack([one.test.double() for one in scored.values()])
    tests = bootstrap.headlines(everything, truth["test"], groups, n_classes)
    vectors, thresholds = [], {}
    for (name, one), test in zip(scored.items(), tests, strict=True):
        validation = None
        if one.validation is not None:
            validation = float(headline(one.validation[None], truth["validation"], n_classes)[0])
            if n_classes == 2:
                thresholds[name] = threshold_at_fpr(one.validation[:, 0], truth["validation"], MAX_FPR)
        vectors.append(VectorResult(name, one.role, None, validation, test))
    shown = list(dict.fromkeys([moderator.chosen, *moderator.grid.mixtures, *(further or {})]))
    metrics = {
        name: metrics_on(scored[name].test, truth["test"], groups, thresholds.get(name), bootstrap, n_classes) for name in shown
    }
    baselines = [vector for vector in vectors if vector.role == "baseline"]
    against = max(baselines, key=lambda vector: vector.test.estimate).name if baselines else None
    over = None
    if against is not None:
        over = bootstrap.difference(scored[moderator.chosen].test, scored[against].test, truth["test"], groups, n_classes)
    threshold = None
    if moderator.chosen in thresholds:
        of_chosen = metrics[moderator.chosen]
        threshold = Threshold(
            thresholds[moderator.chosen], "validation", MAX_FPR, int((truth["validation"] == 0).sum()), of_chosen[RECALL],
            of_chosen[FALSE_POSITIVES],
        )  # fmt: skip
    table = ProbeResults(
        label=data.label, classes=data.classes, unit=data.unit, headline=headline_of(n_classes), parts=data.counts(),
        group_column=data.group, n_resamples=bootstrap.n_resamples, best=moderator.chosen, vectors=vectors, metrics=metrics,
        threshold=threshold, over_baseline=over, best_baseline=against, over_untrained=None, selectivity=None, erased=None,
        warnings=[],
    )  # fmt: skip
    table.warnings.extend([*warnings_of(table, data), *_warnings(moderator)])
    confusion = {name: confusion_of(scored[name].test, truth["test"], n_classes) for name in shown}
    return ModerationResults(table, thresholds, confusion, moderator.findings)


def metrics_on(
    scores: Tensor, labels: Tensor, groups: Groups, threshold: float | None, bootstrap: Bootstrap, n_classes: int
) -> dict[str, Interval]:
    """Returns AUROC, F1, and of two classes what a threshold of the log-odds does, with intervals over groups.

    Of two classes, samples that are all of one have neither AUROC nor F1, and the threshold's rate of that class only.

    Args:
        scores: float [n, K'], as `scores_of` gives them.
        labels: int64 [n].
        groups: Of each sample.
        threshold: Fixed on other samples; None leaves it out.
        bootstrap: How intervals are made.
        n_classes: K.
    """
    found, present = dict[str, Interval](), set(labels.tolist())
    if threshold is None or len(present) > 1:
        found["auroc"] = bootstrap.headlines(scores[None], labels, groups, n_classes)[0]
        found["f1"] = bootstrap.of(f1, probabilities(scores, n_classes), labels, groups)
    if threshold is not None:
        for name, metric, number in ((RECALL, recall_above, 1), (FALSE_POSITIVES, false_positive_rate_above, 0)):
            if number in present:
                found[name] = bootstrap.of(partial(metric, threshold=threshold), scores[:, 0], labels, groups)
    return found


def confusion_of(scores: Tensor, labels: Tensor, n_classes: int) -> list[list[int]]:
    """Returns how many samples of each class (rows) come out as each class (columns), of scores [n, K']."""
    predicted = (scores[:, 0] > 0).long() if n_classes == 2 else scores.argmax(dim=1)
    counts: list[list[int]] = torch.bincount(labels * n_classes + predicted, minlength=n_classes**2).view(n_classes, -1).tolist()
    return counts


def _scored(moderator: PrototypeModerator, name: str) -> Scored:
    role: Role = "ensemble" if name in moderator.grid.mixtures else "probe"
    validation, test = (moderator.log_probabilities(name, part) for part in (moderator.validated, moderator.tested))
    return Scored(role, scores_of(validation), scores_of(test))


def _warnings(moderator: PrototypeModerator) -> list[str]:
    empty = [name for name, mixture in moderator.grid.mixtures.items() if not mixture.weights.layer_weights.any()]
    if not empty:
        return []
    return [
        f"no layer has a weight in {', '.join(empty)}: held-out probabilities of its layers tell nothing beyond how frequent the "
        "classes are; take mahalanobis:ledoit-wolf, whose probabilities are not close to the priors"
    ]
