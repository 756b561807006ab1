"""The model's own head, put on a stored state: it must predict what the model predicts for the sample alone.

Stored states take the place of the body's output in an ordinary forward pass, so that everything which follows (the head,
soft-capping, scaling) is the model's own code.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from exactivations.lit_modules.models.ground_truth import computing_in, relative_error, tolerance_for
from exactivations.lit_modules.models.hook_points import dissect
from exactivations.lit_modules.models.language_model import evaluating, forward_arguments
from exactivations.store.pooling_names import TOKENS, position_of

LOGIT_RANGE = 50.0  # what lies further below the largest logit has no probability; some models put -inf there
MOST_POSITIONS = 128  # of one sample, evenly spread: each costs a row as wide as the vocabulary


@dataclass(frozen=True)
class NextTokens:
    """How the head on a sample's stored states agreed: see `exactivations.store.verification.NextTokenFigures`."""

    name: str
    sample_index: int
    positions: int
    same_top1: int
    difference: float
    error: float
    rounding: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the logits are the model's own, up to rounding."""
        return math.isfinite(self.error) and self.error <= self.tolerance


@dataclass(frozen=True)
class StoredStates:
    """States [k, D] of some tokens of a sample, as stored, and their positions int64 [k] in it, ascending."""

    values: Tensor
    positions: Tensor

    def thinned(self) -> "StoredStates":
        """Returns at most MOST_POSITIONS of them, evenly spread."""
        if len(self.positions) <= MOST_POSITIONS:
            return self
        chosen = torch.linspace(0, len(self.positions) - 1, MOST_POSITIONS).round().long()
        return StoredStates(self.values[chosen], self.positions[chosen])


