"""Activations of planned batches, of live samples, and the description that a run is made again from."""

from exactivations.lit_modules.extraction.extractor import ActivationExtractor
from exactivations.lit_modules.extraction.in_memory import activations
from exactivations.lit_modules.extraction.live_activations import LiveActivations

__all__ = ["ActivationExtractor", "LiveActivations", "activations"]
