"""What every command that runs a model over a dataset does: choose what is read, plan, predict, and tell how it went."""

import os
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel

from exactivations.callbacks.activation_writer import ActivationWriter
from exactivations.callbacks.ground_truth_check import GroundTruthCheck
from exactivations.callbacks.memory_watch import MemoryWatch
from exactivations.callbacks.process_watch import named_to_children
from exactivations.callbacks.run_writer import RunWriter
from exactivations.callbacks.token_progress import TokenProgress
from exactivations.datamodules.plan import PlanOptions
from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import text_at_cut_end
from exactivations.lit_modules.extraction.extractor import ActivationExtractor, check_counted, check_lengths
from exactivations.lit_modules.models.hook_points import BLOCK_KINDS, dissect, resolve_hook_points, width_of
from exactivations.lit_modules.models.language_model import ModelOptions, load_skeleton
from exactivations.scripts.trainers import trainer_on
from exactivations.scripts.verification_table import verification_table
from exactivations.store.errors import InvalidInputError
from exactivations.store.pooling_names import TOKENS
from exactivations.store.run_folder import RunFolder

SHARD_BYTES = 2**30  # what a kill costs at most; and where means are taken, each rank holds as much in memory


@dataclass(frozen=True)
class Reading:
    """What is read, of which model."""

    model: str
    options: ModelOptions
    hook_points: list[str]
    poolings: list[str]
    store_dtype: str | None = None


@dataclass(frozen=True)
class Machine:
    """What it is computed on; see `extract`."""

    devices: int = 1
    accelerator: str = "auto"
    num_nodes: int = 1
    cpu_threads: int | None = None


@dataclass(frozen=True)
class Finished:
    """A run that came to its end, on this rank."""

    extractor: ActivationExtractor
    data: TextDataModule
    writer: ActivationWriter
    check: GroundTruthCheck | None
    progress: TokenProgress
    memory: MemoryWatch
    trainer: pl.Trainer

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that tells how it went."""
        return self.trainer.is_global_zero

    @property
    def is_whole(self) -> bool:
        """Whether all shards are in this folder, and none in another node's."""
        assert self.writer.info is not None
        return len(self.writer.folder.published(self.writer.info)) == self.data.plan.n_shards

    def tell(self) -> None:
        """Prints what was written, how fast, what memory it took, and how it was verified."""
        assert self.writer.info is not None
        folder, several = self.writer.folder, self.trainer.world_size > 1
        published = folder.published(self.writer.info)
        size = sum(folder.shard_path(shard).stat().st_size for shard in published)
        before = len(published & self.data.skip_shards)
        there = f" ({before:,} were there already)" if before else ""
        print(f"wrote {len(published) - before:,} shards{there}, {size / 1e6:,.1f} MB in all, to {folder.path}")
        on_rank = " on rank 0" if several else ""
        progress = self.progress
        rate = f"{progress.n_tokens / progress.seconds:,.0f} tokens/s{on_rank}, " if progress.seconds else ""
        print(f"{rate}{self.data.plan.padded_share:.1%} padding; {self.memory.in_words()}{on_rank}")
        if self.writer.means is None:
            print(", ".join(self.extractor.specs()))
        if self.check is None:
            print(f"not verified (--verify-samples 0): readers refuse it until you run: exactivations verify {folder.path}")
        elif self.check.verification is not None:
            new = "nothing new was computed; " if self.check.was_verified_before else ""
            print(new + verification_table(self.check.verification, self.writer.info.n_samples))
        if not self.is_whole:
            left = self.data.plan.n_shards - len(published)
            print(f"{left:,} shards are in other nodes' folders: copy all folders into one to read them")


def hook_points_of(
    reading: Reading, layers: list[int] | Literal["all"] | None, hooks: list[str]
) -> tuple[PreTrainedModel, list[str]]:
    """Returns the model without weights, and the full names of the hook points that were asked for.

    Raises:
        InvalidInputError: If there is no such model, layer or hook point.
    """
    skeleton = load_skeleton(reading.model, reading.options)
    anatomy = dissect(skeleton)
    if layers and anatomy.blocks is None:
        raise InvalidInputError(f"{type(skeleton).__name__} has no layers that can be named: {anatomy.notes[0]}")
    names = hook_point_names(anatomy.n_blocks, layers, hooks)
    resolve_hook_points(skeleton, names)
    return skeleton, names


def plan_data(
    data: TextDataModule, skeleton: PreTrainedModel, reading: Reading,
    token_budget: int, shard_tokens: int | None, padding: Literal["none", "tail"], max_padded_share: float,
) -> None:  # fmt: skip
    """Tokenizes and plans, and holds the samples against the model and the poolings.

    Before other processes are started: so what is wrong with the data is told once, and early.
    """
    if shard_tokens is None:
        points = resolve_hook_points(skeleton, reading.hook_points)
        width = sum(width_of(skeleton, point) or skeleton.config.get_text_config().hidden_size for point in points)
        dtype = reading.store_dtype or reading.options.dtype
        shard_tokens = default_shard_tokens(width, reading.poolings, dtype, token_budget, data.tokens.n_tokens)
    data.plan_options = PlanOptions(token_budget, shard_tokens, padding, max_padded_share)
    data.setup()
    check_lengths(skeleton, data)
    check_counted(reading.poolings, data)


