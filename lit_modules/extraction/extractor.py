"""ActivationExtractor: a forward pass, cut off after the deepest hook point, and the rows that are read from it."""

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.extraction.pooling import Pooling
from exactivations.lit_modules.models.doctor import refuse_unsafe_right_padding
from exactivations.lit_modules.models.hook_points import HookPoint, cut_after, dissect, reading, resolve_hook_points
from exactivations.lit_modules.models.identity import machine_identity, model_identity
from exactivations.lit_modules.models.language_model import (
    DTYPES,
    LoadedWeights,
    ModelOptions,
    body_of,
    evaluating,
    forward_arguments,
    has_head,
    load_model,
    max_positions,
    refuse_rounded_buffers,
    vocabulary_size,
    weights_hash,
)
from exactivations.lit_modules.models.model_facts import length_dependent_rope
from exactivations.store.batches import ActivationBatch, ActivationSpec, TokenBatch, TokenStep, padded, real_positions, to_device
from exactivations.store.errors import InvalidInputError
from exactivations.store.host_memory import empty_on
from exactivations.store.pooling_names import TOKENS, check_pooling, position_of, refuse_short, tokens_needed

VALUES_VERSION = 2
"""Goes up when a change of this package changes the values that it extracts."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be read: where its hook points are, how wide each is, and what it is."""

    model: PreTrainedModel
    hook_points: list[HookPoint]
    widths: dict[str, int]
    arguments: dict[str, Any]
    weights_hash: str
    whole: PreTrainedModel | None = None
    """The causal language model around `model`, with its head, if the head can be applied to a state that is read."""
    no_head: str | None = None
    """Why there is no `whole`."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device


class ActivationExtractor(pl.LightningModule):
    """Reads hook points of a Hugging Face model, pools them on the device, and returns them with their samples' identity.

    With a Trainer: `trainer.predict(extractor, datamodule=TextDataModule(…))`, and an `ActivationWriter` among the callbacks.
    Without: `extractor(batch) -> ActivationBatch`.

    The language model is deliberately not a submodule: Lightning would broadcast its weights under DDP and round its float32
    buffers under "bf16-true". It is loaded in its own dtype by `load`, at the latest when it is first needed.

    Args:
        model: A hub id, a local path, "demo", or a model that the caller holds (which is neither cut, moved nor changed).
        hook_points: See `hook_points`.
        poolings: "tokens", "last", "first", "mean", "max", "exp_decay:<half-life>", "position:<k>"; each is taken at each
            hook point.
        options: How a named model is loaded.
        store_dtype: Dtype of the activations given out; None is the model's own.
        cpu_threads: Threads of each process on a CPU. They decide the last bits; None leaves torch's setting alone.

    Raises:
        InvalidInputError: For a hook point, pooling, dtype or model that does not exist.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        hook_points: list[str],
        poolings: list[str],
        *,
        options: ModelOptions | None = None,
        store_dtype: str | None = None,
        cpu_threads: int | None = None,
    ) -> None:
        super().__init__()
        for name in poolings:
            check_pooling(name)
        if not poolings or len(set(poolings)) != len(poolings):
            raise InvalidInputError(f"poolings must be named, each once, got {poolings}")
        if store_dtype is not None and store_dtype not in DTYPES:
            raise InvalidInputError(f"store_dtype must be one of {', '.join(DTYPES)}, got {store_dtype!r}")
        self.model_name: str | None = model if isinstance(model, str) else (model.name_or_path or None)
        self.hook_point_names, self.poolings = list(hook_points), list(poolings)
        self.options, self.store_dtype, self.cpu_threads = options or ModelOptions(), store_dtype, cpu_threads
        self._given = (model,)  # in a tuple, out of the module tree
        self._loaded: LoadedModel | None = None
        self._tail_is_proved = False

    def load(self, device: torch.device | str = "cpu") -> LoadedModel:
        """Loads, hashes, cuts and moves the model and looks once at every hook point; the second call returns the same.

        Raises:
            InvalidInputError: If it cannot be loaded or read as asked, or is on another device already.
        """
        given, device = self._given[0], torch.device(device)
        there = self._loaded.device if self._loaded is not None else None if isinstance(given, str) else given.device
        if there is not None and device.type != "cpu" and (there.type != device.type or device.index not in (None, there.index)):
            remedy = (
                f"make a new extractor for {device}" if isinstance(given, str) else f"move it, or let the Trainer work on {there}"
            )
            raise InvalidInputError(f"{self.model_name or type(given).__name__} is on {there}, to be read on {device}: {remedy}")
        if self._loaded is not None:
            return self._loaded
        if self.cpu_threads is not None:
            torch.set_num_threads(self.cpu_threads)
        if isinstance(given, str):
            weights = load_model(given, self.options, device.type, wants_head=lambda skeleton: self._why_no_head(skeleton) is None)
        else:
            weights = LoadedWeights(body_of(given), frozenset(), given if has_head(given) else None)
            refuse_rounded_buffers(weights.body, values_change=bool(length_dependent_rope(weights.body)))
        body, random = weights.body, weights.random
        points, arguments = resolve_hook_points(body, self.hook_point_names), forward_arguments(body)
        no_head = self._why_no_head(body)  # of the whole body: what is the last block of a cut one is not what its head receives
        if no_head is None and weights.whole is None:
            no_head = "the model is no causal language model, or its head is not in the checkpoint"
        hash_of_all = weights_hash(body, without=random)
        if isinstance(given, str):
            cut_after(body, points)
            body.to(device)  # type: ignore[arg-type]  # transformers' own annotation lacks torch.device
        widths = _widths(body, points, arguments)
        refuse_random_weights(body, points, arguments, random)
        whole = weights.whole if no_head is None else None
        self._loaded = LoadedModel(body, points, widths, arguments, hash_of_all, whole, no_head)
        return self._loaded

    def _why_no_head(self, body: PreTrainedModel) -> str | None:
        """Says why a language-model head could not be put on what is read from this body, or None if it could."""
        if not any(name == TOKENS or position_of(name) is not None for name in self.poolings):
            return "no single token's state is stored (pooling tokens, last, first or position:<k>)"
        points = dissect(body).names_before_the_head()
        if points.isdisjoint(self.hook_point_names):
            return f"no state before the head is stored ({' or '.join(sorted(points)) or 'final_norm'})"
        return None

    def specs(self) -> dict[str, ActivationSpec]:
        """Returns what each activation looks like, by name "<hook point>/<pooling>"."""
        loaded = self.load(self.device)
        return {
            f"{point.name}/{pooling}": ActivationSpec(pooling == TOKENS, loaded.widths[point.name], self._out_dtype(loaded))
            for point in loaded.hook_points
            for pooling in self.poolings
        }

    def identity(self) -> dict[str, Any]:
        """Returns what of model and machine decides the values, by field name."""
        loaded = self.load(self.device)
        return {
            "model": loaded.weights_hash,
            **model_identity(loaded.model),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "hook_points": self.hook_point_names,
            "hook_paths": [f"input of {point.path}" if point.reads_input else point.path for point in loaded.hook_points],
            "poolings": self.poolings,
            "store_dtype": str(self._out_dtype(loaded)).removeprefix("torch."),
            **machine_identity(loaded.device),
            "values_version": VALUES_VERSION,
        }

    def setup(self, stage: str) -> None:
        """Loads the model onto this rank's device and holds the data against it.

        Raises:
            InvalidInputError: If the Trainer would change dtypes, float32 would be multiplied as TF32, a sample is too long for the
                model or too short for a pooling, an id is outside its vocabulary, or padding was asked for and the model does not
                allow it.
        """
        if str(self.trainer.precision) != "32-true":
            raise InvalidInputError(
                f"Trainer(precision={self.trainer.precision!r}) would cast the batch: leave it at '32-true' and give the extractor "
                "its dtype, ModelOptions(dtype='bfloat16')"
            )
        loaded = self.load(self.device)
        refuse_short_cuts(loaded.device, loaded.model.dtype)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TextDataModule):
            self.check_fits(data)

    def check_fits(self, data: TextDataModule) -> None:
        """Refuses data that this model cannot take: see `setup`."""
        loaded = self.load(self.device)
        check_lengths(loaded.model, data)
        check_counted(self.poolings, data)
        if data.plan_options.padding == "tail" and not self._tail_is_proved:
            refuse_unsafe_right_padding(loaded.model, loaded.hook_points)
            self._tail_is_proved = True

    def predict_step(self, step: TokenStep, batch_idx: int = 0) -> ActivationBatch:
        """Computes the batches of a step and returns what was asked for at every hook point, in one piece.

        No attention mask is made and no padded position is read. Nothing here waits for the device (transformers does, once a
        forward pass, for whether texts are packed).

        Raises:
            InvalidInputError: If a hook point was not reached or is not a tensor [B, L, D], a sample is too short for a pooling, or
                a batch is too large for the device.
        """
        try:
            return self._compute(step)
        except torch.cuda.OutOfMemoryError as error:
            raise _too_large(step, error) from error

    def forward(self, batch: TokenBatch) -> ActivationBatch:
        """Computes one batch; see `predict_step`."""
        return self._compute(TokenStep.of(batch))

    @torch.no_grad()
    def _compute(self, step: TokenStep) -> ActivationBatch:
        loaded, host = self.load(self.device), step.on_host
        if any(tokens_needed(name) > 1 for name in self.poolings):  # of batches that no data module was asked about before
            ends = host.n_tokens.cumsum(0)
            counted = host.token_mask.cumsum(0)[ends - 1].diff(prepend=torch.zeros(1, dtype=torch.int64))
            refuse_short(self.poolings, counted.numpy(), host.sample_index.numpy())
        if step.input_ids.device != loaded.device:  # from the host: a copy from one device to another might not be waited for
            step = host.to(loaded.device)
        kept = {
            name: empty_on(
                loaded.device, len(host.input_ids if spec.per_token else host.sample_index), spec.width, dtype=spec.dtype
            )
            for name, spec in self.specs().items()
        }
        row = token = 0
        pools = {name: Pooling(name, host.token_mask, host.n_tokens, loaded.device) for name in self.poolings if name != TOKENS}

        def read(name: str, states: Tensor) -> None:
            states = states.to(loaded.device)  # a model that is spread over devices gives them where its blocks are
            if states.ndim != 3 or states.shape[:2] != input_ids.shape:
                raise InvalidInputError(
                    f"hook point {name} has shape {list(states.shape)}, expected [B, L, D] with [B, L] = {list(input_ids.shape)}"
                )
            for pooling in self.poolings:
                if pooling != TOKENS:
                    kept[f"{name}/{pooling}"][row : row + len(states)] = pools[pooling](states, row, token, real)
                else:
                    flat = states.flatten(0, 1)
                    kept[f"{name}/{TOKENS}"][token : token + n_real] = flat if real is None else flat[real]

        with evaluating(loaded.model), reading(loaded.model, loaded.hook_points, read) as run:
            for n_rows, width, n_real in step.shapes:
                real = None
                if n_real < n_rows * width:
                    real = to_device(real_positions(host.n_tokens[row : row + n_rows], width), loaded.device)
                input_ids = padded(step.input_ids[token : token + n_real], n_rows, width, real)
                run(input_ids=input_ids, **loaded.arguments)
                row, token = row + n_rows, token + n_real
        return ActivationBatch(host.sample_index, host.n_tokens, host.input_ids, host.token_mask, kept, host.place)

    def _out_dtype(self, loaded: LoadedModel) -> torch.dtype:
        return loaded.model.dtype if self.store_dtype is None else DTYPES[self.store_dtype]