class NextTokenCheck:
    """Applies a causal language model's head to stored states.

    Args:
        whole: The model with its head; it is left as it was.
        body: The model inside it whose states were stored.
    """

    def __init__(self, whole: PreTrainedModel, body: PreTrainedModel) -> None:
        assert whole.base_model is body
        self._whole, self._body, self._anatomy = whole, body, dissect(body)
        if any(parameter.device != body.device for parameter in whole.parameters()) and not hasattr(whole, "hf_device_map"):
            whole.to(body.device)  # type: ignore[arg-type]  # transformers' own annotation lacks torch.device
        self._answerer: nn.Module = body
        self._then = self._what_follows()

    def applies_to(self, name: str) -> bool:
        """Whether an activation "<hook point>/<pooling>" holds states of single tokens that the head can be put on."""
        hook_point, _, pooling = name.rpartition("/")
        return (pooling == TOKENS or position_of(pooling) is not None) and hook_point in self._then

    @torch.no_grad()
    def check(
        self, sample_index: int, input_ids: Int[Tensor, " l"], stored: dict[str, StoredStates], dtypes: list[torch.dtype]
    ) -> list[NextTokens]:
        """Compares the head on stored states of one sample with the model's own distribution.

        Args:
            sample_index: The sample, for the report.
            input_ids: int64 [L], the sample's ids.
            stored: By "<hook point>/<pooling>", to which `applies_to` says yes.
            dtypes: As in `tolerance_for`.
        """
        if not stored:
            return []
        stored = {name: states.thinned() for name, states in stored.items()}
        positions = torch.tensor(sorted({p for states in stored.values() for p in states.positions.tolist()}))
        own, output = self._own(input_ids, positions)
        in_float32 = own
        if self._body.dtype != torch.float32:
            with computing_in(self._whole, torch.float32):
                in_float32, _ = self._own(input_ids, positions)
        results = []
        for name, states in stored.items():
            found = self._from_states(states, self._then[name.rpartition("/")[0]], input_ids, output)
            rows = torch.searchsorted(positions, states.positions)
            rounding = relative_error(_centred(own[rows]), _centred(in_float32[rows]))
            rounding = rounding.maximum(self._rounding_of_storing(states, input_ids, output, own[rows]))
            results.append(_judge(name, sample_index, found, own[rows], rounding.maximum(rounding.median()), dtypes))
        return results

    def _own(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, Any]:
        """Returns the model's own logits [k, V] after these positions, and what its body put out."""
        outputs: list[Any] = []
        handle = self._answerer.register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            return self._logits(input_ids, positions), outputs[0]
        finally:
            handle.remove()

    def _rounding_of_storing(self, stored: StoredStates, input_ids: Tensor, output: Any, own: Tensor) -> Tensor:
        """Returns what it does to the logits, float64 [k], that states are stored in a lower precision."""
        true = output["last_hidden_state"][0]
        if torch.finfo(stored.values.dtype).eps <= torch.finfo(self._body.dtype).eps:
            return torch.zeros(len(own), dtype=torch.float64)
        rounded = StoredStates(true[stored.positions.to(true.device)].to(stored.values.dtype), stored.positions)
        return relative_error(_centred(self._from_states(rounded, nn.Identity(), input_ids, output)), _centred(own))

    def _from_states(self, stored: StoredStates, follower: nn.Module, input_ids: Tensor, output: Any) -> Tensor:
        """Returns the logits [k, V] that follow from stored states, through the follower, in the computed ones' place."""
        states = output["last_hidden_state"].clone()
        rows = stored.values.to(states.device, states.dtype)  # Mamba's residual stream is float32 in half precision too
        states[0, stored.positions.to(states.device)] = follower(rows[None])[0].to(states.dtype)
        changed = type(output)(**{**output, "last_hidden_state": states})
        with _answering(self._answerer, changed):
            return self._logits(input_ids, stored.positions)

    def _logits(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Returns the next-token logits, float32 [k, V] on the host, after these positions."""
        arguments: dict[str, Any] = forward_arguments(self._whole)
        positions = positions.to(self._body.device)
        keeps = "logits_to_keep" in inspect.signature(self._whole.forward).parameters
        if keeps:
            arguments["logits_to_keep"] = positions
        with evaluating(self._whole):
            logits: Tensor = self._whole(input_ids=input_ids[None].to(self._body.device), **arguments).logits[0]
        return (logits if keeps else logits[positions]).float().cpu()

    @torch.no_grad()
    def _what_follows(self) -> dict[str, nn.Module]:
        """Returns, by hook point, what turns its state into what the head receives: nothing, or the final norm.

        A hook point whose state the model changes in another way before the head (some project it once more) is not in it. Looks
        once, in a forward pass of the whole model; some call a module inside their body (OPT its decoder), which then answers.
        """
        blocks, norm_path = self._anatomy.blocks, self._anatomy.final_norm
        if blocks is None:
            return {}
        norm = None if norm_path is None else self._body.get_submodule(norm_path)
        watched = {"body": self._body, "inside": self._body.get_submodule(blocks.rpartition(".")[0])}
        watched |= {"block": self._body.get_submodule(f"{blocks}.{self._anatomy.n_blocks - 1}")}
        watched |= {"norm": norm} if norm is not None else {}
        seen: dict[str, Any] = {}
        with ExitStack() as stack:
            for name, module in watched.items():
                handle = module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
                stack.callback(handle.remove)
            stack.enter_context(evaluating(self._whole))
            ids = torch.arange(4, device=self._body.device)[None]
            self._whole(input_ids=ids, **forward_arguments(self._whole))
            self._answerer = watched["body" if "body" in seen else "inside"]
            received = seen["body" if "body" in seen else "inside"]["last_hidden_state"]
            state = seen["block"][0] if isinstance(seen["block"], tuple | list) else seen["block"]
            then: dict[str, nn.Module] = {}
            if norm is not None and _alike(seen["norm"], received):
                then["final_norm"] = nn.Identity()
            for follower in [nn.Identity()] if norm is None else [norm, nn.Identity()]:
                if _alike(follower(state), received):
                    return {**then, f"resid_post.{self._anatomy.n_blocks - 1}": follower}
        return then


def _judge(name: str, sample_index: int, found: Tensor, own: Tensor, rounding: Tensor, dtypes: list[torch.dtype]) -> NextTokens:
    """Holds logits [k, V] against the model's own. Probabilities are told, logits judged: flat predictions hide wrong states."""
    errors = relative_error(_centred(found), _centred(own))
    allowed = torch.tensor([tolerance_for(dtypes, r) for r in rounding.tolist()], dtype=torch.float64)
    worst = int((errors / allowed).argmax())
    difference = (found.softmax(dim=1) - own.softmax(dim=1)).abs().max()
    return NextTokens(
        name=name,
        sample_index=sample_index,
        positions=len(own),
        same_top1=int((found.argmax(dim=1) == own.argmax(dim=1)).sum()),
        difference=torch.where(torch.isfinite(difference), difference, torch.inf).item(),
        error=errors[worst].item(),
        rounding=rounding[worst].item(),
        tolerance=allowed[worst].item(),
    )


def _centred(logits: Tensor) -> Tensor:
    """Returns logits, float64 [k, V], without their mean, on which no probability depends, and cut off near -inf."""
    logits = logits.double()
    logits = logits.maximum(logits.max(dim=1, keepdim=True).values - LOGIT_RANGE)
    return logits - logits.mean(dim=1, keepdim=True)


def _alike(state: Tensor, received: Tensor) -> bool:
    # In half precision the same norm may run as another kernel; what a model does besides (a projection, a scale) is far more.
    return state.shape == received.shape and torch.allclose(state.to(received.dtype), received, rtol=1e-2, atol=1e-3)


@contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """Lets a module answer with this output, without computing, inside the `with` block."""
    before = vars(module).get("forward")  # a caller may have patched it too
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
