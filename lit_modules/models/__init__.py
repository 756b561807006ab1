"""Hugging Face models: loading and cutting them, hook points, what is safe on them, and what they give for a sample alone."""

from exactivations.lit_modules.models.doctor import RIGHT_PADDING, trial_for
from exactivations.lit_modules.models.ground_truth import GroundTruth
from exactivations.lit_modules.models.hook_points import HookPoint, resolve_hook_points
from exactivations.lit_modules.models.language_model import ModelOptions, load_causal_model, load_model

__all__ = [
    "RIGHT_PADDING",
    "GroundTruth",
    "HookPoint",
    "ModelOptions",
    "load_causal_model",
    "load_model",
    "resolve_hook_points",
    "trial_for",
]