def refuse_short_cuts(device: torch.device, dtype: torch.dtype) -> None:
    """Refuses to call float32 what a GPU computes in TF32, with three digits.

    Raises:
        InvalidInputError: Saying how to have either.
    """
    precision = torch.get_float32_matmul_precision()
    if device.type == "cuda" and dtype == torch.float32 and precision != "highest":
        raise InvalidInputError(
            f"float32 matmul precision is {precision!r}, so that {device} would multiply float32 with three digits (TF32), and "
            "verification would fail: torch.set_float32_matmul_precision('highest') (and no TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), or "
            "take bfloat16"
        )


def _too_large(step: TokenStep, error: torch.cuda.OutOfMemoryError) -> InvalidInputError:
    n, length, _ = max(step.shapes, key=lambda shape: shape[0] * shape[1])
    remedy = f"lower the token budget (--token-budget) below {n * length}" if n > 1 else "cut it with --max-length"
    return InvalidInputError(
        f"out of device memory with batches of up to {n} x {length} tokens: {remedy}; what was published stays. {error}"
    )


def check_lengths(model: PreTrainedModel, data: TextDataModule) -> None:
    """Refuses samples that are longer than the model's positions, and ids outside its vocabulary. Needs no weights.

    Raises:
        InvalidInputError: Naming the sample and what to do.
    """
    tokens, positions, vocabulary = data.tokens, max_positions(model), vocabulary_size(model)
    longest = int(tokens.n_tokens.argmax())
    if positions is not None and tokens.n_tokens[longest] > positions:
        n = int((tokens.n_tokens > positions).sum())
        raise InvalidInputError(
            f"sample {tokens.sample_index[longest]} has {tokens.n_tokens[longest]} tokens, {type(model).__name__} has "
            f"{positions} positions ({n} samples are too long): pass --max-length {positions} to cut "
            "them (how many were cut is told), or leave them out"
        )
    if vocabulary is not None and tokens.largest_id >= vocabulary:
        raise InvalidInputError(
            f"the tokenizer gives id {tokens.largest_id}, {type(model).__name__} has {vocabulary} embeddings: "
            "this is another model's tokenizer"
        )


