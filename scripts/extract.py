"""`exactivations extract`: activations of a dataset, into a store."""

import os
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from exactivations.callbacks.activation_writer import ActivationWriter
    from exactivations.callbacks.ground_truth_check import GroundTruthCheck
    from exactivations.callbacks.token_progress import TokenProgress
    from exactivations.datamodules.text import TextDataModule
    from exactivations.lit_modules.extraction import ActivationExtractor

SHARD_BYTES = 2**30  # each rank holds one shard in memory while it fills


def extract(
    model: str,
    *,
    dataset: str,
    out: str,
    layers: list[int] | Literal["all"] | None = None,
    hooks: list[str] | None = None,
    pooling: list[str] | None = None,
    config_name: str | None = None,
    split: str | None = None,
    text_column: str = "text",
    keep: list[str] | None = None,
    num_samples: int | None = None,
    sample_seed: int | None = None,
    max_length: int | None = None,
    truncation_side: Literal["left", "right"] = "right",
    add_special_tokens: bool = True,
    template: str | None = None,
    messages_column: str | None = None,
    add_generation_prompt: bool = False,
    token_mask: Literal["content", "assistant", "all"] = "content",
    on_empty: Literal["error", "skip"] = "error",
    token_budget: int = 8192,
    shard_tokens: int | None = None,
    padding: Literal["none", "tail"] = "none",
    max_padded_share: float = 0.05,
    tokenizer: str | None = None,
    revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    store_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    devices: int = 1,
    accelerator: str = "auto",
    num_nodes: int = 1,
    cpu_threads: int | None = None,
    tokenizer_processes: int | None = None,
    verify_samples: int = 16,
    overwrite: bool = False,
    allow_changed: list[str] | None = None,
) -> None:
    """Extracts activations of every sample of a dataset into a store; started again, it goes on where it was.

    Args:
        model: "demo" (embedded), a Hugging Face hub id, or a local path.
        dataset: "demo" (embedded), a hub id, a .jsonl, .csv, .parquet or .txt file, or a folder saved by `datasets`.
        out: The run folder to write.
        layers: Layers at which the block hooks are read, such as 1 3, or "all"; needed by resid_post, attn_out and mlp_out.
            Negative ones count from the last: -1.
        hooks: What is read: resid_post, attn_out, mlp_out (at each layer), embed, final_norm, module:<path>, or one full
            name such as resid_post.3. Default: resid_post.
        pooling: tokens, last, first, mean, max, exp_decay:<half-life>, each at each hook point. Default: mean last.
        config_name: Configuration of a hub dataset.
        split: For example train or train[:1000].
        text_column: Column with the texts.
        keep: Columns of the dataset that go into samples.parquet. Default: all.
        num_samples: Take only so many samples, the first ones.
        sample_seed: With num_samples: a random choice with this seed instead of the first ones.
        max_length: Cut longer samples to so many tokens. How many were cut is told.
        truncation_side: Which end is cut off.
        add_special_tokens: Whether the tokenizer adds its own special tokens (BOS, [CLS], ...).
        template: Text around each text, with {text} where it goes.
        messages_column: Column with chat messages, to which the chat template is applied; takes the place of text_column.
        add_generation_prompt: Whether the chat template opens the assistant's next turn.
        token_mask: Which tokens poolings count: content (no special tokens), assistant (as the chat template marks), or all.
        on_empty: What to do about an empty text: error, or skip and record.
        token_budget: Most tokens in one batch. A longer sample runs alone.
        shard_tokens: About so many tokens in one shard. Default: what makes about 1 GB, at most 131,072 and at least a batch.
        padding: none (batches of one length), or tail (rare lengths share batches, padded on the right; causal models only).
        max_padded_share: With tail: the most padding in a batch.
        tokenizer: Another tokenizer than the model's own.
        revision: Branch, tag or commit of a hub model.
        dtype: The model's dtype. auto: the checkpoint's on a GPU, float32 on a CPU.
        store_dtype: Dtype on disk. Default: the model's.
        attn_implementation: sdpa, eager, flash_attention_2, ... Default: the model's.
        trust_remote_code: Whether code from the model's repository may run.
        devices: Devices (or CPU processes) on each node.
        accelerator: auto, gpu or cpu.
        num_nodes: Nodes; start the same command on each, by torchrun, SLURM or hand.
        cpu_threads: Threads of each process on a CPU; they decide the last bits. Default: what the run folder was begun with,
            or the cores divided by the devices.
        tokenizer_processes: Processes for slow tokenizers; fast ones use all cores by themselves.
        verify_samples: At the end, compute so many samples again, alone, and compare them with the store. 0 verifies nothing, and
            leaves a store that readers refuse until `exactivations verify` was run on it.
        overwrite: Remove the run that is in the folder, and start anew.
        allow_changed: Of torch, transformers, device_type, cpu_threads: what may differ from the run that is being continued.
    """
    from exactivations.callbacks.process_watch import end_with_parent, named_to_children

    end_with_parent(int(os.environ.get("LOCAL_RANK", "0")))

    import lightning.pytorch as pl
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from exactivations.callbacks.activation_writer import ActivationWriter
    from exactivations.callbacks.ground_truth_check import GroundTruthCheck
    from exactivations.callbacks.token_progress import TokenProgress
    from exactivations.datamodules.plan import PlanOptions
    from exactivations.datamodules.text import TextDataModule
    from exactivations.datamodules.tokenization import TextOptions
    from exactivations.lit_modules.extraction import ActivationExtractor, check_lengths
    from exactivations.lit_modules.hook_points import dissect, resolve_hook_points
    from exactivations.lit_modules.language_model import ModelOptions, load_skeleton
    from exactivations.store.errors import InvalidInputError

    if verify_samples < 0:
        raise InvalidInputError(f"--verify-samples must be at least 0 (which verifies nothing), got {verify_samples}")
    options = ModelOptions(revision, dtype, attn_implementation, trust_remote_code)
    skeleton = load_skeleton(model, options)
    anatomy = dissect(skeleton)
    if layers and anatomy.blocks is None:
        raise InvalidInputError(f"{type(skeleton).__name__} has no layers that can be named: {anatomy.notes[0]}")
    names = hook_point_names(anatomy.n_blocks, layers, hooks or ["resid_post"])
    resolve_hook_points(skeleton, names)
    poolings = pooling or ["mean", "last"]
    data = TextDataModule(
        dataset,
        tokenizer or model,
        config=config_name,
        split=split,
        keep_columns=keep,
        num_samples=num_samples,
        sample_seed=sample_seed,
        text=TextOptions(
            text_column=text_column, template=template, messages_column=messages_column, max_length=max_length,
            add_generation_prompt=add_generation_prompt, add_special_tokens=add_special_tokens, token_mask=token_mask,
            truncation_side=truncation_side, on_empty=on_empty,
        ),
        tokenizer_revision=None if tokenizer else revision,
        trust_remote_code=trust_remote_code,
        tokenizer_processes=tokenizer_processes,
    )  # fmt: skip
    if shard_tokens is None:
        width = skeleton.config.get_text_config().hidden_size
        shard_tokens = default_shard_tokens(width * len(names), poolings, store_dtype or dtype, token_budget, data.tokens.n_tokens)
    data.plan_options = PlanOptions(token_budget, shard_tokens, padding, max_padded_share)
    data.setup()  # here, before other processes are started: what is wrong with the data is told once, and early
    check_lengths(skeleton, data)
    del skeleton

    writer, progress = ActivationWriter(out, overwrite=overwrite, allow_changed=tuple(allow_changed or ())), TokenProgress()
    check = GroundTruthCheck(verify_samples) if verify_samples else None
    callbacks: list[pl.Callback] = [*([check] if check else []), writer, progress]
    try:
        trainer = pl.Trainer(
            accelerator=accelerator, devices=devices, num_nodes=num_nodes, callbacks=callbacks, logger=False,
            use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
    except (MisconfigurationException, ValueError) as error:
        raise InvalidInputError(f"--accelerator {accelerator} --devices {devices} cannot be had here: {error}") from error
    threads = cpu_threads or threads_of_run(out, overwrite) or max(1, (os.cpu_count() or 1) // trainer.num_devices)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # Lightning sets threads by this variable when it starts processes
    extractor = ActivationExtractor(
        model, names, poolings, options=options, store_dtype=store_dtype,
        cpu_threads=threads if trainer.strategy.root_device.type == "cpu" else None,
    )  # fmt: skip
    if trainer.is_global_zero:
        tell_plan(data, out)
    with named_to_children():
        trainer.predict(extractor, datamodule=data, return_predictions=False)
    if trainer.is_global_zero:
        tell_result(writer, check, data, progress, extractor, trainer.world_size)


def hook_point_names(n_layers: int, layers: list[int] | str | None, hooks: list[str]) -> list[str]:
    """Returns full hook point names: kinds of hook x layers, and those that are full names already.

    Raises:
        InvalidInputError: If layers and hooks do not fit each other, or there is no such layer.
    """
    from exactivations.lit_modules.hook_points import BLOCK_KINDS
    from exactivations.store.errors import InvalidInputError

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


def default_shard_tokens(width: int, poolings: list[str], dtype: str, token_budget: int, n_tokens: "npt.NDArray[np.int64]") -> int:
    """Returns how many tokens make a shard of about SHARD_BYTES, at most 131,072 and at least a batch.

    Args:
        width: Width of all hook points together.
        poolings: What is stored of each: token rows weigh far more than pooled ones.
        dtype: Dtype of the store; "auto" is taken for four bytes.
        token_budget: Most tokens in a batch.
        n_tokens: Length of each sample.
    """
    pooled_rows_per_token = (len(poolings) - ("tokens" in poolings)) * len(n_tokens) / int(n_tokens.sum())
    rows_per_token = ("tokens" in poolings) + pooled_rows_per_token
    bytes_per_token = width * rows_per_token * (2 if dtype in ("bfloat16", "float16") else 4)
    return max(token_budget, min(131072, int(SHARD_BYTES / bytes_per_token)))


def threads_of_run(out: str, overwrite: bool) -> int | None:
    """Returns the threads that the run in this folder was begun with, so that going on gives the same bits."""
    from exactivations.store.run_folder import RunFolder

    folder = RunFolder(out)
    if overwrite or not folder.exists:
        return None
    threads: int | None = folder.read_info().present_identity.get("cpu_threads")
    return threads


def tell_plan(data: "TextDataModule", out: str) -> None:
    """Prints what will be done, and what a user should know before it is."""
    plan, tokens, budget = data.plan, data.tokens, data.plan_options.token_budget
    n_tokens = int(plan.lengths.sum())
    print(f"{len(tokens):,} samples, {n_tokens:,} tokens, {plan.n_batches:,} batches, {plan.n_shards:,} shards -> {out}")
    if truncated := int(tokens.truncated.sum()):
        print(f"{truncated:,} samples were cut to {data.text.max_length} tokens ({data.text.truncation_side} end)")
    if skipped := tokens.skipped:
        shown = ", ".join(map(str, skipped[:10])) + (", ..." if len(skipped) > 10 else "")
        print(f"{len(skipped):,} empty samples are left out: {shown}")
    if over := int((plan.lengths > budget).sum()):
        longest = int(plan.lengths.max())
        print(f"{over:,} samples are longer than the token budget of {budget:,} (the longest has {longest:,}): each runs alone")


def tell_result(
    writer: "ActivationWriter", check: "GroundTruthCheck | None", data: "TextDataModule", progress: "TokenProgress",
    extractor: "ActivationExtractor", world_size: int,
) -> None:  # fmt: skip
    """Prints what was written, where, how fast, how it was verified, and how to read it."""
    from exactivations.scripts.show import how_to_read
    from exactivations.scripts.verification_table import verification_table

    assert writer.info is not None
    folder, n_shards = writer.folder, data.plan.n_shards
    published = folder.published(writer.info)
    size = sum(folder.shard_path(shard).stat().st_size for shard in published)
    before = len(published & data.skip_shards)
    there = f" ({before:,} were there already)" if before else ""
    print(f"wrote {len(published) - before:,} shards{there}, {size / 1e6:,.1f} MB in all, to {folder.path}")
    rate = (
        f"{progress.n_tokens / progress.seconds:,.0f} tokens/s{' on rank 0' if world_size > 1 else ''}, "
        if progress.seconds
        else ""
    )
    print(f"{rate}{data.plan.padded_share:.1%} padding; {', '.join(extractor.specs())}")
    if check is None:
        print(f"not verified (--verify-samples 0): readers refuse it until you run: exactivations verify {folder.path}")
    elif check.verification is not None:
        print(("nothing new was computed; " if check.was_verified_before else "") + verification_table(check.verification))
    if len(published) < n_shards:
        print(f"{n_shards - len(published):,} shards are in other nodes' folders: copy all folders into one to read them")
    else:
        print(how_to_read(str(folder.path), next(iter(extractor.specs()))))
