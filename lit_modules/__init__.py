"""LightningModules: what is computed, and the model-side helpers that they need."""

from exactivations.lit_modules.exact_probes import ExactProbeSweep
from exactivations.lit_modules.extraction import ActivationExtractor
from exactivations.lit_modules.language_model import ModelOptions
from exactivations.lit_modules.live_activations import LiveActivations
from exactivations.lit_modules.store_check import verify_store
from exactivations.lit_modules.trained_probes import TrainedProbeSweep

__all__ = ["ActivationExtractor", "ExactProbeSweep", "LiveActivations", "ModelOptions", "TrainedProbeSweep", "verify_store"]
