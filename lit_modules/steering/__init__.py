"""Steering: vectors added to, projected out of, or put in the place of a model's states while it runs."""

from exactivations.lit_modules.steering.edits import Ablate, Add, Edit, Replace
from exactivations.lit_modules.steering.steered_positions import Generated, Positions
from exactivations.lit_modules.steering.steering import steering

__all__ = ["Ablate", "Add", "Edit", "Generated", "Positions", "Replace", "steering"]
