"""Probes of every vector at once, and what stands beside them: baselines, intervals, erasure."""

from exactivations.lit_modules.probes.exact_probes import ExactProbeSweep
from exactivations.lit_modules.probes.probe_evaluation import evaluate
from exactivations.lit_modules.probes.probe_file import load_probes, save_probes
from exactivations.lit_modules.probes.scoring import Scorer
from exactivations.lit_modules.probes.trained_probes import TrainedProbeSweep

__all__ = ["ExactProbeSweep", "Scorer", "TrainedProbeSweep", "evaluate", "load_probes", "save_probes"]
