"""LightningModules: what is computed, and the model-side helpers that they need."""

from exactivations.lit_modules.amplification import LogitDiffAmplifier, StandardGeneration
from exactivations.lit_modules.attribution import LocalAttributor
from exactivations.lit_modules.decomposition import CiOptimisation, Decomposition
from exactivations.lit_modules.extraction import ActivationExtractor, LiveActivations
from exactivations.lit_modules.models import ModelOptions
from exactivations.lit_modules.moderation import PrototypeModerator
from exactivations.lit_modules.probes import ExactProbeSweep, TrainedProbeSweep
from exactivations.lit_modules.steering import Ablate, Add, Generated, Replace, steering
from exactivations.lit_modules.verification import verify_store

__all__ = [
    "Ablate",
    "ActivationExtractor",
    "Add",
    "CiOptimisation",
    "Decomposition",
    "ExactProbeSweep",
    "Generated",
    "LiveActivations",
    "LocalAttributor",
    "LogitDiffAmplifier",
    "ModelOptions",
    "PrototypeModerator",
    "Replace",
    "StandardGeneration",
    "TrainedProbeSweep",
    "steering",
    "verify_store",
]
