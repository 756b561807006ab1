"""Components of a model's maps, saved and put back into the model they were made of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from exactivations.lit_modules.decomposition.component_linear import weight_of
from exactivations.lit_modules.decomposition.component_model import ComponentModel, linear_maps
from exactivations.lit_modules.models.language_model import weights_hash
from exactivations.store.described_file import read_described, write_described
from exactivations.store.errors import InvalidInputError

KIND, FORMAT_VERSION, COMMAND = "components", 1, "decompose"


def write_components(path: str | Path, components: ComponentModel, about: Mapping[str, Any]) -> Path:
    """Writes V and U of all maps, and which model they belong to: components.safetensors and components.json.

    Args:
        path: The folder, or the file (*.safetensors).
        components: The model.
        about: How the model is called and what is worth knowing of how they were made, for people; JSON.

    Returns:
        The path of the file.
    """
    tensors: dict[str, Tensor] = {}
    for name, component_linear in components.maps.items():
        tensors |= {f"{name}/V": component_linear.V, f"{name}/U": component_linear.U}
    content = {
        "about": dict(about),
        "original_hash": components.original_hash,
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "maps": {
            name: {"d_in": m.weight.shape[0], "d_out": m.weight.shape[1], "n_components": m.n_components}
            for name, m in components.maps.items()
        },
    }
    return write_described(path, KIND, FORMAT_VERSION, content, tensors)


def read_components(path: str | Path, model: nn.Module) -> ComponentModel:
    """Puts saved components into the model that they were made of, which is taken over.

    Args:
        path: What `write_components` wrote.
        model: With the very weights that it had then, in the same dtype.

    Raises:
        StoreError: If there is no such file, or it is damaged.
        InvalidInputError: If the model lacks a map, has it in another shape, or has other weights.
    """
    path, tensors, content = read_described(path, KIND, FORMAT_VERSION, COMMAND)
    linear = linear_maps(model)
    called = f"{path} has components of {content['about'].get('model', 'a model')}"
    for name, shape in content["maps"].items():
        if name not in linear:
            raise InvalidInputError(
                f"{called}, with map {name}, which {type(model).__name__} lacks: name the model they were made of"
            )
        found, expected = list(weight_of(linear[name]).shape), [shape["d_in"], shape["d_out"]]
        if found != expected:
            raise InvalidInputError(
                f"{called}, where map {name} is {expected}; in this {type(model).__name__} it is {found}: name the model they were "
                "made of"
            )
    dtype = str(weight_of(linear[name]).dtype).removeprefix("torch.")
    if dtype != content["dtype"]:
        raise InvalidInputError(f"{called} in {content['dtype']}; this one is in {dtype}: load it in {content['dtype']}")
    found_hash = weights_hash(model)
    if found_hash != content["original_hash"]:
        raise InvalidInputError(
            f"{called} with weights {content['original_hash']}; this {type(model).__name__} has others ({found_hash}): name the "
            "model they were made of, in its revision"
        )
    return ComponentModel(model, {name: (tensors[f"{name}/V"], tensors[f"{name}/U"]) for name in content["maps"]})