def predict(
    reading: Reading, data: TextDataModule, writer: ActivationWriter, machine: Machine, verify_samples: int, least_free: float
) -> Finished:
    """Runs a model over planned data, with everything that watches over it.

    Raises:
        InvalidInputError: If the devices cannot be had, or verify_samples is below 0 (0 verifies nothing).
    """
    if verify_samples < 0:
        raise InvalidInputError(f"--verify-samples must be at least 0 (which verifies nothing), got {verify_samples}")
    progress, memory = TokenProgress(), MemoryWatch(least_free)
    check = GroundTruthCheck(verify_samples) if verify_samples else None
    callbacks: list[pl.Callback] = [*([check] if check else []), writer, progress, memory]
    trainer = trainer_of(machine, callbacks)
    extractor = ActivationExtractor(
        reading.model, reading.hook_points, reading.poolings, options=reading.options, store_dtype=reading.store_dtype,
        cpu_threads=threads_for(machine, trainer, writer),
    )  # fmt: skip
    if trainer.is_global_zero:
        tell_plan(data, str(writer.folder.path))
    with named_to_children():
        trainer.predict(extractor, datamodule=data, return_predictions=False)
    return Finished(extractor, data, writer, check, progress, memory, trainer)


def trainer_of(machine: Machine, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Returns a Trainer that predicts on this machine, and does nothing of its own accord.

    Raises:
        InvalidInputError: If the devices cannot be had.
    """
    return trainer_on(
        machine.accelerator, machine.devices, num_nodes=machine.num_nodes, callbacks=callbacks, logger=False,
        enable_progress_bar=False,
    )  # fmt: skip


def threads_for(machine: Machine, trainer: pl.Trainer, writer: RunWriter) -> int | None:
    """Returns the threads of each process, and sees that processes which Lightning starts have them; None on a GPU."""
    threads = (
        machine.cpu_threads
        or threads_of_run(writer.folder, writer.overwrite)
        or max(1, (os.cpu_count() or 1) // trainer.num_devices)
    )
    os.environ["OMP_NUM_THREADS"] = str(threads)  # Lightning sets threads by this variable when it starts processes
    return threads if trainer.strategy.root_device.type == "cpu" else None


def hook_point_names(n_layers: int, layers: list[int] | str | None, hooks: list[str]) -> list[str]:
    """Returns full hook point names: kinds of hook x layers, and those that are full names already.

    Raises:
        InvalidInputError: If layers and hooks do not fit each other, or there is no such layer.
    """
    wanted = list(range(n_layers)) if layers == "all" else [int(layer) for layer in layers or []]
    for layer in wanted:
        if not -n_layers <= layer < n_layers:
            raise InvalidInputError(f"there is no layer {layer}: the model has layers 0 to {n_layers - 1} (or -{n_layers} to -1)")
    kinds = [hook for hook in hooks if hook in BLOCK_KINDS]
    if kinds and not wanted:
        raise InvalidInputError(
            f"{kinds[0]} needs layers: --layers 1 3, --layers all, or a full name such as --hooks {kinds[0]}.{n_layers - 1}"
        )
    if wanted and not kinds:
        raise InvalidInputError(f"--layers applies to {', '.join(BLOCK_KINDS)}; --hooks names none of them: {' '.join(hooks)}")
    names: list[str] = []
    for hook in hooks:
        names += [f"{hook}.{layer % n_layers}" for layer in wanted] if hook in BLOCK_KINDS else [hook]
    return names


def default_shard_tokens(width: int, poolings: list[str], dtype: str, token_budget: int, n_tokens: npt.NDArray[np.int64]) -> int:
    """Returns how many tokens make a shard of about SHARD_BYTES, at most 131,072 and at least a batch.

    Args:
        width: Width of all hook points together.
        poolings: What is stored of each: token rows weigh far more than pooled ones.
        dtype: Dtype of the store; "auto" is taken for four bytes.
        token_budget: Most tokens in a batch.
        n_tokens: Length of each sample.
    """
    pooled_rows_per_token = (len(poolings) - (TOKENS in poolings)) * len(n_tokens) / int(n_tokens.sum())
    rows_per_token = (TOKENS in poolings) + pooled_rows_per_token
    bytes_per_token = width * rows_per_token * (2 if dtype in ("bfloat16", "float16") else 4)
    return max(token_budget, min(131072, int(SHARD_BYTES / bytes_per_token)))


def threads_of_run(folder: RunFolder, overwrite: bool) -> int | None:
    """Returns the threads that the run in this folder was begun with, so that going on gives the same bits."""
    if overwrite or not folder.exists:
        return None
    threads: int | None = folder.read_info().present_identity.get("cpu_threads")
    return threads


def tell_plan(data: TextDataModule, out: str) -> None:
    """Prints what will be done, and what a user should know before it is."""
    plan, tokens, budget = data.plan, data.tokens, data.plan_options.token_budget
    n_tokens = int(plan.lengths.sum())
    print(f"{len(tokens):,} samples, {n_tokens:,} tokens, {plan.n_batches:,} batches, {plan.n_shards:,} shards -> {out}")
    if truncated := int(tokens.truncated.sum()):
        with_it = ", and the template with them" if text_at_cut_end(data.text) else ""
        print(f"{truncated:,} samples were cut to {data.text.max_length} tokens ({data.text.truncation_side} end){with_it}")
    if skipped := tokens.skipped:
        shown = ", ".join(map(str, skipped[:10])) + (", ..." if len(skipped) > 10 else "")
        print(f"{len(skipped):,} empty samples are left out: {shown}")
    if over := int((plan.lengths > budget).sum()):
        longest = int(plan.lengths.max())
        print(f"{over:,} samples are longer than the token budget of {budget:,} (the longest has {longest:,}): each runs alone")
