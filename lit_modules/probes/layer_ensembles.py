"""Ensembles over layers: the chosen probes of several vectors, averaged, or weighed by a probe of their scores."""

import torch
from jaxtyping import Float
from torch import Tensor

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.lit_modules.probes.linear_probes import KINDS, LinearProbes
from exactivations.lit_modules.probes.probe_evaluation import Scored
from exactivations.lit_modules.probes.probe_sweep import ProbeSweep

AVERAGE, STACKED = "ensemble: average", "ensemble: stacked"


def ensembles(sweep: ProbeSweep, data: ActivationDataModule, names: list[str]) -> tuple[dict[str, Scored], LinearProbes]:
    """Returns the scores of both ensembles of some vectors' probes, and the probe that does the stacking.

    The average is that of the scores (logits, or values). The stacking probe is a logistic (or ridge) regression of strength 1 on
    the scores of all vectors, standardised. It is fitted on validation, since probes know their training samples too well, so that
    there is no validation of it.
    """
    validation = stacked_scores([sweep.validated[name].scores[0] for name in names])
    test = stacked_scores([sweep.tested[name][0] for name in names])
    n_classes = len(data.classes)
    fit = KINDS["logistic" if n_classes else "ridge"]
    stacking = fit(validation, data.targets("validation")[:1], n_classes, [1.0], None)
    average = Scored("ensemble", average_of(validation, len(names)), average_of(test, len(names)))
    return {AVERAGE: average, STACKED: Scored("ensemble", None, stacking.scores(test)[0, 0])}, stacking


def stacked_scores(scores: list[Float[Tensor, "n k"]]) -> Float[Tensor, "n lk"]:
    """Returns the scores of L vectors' probes side by side, those of the first vector first."""
    return torch.cat(scores, dim=1)


def average_of(stacked: Float[Tensor, "n lk"], n_vectors: int) -> Float[Tensor, "n k"]:
    """Returns the mean over vectors of what `stacked_scores` gave."""
    return stacked.view(len(stacked), n_vectors, -1).mean(dim=1)
