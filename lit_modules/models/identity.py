"""What of a model and of a machine decides the values that come out, by field name."""

import platform
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from exactivations.lit_modules.models.language_model import config_hash


def model_identity(model: PreTrainedModel) -> dict[str, Any]:
    """Returns what a loaded model is, but for its weights (see `weights_hash`): class, configuration, kernels, hooks on it."""
    return {
        "model_class": type(model).__name__,
        "model_config": config_hash(model),
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
        "experts_implementation": getattr(model.config, "_experts_implementation", None),
        "forward_hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    }


def machine_identity(device: torch.device) -> dict[str, Any]:
    """Returns what of this machine decides the last bits."""
    return {
        "device_type": device_kind(device),
        "cpu_threads": torch.get_num_threads() if device.type == "cpu" else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def device_kind(device: torch.device) -> str:
    """Returns what kind of device this is: the GPU's name, or the processor's instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else device.type
