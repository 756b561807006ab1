"""Near ties of routers: a token that goes to other experts in a batch than alone, since rounding tipped the choice."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from exactivations.lit_modules.models.hook_points import BLOCK_KINDS

N_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
N_CHOSEN = ("num_experts_per_tok", "moe_top_k", "moe_k", "top_k")


def chosen_experts(model: PreTrainedModel, run: Callable[[], Any]) -> dict[str, Tensor]:
    """Runs the model, and returns which experts each router chose: int64 [tokens, k], sorted, by the router's path, in their order.

    Empty if the model has no routers that can be found: modules with one output for each expert that the configuration names.
    """
    config = model.config.get_text_config()
    n = next((getattr(config, name) for name in N_EXPERTS if isinstance(getattr(config, name, None), int)), 0)
    k = next((getattr(config, name) for name in N_CHOSEN if isinstance(getattr(config, name, None), int)), 1)
    found: dict[str, Tensor] = {}

    def note(path: str, output: Any) -> None:
        outputs = output if isinstance(output, tuple | list) else [output]
        scores = next((x for x in outputs if isinstance(x, Tensor) and x.is_floating_point() and x.shape[-1] == n), None)
        if scores is not None:
            found[path] = scores.reshape(-1, n).topk(min(k, n), dim=1).indices.sort(dim=1).values.cpu()

    with ExitStack() as stack:
        for path, module in model.named_modules() if n > 1 else []:
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == n and not isinstance(module, nn.Embedding):
                handle = module.register_forward_hook(lambda _, __, output, path=path: note(path, output))
                stack.callback(handle.remove)
        run()
    return found


def first_tipped_block(alone: dict[str, Tensor], together: dict[str, Tensor]) -> int | None:
    """Returns the block of the first router that chose otherwise for any of the same tokens; None if none did."""
    for path, chosen in together.items():  # the fewer ones: the extractor stops after the deepest hook point
        if path in alone and not torch.equal(alone[path], chosen):
            number = re.search(r"\.(\d+)\.", path)
            return int(number.group(1)) if number else 0
    return None


def is_behind(hook_point: str, block: int) -> bool:
    """Whether what a hook point reads can depend on which experts a block's router chose."""
    kind, _, layer = hook_point.partition(".")
    if kind in BLOCK_KINDS:
        return int(layer) > block or (int(layer) == block and kind not in ("attn_z", "attn_out"))
    return kind != "embed"
