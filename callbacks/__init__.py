"""Callbacks: what is kept and watched while a Trainer runs."""

from exactivations.callbacks.activation_writer import ActivationWriter
from exactivations.callbacks.ground_truth_check import GroundTruthCheck
from exactivations.callbacks.memory_watch import MemoryWatch
from exactivations.callbacks.running_mean import RunningMean
from exactivations.callbacks.token_progress import TokenProgress

__all__ = ["ActivationWriter", "GroundTruthCheck", "MemoryWatch", "RunningMean", "TokenProgress"]
