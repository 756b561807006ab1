"""Logit diff amplification: generation by two models at once, its server, and what it brings to light."""

from exactivations.lit_modules.amplification.amplifier import AmplifyOptions, LogitDiffAmplifier
from exactivations.lit_modules.amplification.logit_difference import LogitDifferenceProcessor
from exactivations.lit_modules.amplification.serving_engine import ServingEngine
from exactivations.lit_modules.amplification.serving_tickets import Ask, Drawn, Limits, Observer
from exactivations.lit_modules.amplification.standard_generation import StandardGeneration

__all__ = [
    "AmplifyOptions",
    "Ask",
    "Drawn",
    "Limits",
    "LogitDiffAmplifier",
    "LogitDifferenceProcessor",
    "Observer",
    "ServingEngine",
    "StandardGeneration",
]
