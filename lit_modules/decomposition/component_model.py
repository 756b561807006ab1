"""ComponentModel: a model of which chosen linear maps are sums of components."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from exactivations.lit_modules.decomposition.component_linear import ComponentLinear, LinearMap, singular_components, weight_of
from exactivations.lit_modules.models.language_model import weights_hash
from exactivations.store.errors import InvalidInputError


class ComponentModel(nn.Module):
    """A model with some of its nn.Linear and Conv1D maps replaced by `ComponentLinear`: as it was, until told otherwise.

    The model is taken over: its maps are replaced in place and its own weights are no longer trained (copy it before if it is
    needed as it was). V and U are the only parameters that require gradients.

    Args:
        model: Any module; a Hugging Face model or a toy.
        components: V [d_in, C] and U [C, d_out] by the path of the map; see `from_svd` and `from_random`.

    Attributes:
        model: Runs as usual: `component_model.model(input_ids)`.
        maps: The maps by path, in the order of the model's modules.
        original_hash: Which weights the model had (`weights_hash`).

    Raises:
        InvalidInputError: If a path is no linear map of the model, computes something else than x @ weight + bias, or V and U do
            not fit it.
    """

    def __init__(self, model: nn.Module, components: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        linear = linear_maps(model)
        if not components:
            raise InvalidInputError("no map was named: give V and U of at least one")
        for path in components:
            if path not in linear:
                raise InvalidInputError(f"{path!r} is no linear map of {type(model).__name__}: {_nearest(path, linear)}")
        self.original_hash = weights_hash(model)
        self.maps: dict[str, ComponentLinear] = {}
        for path, original in linear.items():
            if path in components:
                try:
                    self.maps[path] = ComponentLinear(original, *components[path])
                except InvalidInputError as error:
                    raise InvalidInputError(f"{path}: {error}") from error
        model.requires_grad_(False)
        for path, component_linear in self.maps.items():
            model.set_submodule(path, component_linear)
        self.model = model

    @classmethod
    def from_svd(cls, model: nn.Module, patterns: Sequence[str], n_components: int | None = None) -> Self:
        """Takes the largest singular components of each map; all of them give the map back exactly.

        Args:
            model: Is taken over.
            patterns: As in `maps_matching`.
            n_components: Of each map. Default: all, min(d_in, d_out).

        Raises:
            InvalidInputError: If a pattern matches no map, or a map has fewer components.
        """
        found = {}
        for path, linear in maps_matching(model, patterns).items():
            try:
                found[path] = singular_components(weight_of(linear), n_components)
            except InvalidInputError as error:
                raise InvalidInputError(f"{path}: {error}") from error
        return cls(model, found)

    @classmethod
    def from_random(cls, model: nn.Module, patterns: Sequence[str], n_components: int, seed: int) -> Self:
        """Draws V and U at random, where training begins: normal, of a size that V @ U keeps the variance of what it reads.

        Raises:
            InvalidInputError: If a pattern matches no map, or n_components is below 1.
        """
        if n_components < 1:
            raise InvalidInputError(f"n_components must be at least 1, got {n_components}")
        generator = torch.Generator().manual_seed(seed)
        found = {}
        for path, linear in maps_matching(model, patterns).items():
            d_in, d_out = weight_of(linear).shape
            V = torch.randn(d_in, n_components, generator=generator) / d_in**0.5
            found[path] = V, torch.randn(n_components, d_out, generator=generator) / n_components**0.5
        return cls(model, found)

    @contextmanager
    def running(self, forwards: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Puts other forward passes in the place of maps inside the `with` block; maps that are not named run as before.

        Args:
            forwards: By path: from what the map reads, [..., d_in], to what it writes, [..., d_out].

        Raises:
            InvalidInputError: If there is no such map; in a forward pass, if it uses a map twice.
        """
        used: set[str] = set()

        def once(path: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def run(x: Tensor) -> Tensor:
                if path in used:
                    raise InvalidInputError(
                        f"map {path} runs twice in one forward pass: what its components do has no single place, so leave it out"
                    )
                used.add(path)
                return forward(x)

            return run

        unknown = [path for path in forwards if path not in self.maps]
        if unknown:
            raise InvalidInputError(f"{unknown[0]!r} has no components: {_nearest(unknown[0], self.maps)}")
        with ExitStack() as stack:
            stack.callback(self.model.register_forward_pre_hook(lambda module, args: used.clear()).remove)
            for path, forward in forwards.items():
                stack.enter_context(self.maps[path].running_as(once(path, forward)))
            yield

    @contextmanager
    def masked(
        self,
        masks: Mapping[str, Float[Tensor, "... c"]],
        delta_masks: Mapping[str, Float[Tensor, "..."]] | None = None,
    ) -> Iterator[None]:
        """Runs maps as the sum of their components times masks inside the `with` block; maps that are not named as the original.

        Args:
            masks: By path; [B, L, C] in a language model, [B, C] in a toy.
            delta_masks: Of what the components lack, by path; [B, L] or [B]. Maps not named run without it.

        Raises:
            InvalidInputError: If there is no such map, or a delta is masked whose components are not; in a forward pass, if masks
                do not fit, or it uses a map twice.
        """
        deltas = delta_masks or {}
        alone = sorted(deltas.keys() - masks.keys())
        if alone:
            raise InvalidInputError(f"a delta mask was given for {alone[0]}, but no mask of its components: give both")

        def masked_map(path: str) -> Callable[[Tensor], Tensor]:
            def run(x: Tensor) -> Tensor:
                _check_mask(path, "mask", masks[path], (*x.shape[:-1], self.maps[path].n_components))
                if path in deltas:
                    _check_mask(path, "delta mask", deltas[path], x.shape[:-1])
                return self.maps[path].masked(x, masks[path], deltas.get(path))

            return run

        with self.running({path: masked_map(path) for path in masks}):
            yield

    @contextmanager
    def inner_activations(self) -> Iterator[dict[str, Float[Tensor, "... c"]]]:
        """Yields a dict that forward passes of the original model fill with x @ V of each map, with gradients to V.

        Raises:
            InvalidInputError: In a forward pass that uses a map twice.
        """
        found: dict[str, Tensor] = {}

        def reading(path: str) -> Callable[[Tensor], Tensor]:
            def run(x: Tensor) -> Tensor:
                found[path] = x @ self.maps[path].V
                out: Tensor = self.maps[path].original(x)
                return out

            return run

        with self.running({path: reading(path) for path in self.maps}):
            yield found


def linear_maps(model: nn.Module) -> dict[str, LinearMap]:
    """Returns the nn.Linear and Conv1D modules of a model by path, those whose weights are plain numbers."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module.weight.is_floating_point()
    }


def maps_matching(model: nn.Module, patterns: Sequence[str]) -> dict[str, LinearMap]:
    """Returns the linear maps whose paths match one of the patterns, by path, in the order of the model's modules.

    Args:
        model: The model.
        patterns: As file names are matched: `*` is anything, dots too.

    Raises:
        InvalidInputError: If a pattern matches none, with the nearest paths.
    """
    linear = linear_maps(model)
    if not patterns:
        raise InvalidInputError(f"no pattern was given: name linear maps of {type(model).__name__}, such as '*'")
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in linear):
            raise InvalidInputError(f"no linear map of {type(model).__name__} matches {pattern!r}: {_nearest(pattern, linear)}")
    return {path: linear[path] for path in linear if any(fnmatchcase(path, pattern) for pattern in patterns)}


def _nearest(name: str, paths: Mapping[str, object]) -> str:
    if not paths:
        return "it has none"
    return f"the nearest of {len(paths)} are {', '.join(difflib.get_close_matches(name, paths, n=4, cutoff=0.0))}"


def _check_mask(path: str, what: str, mask: Tensor, shape: Sequence[int]) -> None:
    try:
        fits = torch.broadcast_shapes(mask.shape, shape) == torch.Size(shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        fits = False
    if not fits:
        raise InvalidInputError(f"{path}: its {what} is {list(mask.shape)}, the forward pass needs {list(shape)}")
