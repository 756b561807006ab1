"""LightningModules: what is computed, and the model-side helpers that they need."""

from exactivations.lit_modules.extraction import ActivationExtractor
from exactivations.lit_modules.language_model import ModelOptions
from exactivations.lit_modules.store_check import verify_store

__all__ = ["ActivationExtractor", "ModelOptions", "verify_store"]
