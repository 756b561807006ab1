"""Loading a Hugging Face model, knowing what it is, and cutting it off where it is no longer needed."""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from exactivations.datamodules.embedded import resolve_model
from exactivations.store.errors import InvalidInputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelOptions:
    """How a named model is loaded.

    Attributes:
        revision: Branch, tag or commit of a hub model.
        dtype: "auto" is the checkpoint's own dtype on an accelerator, and float32 on a CPU, where half precision is slow.
        attn_implementation: As Hugging Face names them: "sdpa", "eager", "flash_attention_2", …; None leaves it to the model.
        trust_remote_code: Whether code from the model's repository may run here.
        random_weights: Take nothing of a checkpoint but its configuration, and draw the weights with this seed as transformers
            does before training: a control, that tells what training has put into a model.
    """

    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    random_weights: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise InvalidInputError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True)
class LoadedWeights:
    """What came from a checkpoint.

    Attributes:
        body: The model without its head, on the host, in evaluation mode.
        random: Names of the body's weights that the checkpoint lacks and that were therefore drawn at random (a pooler that only
            pre-training with another head would have made, say). Who runs these must be refused: see `refuse_random_weights`.
        whole: The causal language model around this very body, if it was asked for and the checkpoint holds its head.
    """

    body: PreTrainedModel
    random: frozenset[str]
    whole: PreTrainedModel | None = None


def load_model(
    name: str, options: ModelOptions, device_type: str, *, wants_head: Callable[[PreTrainedModel], bool] | None = None
) -> LoadedWeights:
    """Loads a model onto the host, in evaluation mode.

    Args:
        name: Hub id, local path, or "demo".
        options: How.
        device_type: Where it will run.
        wants_head: Says of the body, which has no weights yet, whether its causal language model's head is to be loaded too.

    Raises:
        InvalidInputError: If there is no such model, or it cannot be loaded as asked.
    """
    dtype: Any = DTYPES.get(options.dtype, torch.float32 if device_type == "cpu" else "auto")
    arguments: dict[str, Any] = {} if options.attn_implementation is None else {"attn_implementation": options.attn_implementation}
    where: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    with_head = wants_head is not None and _has_head_around_its_body(name, options, wants_head)
    auto: Any = AutoModelForCausalLM if with_head else AutoModel
    loading: dict[str, Any] = {"missing_keys": ()}
    try:
        if options.random_weights is None:
            model, loading = auto.from_pretrained(resolve_model(name), dtype=dtype, output_loading_info=True, **where, **arguments)
        else:
            config = AutoConfig.from_pretrained(resolve_model(name), **where)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(options.random_weights)
                model = auto.from_config(config, dtype=config.dtype if dtype == "auto" else dtype, **arguments)
    except (OSError, ValueError, ImportError) as error:
        raise InvalidInputError(f"model {name!r} could not be loaded: {error}") from error
    model.train(False)
    assert isinstance(model, PreTrainedModel)
    if not with_head:
        return LoadedWeights(model, frozenset(loading["missing_keys"]))
    prefix = f"{model.base_model_prefix}."
    of_body = {key.removeprefix(prefix) for key in loading["missing_keys"] if key.startswith(prefix)}
    head_is_there = all(key.startswith(prefix) for key in loading["missing_keys"])
    body = model.base_model
    assert isinstance(body, PreTrainedModel)
    return LoadedWeights(body, frozenset(of_body), model if head_is_there else None)


