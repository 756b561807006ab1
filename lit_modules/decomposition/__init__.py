"""Linear maps of a model as sums of components, and which of them are needed."""

from exactivations.lit_modules.decomposition.causal_importance import CausalImportanceFunction
from exactivations.lit_modules.decomposition.ci_function_file import causal_importances, read_ci_function, write_ci_function
from exactivations.lit_modules.decomposition.ci_optimisation import CiOptimisation
from exactivations.lit_modules.decomposition.component_file import read_components, write_components
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.lit_modules.decomposition.decomposition import Decomposition, Objective
from exactivations.lit_modules.decomposition.optimised_sets import CiOptions

__all__ = [
    "CausalImportanceFunction",
    "CiOptimisation",
    "CiOptions",
    "ComponentModel",
    "Decomposition",
    "Objective",
    "causal_importances",
    "read_ci_function",
    "read_components",
    "write_ci_function",
    "write_components",
]
