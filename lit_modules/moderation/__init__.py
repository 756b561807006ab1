"""Latent prototype moderation: classes by their means in activation space."""

from exactivations.lit_modules.moderation.live_moderation import LiveModerator
from exactivations.lit_modules.moderation.moderation_results import ModerationResults, moderation_results
from exactivations.lit_modules.moderation.moderator_file import load_moderator, save_moderator
from exactivations.lit_modules.moderation.prototype_moderator import PrototypeModerator
from exactivations.lit_modules.moderation.prototypes import Prototypes

__all__ = [
    "LiveModerator",
    "ModerationResults",
    "PrototypeModerator",
    "Prototypes",
    "load_moderator",
    "moderation_results",
    "save_moderator",
]
