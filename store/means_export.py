"""Means as files for other programs: safetensors, npz, npy, and control vectors of llama.cpp (gguf)."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import Tensor

from exactivations.store.control_vector import layers_of, model_hint, write_control_vector
from exactivations.store.errors import InvalidInputError, StoreError
from exactivations.store.mean_activations import MeanActivations
from exactivations.store.run_folder import fingerprint_of
from exactivations.store.shard import publishing
from exactivations.store.tensor_file import METADATA_KEY

FORMATS = (".safetensors", ".npz", ".npy", ".gguf")
OF_GROUPS = ("difference", "normalised-difference")
WHATS = ("mean", "normalised", *OF_GROUPS)


def export_means(
    means: MeanActivations,
    path: str | Path,
    *,
    names: list[str] | None = None,
    what: str = "mean",
    groups: tuple[str, str] | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes vectors, float32 [d] each, to a file whose suffix says the format. The same means give the same bytes.

    .safetensors: tensors by vector name; what they are is in the metadata, as JSON under "exactivations". .npz: arrays by vector
    name, "/" included. .npy: the array of one vector. .gguf: a control vector of llama.cpp, see `control_vector`.

    Args:
        means: The means.
        path: The file, which exists whole or not at all.
        names: The vectors; None: all.
        what: "mean", "normalised" (a mean divided by its Euclidean norm), "difference" (of the means of two groups) or
            "normalised-difference" (that divided by its norm).
        groups: For differences: the mean of the first minus that of the second.
        overwrite: Replace a file that is there.

    Returns:
        The names of the vectors that were written.

    Raises:
        InvalidInputError: If that cannot be exported so; then nothing was written.
        StoreError: If the file cannot be written; then what was there before is there still.
    """
    path, suffix = Path(path), Path(path).suffix
    if suffix not in FORMATS:
        raise InvalidInputError(f"{path} must end in {', '.join(FORMATS)}, which chooses the format; it ends in {suffix!r}")
    _check_what(what, groups)
    names = _checked(means, names)
    if suffix == ".npy" and len(names) > 1:
        raise InvalidInputError(
            f"an .npy file holds one vector, these are {len(names)}: {', '.join(names)}. Choose one (--vector), or export to .npz "
            "or .safetensors, which hold all"
        )
    layers = layers_of(map(means.vector, names)) if suffix == ".gguf" else {}
    values = {name: _value(means, name, what, groups) for name in names}
    if path.is_dir() or (path.exists() and not overwrite):
        remedy = "name a file in it" if path.is_dir() else "name another file, or pass overwrite=True (--overwrite)"
        raise InvalidInputError(f"{path} is there already: {remedy}")
    about = _about(means, names, what, groups)
    try:
        with publishing(path) as temporary:
            if suffix == ".gguf":
                directions = {layer: values[name] for layer, name in layers.items()}
                hint = model_hint(means.file.identity.get("model_class", "unknown"))
                write_control_vector(temporary, directions, hint, about)
            elif suffix == ".safetensors":
                temporary.write_bytes(_safetensors(values, about))
            else:
                _write_numpy(temporary, values, several=suffix == ".npz")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}; see that its folder is there and has room, and export again") from error
    return names


def _check_what(what: str, groups: tuple[str, str] | None) -> None:
    if what not in WHATS:
        raise InvalidInputError(f"what is exported must be one of {', '.join(WHATS)}, got {what!r}")
    if what in OF_GROUPS and (groups is None or len(groups) != 2 or groups[0] == groups[1]):
        raise InvalidInputError(f"a {what} is the mean of one group minus that of another: name two groups, got {groups}")
    if what not in OF_GROUPS and groups is not None:
        raise InvalidInputError(f"groups {groups} are for {' and '.join(OF_GROUPS)}, a {what} is of all samples: leave them out")


def _checked(means: MeanActivations, names: list[str] | None) -> list[str]:
    names = means.names if names is None else list(names)
    for name in names:
        means.vector(name)  # refuses one that there is not
    if not names or len(set(names)) != len(names):
        raise InvalidInputError(f"name the vectors to export, each once, of {', '.join(means.names)}; got {names}")
    return names


def _value(means: MeanActivations, name: str, what: str, groups: tuple[str, str] | None) -> npt.NDArray[np.float32]:
    value: Tensor
    if groups is None:
        value = means.normalised(name) if what == "normalised" else means.mean(name)
    else:
        value = means.difference(name, *groups)
        if what == "normalised-difference":
            exact = value.double()
            norm = float(exact.norm())
            if norm == 0:
                raise InvalidInputError(
                    f"{name} has the same mean in {groups[0]} and {groups[1]}: their difference has no direction. Leave it out "
                    "(--vector), or export the difference as it is"
                )
            value = (exact / norm).float()
    if not torch.isfinite(value).all():
        dimension = int((~torch.isfinite(value)).nonzero()[0])
        raise InvalidInputError(
            f"the {what} of {name} is {float(value[dimension])} at dimension {dimension}: a group without samples, or a value that "
            "float32 does not hold. Leave it out (--vector)"
        )
    array: npt.NDArray[np.float32] = value.numpy()
    return array


def _about(means: MeanActivations, names: list[str], what: str, groups: tuple[str, str] | None) -> str:
    """Says as JSON what the vectors are: what a reader needs to find the run again, or to see that it is another."""
    content = {
        "what": what,
        "groups": [{"name": group, "n_samples": means.count(names[0], group)} for group in groups or ()],
        "n_samples": means.n_samples,
        "datasets": [part.dataset for part in means.file.parts],
        "verified": all(part.verified for part in means.file.parts),
        "model": means.file.about,
        "identity": means.file.identity,
        "fingerprint": fingerprint_of(means.file.identity),
    }
    return json.dumps(content, sort_keys=True)


def _safetensors(values: Mapping[str, npt.NDArray[np.float32]], about: str) -> bytes:
    """Returns a safetensors file, its metadata in order: safetensors itself writes several keys in a new order every time."""
    content = save({name: torch.from_numpy(value) for name, value in values.items()}, {"format": "pt", METADATA_KEY: about})
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + content[end:]


def _write_numpy(path: Path, values: Mapping[str, npt.NDArray[np.float32]], *, several: bool) -> None:
    with path.open("wb") as file:  # numpy would add a suffix to a name
        if several:
            np.savez(file, allow_pickle=False, **values)
        else:
            (value,) = values.values()
            np.save(file, value, allow_pickle=False)