def check_counted(poolings: list[str], data: TextDataModule) -> None:
    """Refuses samples of which fewer tokens count than a pooling takes. Needs no model.

    Raises:
        InvalidInputError: Naming the sample, its tokens that count, and the pooling.
    """
    if any(tokens_needed(name) > 1 for name in poolings):
        refuse_short(poolings, data.tokens.n_counted, data.tokens.sample_index)


def _widths(model: PreTrainedModel, points: list[HookPoint], arguments: dict[str, Any]) -> dict[str, int]:
    """Looks once at every hook point, in a whole forward pass over four tokens.

    Raises:
        InvalidInputError: If a module runs never, or more than once (its output would be ambiguous).
    """
    shapes: dict[str, list[list[int]]] = {point.name: [] for point in points}
    last_block_ran: list[bool] = []

    def read(name: str, state: Tensor) -> None:
        shapes[name].append(list(state.shape))
        if name == "final_norm" and not last_block_ran:
            raise InvalidInputError(f"hook point final_norm: the norm beside the blocks of {type(model).__name__} runs before them")

    blocks = dissect(model).blocks
    last = model.get_submodule(f"{blocks}.{len(list(model.get_submodule(blocks).children())) - 1}") if blocks else model
    handle = last.register_forward_hook(lambda *_: last_block_ran.append(True))
    try:
        with torch.no_grad(), evaluating(model), reading(model, points, read, stop=False) as run:
            run(input_ids=torch.arange(4, device=model.device)[None], **arguments)
    finally:
        handle.remove()
    for name, found in shapes.items():
        if len(found) != 1:
            raise InvalidInputError(
                f"hook point {name} runs {len(found)} times in one forward pass; only what runs exactly once can be read"
            )
        if found[0][:2] != [1, 4] or len(found[0]) != 3:
            raise InvalidInputError(f"hook point {name} has shape {found[0]} for a batch [1, 4]; expected [1, 4, D]")
    return {name: found[0][2] for name, found in shapes.items()}


def refuse_random_weights(
    model: PreTrainedModel, points: list[HookPoint], arguments: dict[str, Any], random: frozenset[str]
) -> None:
    """Refuses a model of which a module with random weights runs before all hook points are read.

    Raises:
        InvalidInputError: Naming the weights that the checkpoint lacks.
    """
    modules = dict(model.named_modules())
    owners = {name: modules[name.rpartition(".")[0]] for name in sorted(random) if name.rpartition(".")[0] in modules}
    ran: set[nn.Module] = set()
    handles = [module.register_forward_pre_hook(lambda module, _: ran.add(module)) for module in set(owners.values())]
    try:
        if owners:
            with torch.no_grad(), evaluating(model), reading(model, points, lambda *_: None) as run:
                run(input_ids=torch.arange(4, device=model.device)[None], **arguments)
    finally:
        for handle in handles:
            handle.remove()
    used = [name for name, module in owners.items() if module in ran]
    if used:
        more = f" and {len(used) - 3} more" if len(used) > 3 else ""
        raise InvalidInputError(
            f"the checkpoint lacks {', '.join(used[:3])}{more}, which {type(model).__name__} needs up to the deepest hook point: "
            "they would be random, and other ones each time. The checkpoint is not whole, or belongs to another architecture"
        )
