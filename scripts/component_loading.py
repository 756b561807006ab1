"""A decomposed model, as commands name it: by a file of components, or by the singular components of some of its maps."""

from exactivations.lit_modules.decomposition.component_file import read_components
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.lit_modules.models.language_model import ModelOptions, load_causal_model
from exactivations.store.errors import InvalidInputError


def load_components(
    model: str, options: ModelOptions, components: str | None, svd: list[str] | None, n_components: int | None
) -> ComponentModel:
    """Loads a causal language model onto the host, and its components.

    Args:
        model: "demo" (embedded), a Hugging Face hub id, or a local path.
        options: How it is loaded.
        components: The folder or file of components that were made of it.
        svd: Or patterns over the paths of maps that their singular values decompose.
        n_components: With svd: so many of each map, the largest; None: all.

    Raises:
        InvalidInputError: If not one of components and svd is given, the model lacks its head or any other weight, or they do not
            fit each other.
    """
    if (components is None) == (svd is None):
        raise InvalidInputError("give --components FILE, or --svd PATTERNS to take the singular components of maps; one of the two")
    if components is not None and n_components is not None:
        raise InvalidInputError("--n-components is for --svd: a file of components has them already")
    whole = load_causal_model(model, options)
    if components is not None:
        return read_components(components, whole)
    return ComponentModel.from_svd(whole, svd or [], n_components)
