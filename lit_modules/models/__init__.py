"""Hugging Face models: loading and cutting them, hook points, what is safe on them, and what they give for a sample alone."""

from exactivations.lit_modules.models.ground_truth import GroundTruth
from exactivations.lit_modules.models.language_model import ModelOptions, load_causal_model, load_model

__all__ = ["GroundTruth", "ModelOptions", "load_causal_model", "load_model"]
