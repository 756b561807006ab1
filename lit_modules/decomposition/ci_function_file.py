"""A trained causal-importance function, saved beside the components it reads and put to work on them again."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from exactivations.lit_modules.decomposition.causal_importance import CausalImportanceFunction, hard_sigmoid
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.lit_modules.decomposition.decomposition import raw_importances
from exactivations.lit_modules.models.language_model import weights_hash
from exactivations.store.described_file import read_described, write_described
from exactivations.store.errors import InvalidInputError

KIND, FORMAT_VERSION, COMMAND = "ci_function", 1, "decompose"


def write_ci_function(path: str | Path, ci_function: CausalImportanceFunction, components: ComponentModel) -> Path:
    """Writes the function and which components it belongs to: ci_function.safetensors and ci_function.json.

    Args:
        path: The folder, or the file (*.safetensors).
        ci_function: The function.
        components: What it was trained with, on the device where they are.

    Returns:
        The path of the file.
    """
    content = {"components_hash": weights_hash(components), "n_hidden": ci_function.n_hidden}
    tensors = {
        f"{name}/{key}": tensor for name, of_map in ci_function.of_maps.items() for key, tensor in of_map.state_dict().items()
    }
    return write_described(path, KIND, FORMAT_VERSION, content, tensors)


def read_ci_function(path: str | Path, components: ComponentModel) -> CausalImportanceFunction:
    """Reads a function, onto the device of the components.

    Args:
        path: What `write_ci_function` wrote.
        components: The very components it was trained with; see `read_components`.

    Raises:
        StoreError: If there is no such file, or it is damaged.
        InvalidInputError: If the components are others.
    """
    path, tensors, content = read_described(path, KIND, FORMAT_VERSION, COMMAND)
    found = weights_hash(components)
    if found != content["components_hash"]:
        raise InvalidInputError(
            f"{path} belongs to components {content['components_hash']}, and these are {found}: read the "
            "components from beside it, with the model they were made of"
        )
    n_components = {name: of_map.n_components for name, of_map in components.maps.items()}
    ci_function = CausalImportanceFunction(n_components, content["n_hidden"]).to(next(iter(components.maps.values())).V)
    for name, of_map in ci_function.of_maps.items():
        of_map.load_state_dict({key: tensors[f"{name}/{key}"] for key in of_map.state_dict()})
    return ci_function


@torch.no_grad()
def causal_importances(
    components: ComponentModel, ci_function: CausalImportanceFunction, input_ids: Tensor
) -> dict[str, Float[Tensor, "*leading c"]]:
    """Returns the causal importance, in [0, 1], of each component at each position, by map.

    Args:
        components: A model and its components.
        ci_function: That was trained with them.
        input_ids: int64 [B, L], without padding; or the features [B, F] of a toy model.
    """
    _, raw = raw_importances(components, ci_function, input_ids)
    return {path: hard_sigmoid(values) for path, values in raw.items()}