def load_causal_model(name: str, options: ModelOptions, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Loads a causal language model with its head onto a device, in evaluation mode.

    Args:
        name: Hub id, local path, or "demo".
        options: How.
        device: Where it will run.

    Raises:
        InvalidInputError: If there is no such model, it cannot be loaded as asked, or the checkpoint lacks its head or any other
            weight.
    """
    device = torch.device(device)
    weights = load_model(name, options, device.type, wants_head=lambda _: True)
    if weights.whole is None or weights.random:
        lacking = f" (it lacks {', '.join(sorted(weights.random)[:3])})" if weights.random else ""
        raise InvalidInputError(
            f"model {name!r} is no whole causal language model with its head{lacking}: name one that was saved with all its weights"
        )
    weights.whole.to(device)  # type: ignore[arg-type]  # transformers' own annotation lacks torch.device
    return weights.whole


def _has_head_around_its_body(name: str, options: ModelOptions, wants_head: Callable[[PreTrainedModel], bool]) -> bool:
    """Whether the causal language model holds the very body that is extracted from, of the same class and with the same weights."""
    body = load_skeleton(name, options)
    saved_as_one = any(saved.endswith(("ForCausalLM", "LMHeadModel")) for saved in body.config.architectures or ())
    if not saved_as_one or type(body.config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not wants_head(body):
        return False
    with torch.device("meta"):
        whole: PreTrainedModel = AutoModelForCausalLM.from_config(body.config)  # type: ignore[no-untyped-call]
    inside = whole.base_model
    return type(inside) is type(body) and inside.state_dict().keys() == body.state_dict().keys()


def load_skeleton(name: str, options: ModelOptions) -> PreTrainedModel:
    """Builds the model without its weights, on torch's meta device: all there is to know of its structure, in a moment.

    Raises:
        InvalidInputError: If there is no such model.
    """
    try:
        config = AutoConfig.from_pretrained(
            resolve_model(name), revision=options.revision, trust_remote_code=options.trust_remote_code
        )
        with torch.device("meta"):
            model: PreTrainedModel = AutoModel.from_config(  # type: ignore[no-untyped-call]  # transformers has no annotation there
                config, trust_remote_code=options.trust_remote_code
            )
    except (OSError, ValueError, ImportError) as error:
        raise InvalidInputError(f"model {name!r} could not be loaded: {error}") from error
    model.train(False)
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout and the like off inside the `with` block; each module's own mode is restored after it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model without its head (the language-model head costs a lot and is never read)."""
    body = model.base_model if isinstance(model, PreTrainedModel) else model
    if not isinstance(body, PreTrainedModel):
        raise InvalidInputError(f"a {type(model).__name__} is no Hugging Face model; an adapter's is model.merge_and_unload()")
    return body


def has_head(model: PreTrainedModel) -> bool:
    """Whether a model that the caller holds is a causal language model with its head."""
    return model.base_model is not model and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def refuse_rounded_buffers(model: PreTrainedModel, *, values_change: bool = False) -> None:
    """Refuses a model whose rotary frequencies were rounded, as `model.to(torch.bfloat16)` or `model.half()` does.

    Such buffers are not in the checkpoint and are meant to stay in float32; rounded, they turn later tokens by wrong angles.
    Modules that hold buffers and no weights are made anew from the configuration, and compared.

    Args:
        model: The model.
        values_change: Whether the model changes its frequencies itself, with the length of what it sees: then only the dtype tells.

    Raises:
        InvalidInputError: Naming the buffer and how to load the model instead.
    """
    for path, module in model.named_modules():
        buffers = {name: b for name, b in module.named_buffers(recurse=False) if b is not None and b.is_floating_point()}
        if not buffers or any(True for _ in module.parameters()):
            continue
        fresh = _made_anew(module, model)
        for name, buffer in buffers.items():
            expected = None if fresh is None else getattr(fresh, name, None)
            if expected is None or expected.shape != buffer.shape:
                continue
            same_dtype = buffer.dtype == expected.dtype
            found = "its values were rounded" if same_dtype else f"{buffer.dtype}, expected {expected.dtype}"
            if not same_dtype or not (values_change or torch.allclose(buffer.cpu(), expected.cpu(), rtol=1e-6, atol=0.0)):
                raise InvalidInputError(
                    f"buffer {path}.{name} of {type(model).__name__} is not what its configuration makes ({found}): the whole "
                    "model was cast, as by model.to(torch.bfloat16). Load it in its dtype: from_pretrained(…, dtype=torch.bfloat16)"
                )


def _made_anew(module: nn.Module, model: PreTrainedModel) -> nn.Module | None:
    """Makes a module like this one from the configuration alone; None if its class asks for more than that."""
    parameters = inspect.signature(type(module).__init__).parameters
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if required != ["self", "config"]:
        return None
    try:
        fresh: nn.Module = type(module)(config=model.config.get_text_config())
    except (AttributeError, KeyError, TypeError, ValueError):  # a part that is made from another configuration (of images, say)
        return None
    return fresh


def weights_hash(model: nn.Module, without: frozenset[str] = frozenset()) -> str:
    """Returns the xxh3-128 over names, dtypes, shapes and bytes of all weights: what the model is, whatever it is called.

    Args:
        model: The whole model.
        without: Names of weights that are not part of it (random ones that never run).
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        if name in without:
            continue
        tensor = tensor.detach().contiguous().cpu()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def config_hash(model: PreTrainedModel) -> str:
    """Returns a hash of the configuration without names, versions and dtype, which are recorded elsewhere."""
    ignored = (
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "architectures",
        "use_cache",
        "_attn_implementation",
    )
    config = {name: value for name, value in model.config.to_dict().items() if name not in ignored}
    return xxhash.xxh3_128(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def max_positions(model: PreTrainedModel) -> int | None:
    """Returns how many tokens a sample may have at most, or None if the architecture has no limit."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or positions < 1:
        return None
    return positions - first_position(model)


def first_position(model: PreTrainedModel) -> int:
    """Returns the position id of a sample's first token: 0, but for RoBERTa and its kin, which count on from the padding index."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def vocabulary_size(model: PreTrainedModel) -> int | None:
    """Returns the number of rows of the input embedding, or None if the model has none."""
    embedding = model.get_input_embeddings()
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def forward_arguments(model: nn.Module) -> dict[str, Any]:
    """Returns the arguments that keep a forward pass from doing what nobody reads (a cache of keys and values)."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {"use_cache": False} if "use_cache" in parameters or takes_any else {}


def outputs_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Returns what a model makes of a batch: logits [B, L, V] of a causal language model, and what a toy model returns."""
    outputs = model(batch, **forward_arguments(model))
    return outputs if isinstance(outputs, Tensor) else outputs.logits
