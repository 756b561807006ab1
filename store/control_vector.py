"""Control vectors in the format of llama.cpp (GGUF): which vectors can be one, and how they are written.

Format and numbering are those of its reader, looked up in ggml-org/llama.cpp. `common_control_vector_load_one` in
common/common.cpp takes float32 tensors [d] named "direction.N", all of one width, refuses N = 0, adds up what has the same N, and
looks at no metadata. `llama_adapter_cvec::apply` and `apply_to` in src/llama-adapter.cpp add direction.N to the state of the layer
`il == N`, counted from 0; the graphs in src/models do so (`build_cvec`) after the feed-forward's residual, before `l_out`, the
block's output. So direction.N belongs to resid_post.N, and block 0 has none. The metadata are those that llama.cpp's
tools/cvector-generator and vgel/repeng (repeng/extract.py) write: layer_count is how many directions there are.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from exactivations.store.errors import InvalidInputError
from exactivations.store.vectors import Vector

ARCHITECTURE = "controlvector"
ABOUT_KEY = "exactivations.about"
# Classes of transformers whose family has another name in llama.cpp than the class without "Model".
OTHER_HINTS = {
    "cohere": "command-r",
    "deepseekv2": "deepseek2",
    "deepseekv3": "deepseek2",
    "gemma3text": "gemma3",
    "gptbigcode": "starcoder",
    "gptoss": "gpt-oss",
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
}


def model_hint(model_class: str) -> str:
    """Returns what llama.cpp calls a model's family: "llama" for LlamaModel. It is told to the reader; nothing depends on it."""
    name = model_class.removesuffix("Model").lower()
    return OTHER_HINTS.get(name, name)


def layers_of(vectors: Iterable[Vector]) -> dict[int, str]:
    """Returns the names of vectors by the block, from 1, to whose output llama.cpp would add them.

    Raises:
        InvalidInputError: If one cannot be a direction, with its name and the reason; or two are of the same block.
    """
    layers: dict[int, str] = {}
    for vector in vectors:
        layer = _layer_of(vector)
        if layer in layers:
            raise InvalidInputError(
                f"{layers[layer]} and {vector.name} are both of block {layer}, and llama.cpp would add up the two: choose one of "
                "them (--vector)"
            )
        layers[layer] = vector.name
    return layers


def _layer_of(vector: Vector) -> int:
    if len(vector.hook_points) > 1:
        reason = f"is an average over {len(vector.hook_points)} hook points, and a direction is added to one block's output"
    elif (match := re.fullmatch(r"resid_post\.(\d+)", vector.place)) is None:
        reason = "is not of a block's output (resid_post.N), the one state that llama.cpp adds directions to"
    elif len(vector.poolings) > 1:
        reason = f"is {len(vector.poolings)} poolings side by side, so many times as wide as the state it would be added to"
    elif match[1] == "0":
        reason = "is of block 0, for which llama.cpp takes no direction: the first is that of block 1"
    else:
        return int(match[1])
    raise InvalidInputError(
        f"{vector.name} cannot be in a control vector (.gguf): it {reason}. Leave it out (--vector names what is wanted: one "
        "pooling of resid_post.N, N at least 1), or export to .safetensors or .npz, which hold any vector"
    )


def write_control_vector(path: Path, directions: Mapping[int, npt.NDArray[np.float32]], hint: str, about: str) -> None:
    """Writes a control vector by the gguf package. The same content gives the same bytes.

    Args:
        path: The file. It is written in place: give it another name until it is whole.
        directions: float32 [d] by block.
        hint: See `model_hint`.
        about: What the directions are, for people; llama.cpp does not read it.

    Raises:
        InvalidInputError: If the gguf package is not installed; then there is no file.
        OSError: If it cannot be written.
    """
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise InvalidInputError(
            "control vectors (.gguf) are written by the package gguf, which is not installed: pip install '.[gguf]' in the clone"
        ) from error
    writer = GGUFWriter(path, ARCHITECTURE)
    try:
        writer.add_string(f"{ARCHITECTURE}.model_hint", hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        writer.add_string(ABOUT_KEY, about)
        for layer in sorted(directions):
            writer.add_tensor(f"direction.{layer}", directions[layer])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
