"""LightningModules: what is computed, and the model-side helpers that they need.

Here are the names of extraction and probes; the other systems have theirs in their folders.
"""

from exactivations.lit_modules.extraction import ActivationExtractor, LiveActivations, activations
from exactivations.lit_modules.models import ModelOptions
from exactivations.lit_modules.probes import ExactProbeSweep, TrainedProbeSweep
from exactivations.lit_modules.verification import verify_store

__all__ = [
    "ActivationExtractor",
    "ExactProbeSweep",
    "LiveActivations",
    "ModelOptions",
    "TrainedProbeSweep",
    "activations",
    "verify_store",
]
