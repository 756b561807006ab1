"""`exactivations means run` and `means add`: mean vectors of a dataset, and of more of it."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal


def means_run(
    model: str,
    *,
    dataset: str,
    out: str,
    layers: list[int] | Literal["all"] | None = None,
    hooks: list[str] | None = None,
    mode: Literal["short", "long", "both"] | None = None,
    pooling: list[str] | None = None,
    average_layers: bool = False,
    positions: int = 0,
    group: str | None = None,
    keep_rows: bool = False,
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
    chat_template_kwargs: dict[str, Any] | None = None,
    token_mask: Literal["content", "assistant", "all"] = "content",
    skip_first: int = 0,
    on_empty: Literal["error", "skip"] = "error",
    token_budget: int = 8192,
    shard_tokens: int | None = None,
    padding: Literal["none", "tail"] = "none",
    max_padded_share: float = 0.05,
    tokenizer: str | None = None,
    revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    store_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    devices: int = 1,
    accelerator: str = "auto",
    num_nodes: int = 1,
    cpu_threads: int | None = None,
    tokenizer_processes: int | None = None,
    verify_samples: int = 16,
    least_free: float = 0.05,
    overwrite: bool = False,
    allow_changed: list[str] | None = None,
) -> None:
    """Takes mean vectors of a dataset, without storing its activations; started again, it goes on where it was.

    Args:
        model: "demo" (embedded), a Hugging Face hub id, or a local path.
        dataset: "demo" (embedded), a hub id, a .jsonl, .csv, .parquet or .txt file, or a folder saved by `datasets`.
        out: The run folder to write; the result is its means.safetensors.
        layers: Layers at which the block hooks are read, such as 1 3, or "all". Negative ones count from the last: -1.
        hooks: What is read: resid_post, attn_out, mlp_out, attn_z, mlp_act (at each layer), embed, final_norm, module:<path>,
            input:<path>, or one full name such as resid_post.3. Default: resid_post.
        mode: short is exp_decay:0.067; long is last, exp_decay:0.023, exp_decay:0.067 and exp_decay:0.159, concatenated
            (four times as wide); both are two means.
        pooling: Any other poolings: last, first, mean, max, exp_decay:<half-life>, position:<k>. Default: mean, if there is no
            mode either.
        average_layers: Average all that is read over the layers, in one mean, instead of a mean for each.
        positions: Also means of the states at so many positions, counted from each sample's end, to centre by position.
        group: A column: also a mean for each of its values, for difference-of-means vectors.
        keep_rows: Keep every sample's pooled rows too, as `extract` does.
        config_name: Configuration of a hub dataset.
        split: For example train or train[:1000].
        text_column: Column with the texts.
        keep: Columns of the dataset that go into samples.parquet. Default: only that of --group.
        num_samples: Take only so many samples, the first ones.
        sample_seed: With num_samples: a random choice with this seed instead of the first ones.
        max_length: Cut longer texts to so many tokens; how many were cut is told. Longer conversations are refused.
        truncation_side: Which end of a text is cut off; the tokenizer's own special tokens stay.
        add_special_tokens: Whether the tokenizer adds its own special tokens (BOS, [CLS], ...).
        template: Text around each text, with {text} where it goes.
        messages_column: Column with chat messages, to which the chat template is applied; takes the place of text_column.
        add_generation_prompt: Whether the chat template opens the assistant's next turn.
        chat_template_kwargs: Further variables of the chat template, as JSON, such as {"enable_thinking": false}.
        token_mask: Which tokens count: content (no special tokens, so that BOS is in no mean), assistant, or all.
        skip_first: So many first tokens of each sample are not content: 1 where the tokenizer adds no BOS (GPT-2, Pythia), whose
            first token is an attention sink with a norm far above all others.
        on_empty: What to do about an empty text: error, or skip and record.
        token_budget: Most tokens in one batch. A longer sample runs alone.
        shard_tokens: About so many tokens in one shard, after each of which what was done is on the disk. Default: what makes
            about 1 GB in memory, at most 131,072 and at least a batch.
        padding: none (batches of one length), or tail (rare lengths share batches, padded on the right; causal models only).
        max_padded_share: With tail: the most padding in a batch.
        tokenizer: Another tokenizer than the model's own.
        revision: Branch, tag or commit of a hub model.
        dtype: The model's dtype. auto: the checkpoint's on a GPU, float32 on a CPU.
        store_dtype: Dtype of the pooled vectors before they are added up, in float64.
        attn_implementation: sdpa, eager, flash_attention_2, ... Default: the model's.
        trust_remote_code: Whether code from the model's repository may run.
        devices: Devices (or CPU processes) on each node.
        accelerator: auto, gpu or cpu.
        num_nodes: Nodes; start the same command on each, by torchrun, SLURM or hand.
        cpu_threads: Threads of each process on a CPU; they decide the last bits. Default: what the run folder was begun with,
            or the cores divided by the devices.
        tokenizer_processes: Processes for slow tokenizers; fast ones use all cores by themselves.
        verify_samples: At the end, compute so many samples again, alone, and compare them with what was kept of them. 0
            verifies nothing, and leaves means that are refused until `exactivations verify` was run on the folder.
        least_free: Stop, keeping what is published, when less than this share of the memory is left (4 GiB at most). 0: never.
        overwrite: Remove the run that is in the folder, and start anew.
        allow_changed: Of torch, transformers, device_type, cpu_threads: what may differ from the run that is being continued.
    """
    from exactivations.callbacks.process_watch import end_with_parent

    end_with_parent(int(os.environ.get("LOCAL_RANK", "0")))

    from exactivations.callbacks.activation_writer import ActivationWriter
    from exactivations.callbacks.running_mean import RunningMean
    from exactivations.datamodules.text import TextDataModule
    from exactivations.datamodules.tokenization import TextOptions
    from exactivations.lit_modules.models.language_model import ModelOptions
    from exactivations.scripts.means_table import tell_means
    from exactivations.scripts.prediction import Machine, Reading, hook_points_of, plan_data, predict
    from exactivations.store.pooling_names import TOKENS
    from exactivations.store.shard_sums import MeanOptions
    from exactivations.store.vectors import poolings_needed, vectors_of

    of_mode = {"both": ["short", "long"], None: []}.get(mode, [str(mode)])
    named = list(dict.fromkeys([*of_mode, *(pooling or [])])) or ["mean"]
    wanted = [*poolings_needed(named), *([TOKENS] if positions else [])]
    reading = Reading(model, ModelOptions(revision, dtype, attn_implementation, trust_remote_code), [], wanted, store_dtype)
    skeleton, names = hook_points_of(reading, layers, hooks or ["resid_post"])
    reading = replace(reading, hook_points=names)
    options = MeanOptions(vectors_of(names, named, average=average_layers), group, positions)
    data = TextDataModule(
        dataset,
        tokenizer or model,
        config=config_name,
        split=split,
        keep_columns=list(dict.fromkeys([*(keep or []), *([group] if group else [])])),
        num_samples=num_samples,
        sample_seed=sample_seed,
        text=TextOptions(
            text_column=text_column, template=template, messages_column=messages_column, max_length=max_length,
            add_generation_prompt=add_generation_prompt, add_special_tokens=add_special_tokens, token_mask=token_mask,
            truncation_side=truncation_side, chat_template_kwargs=chat_template_kwargs, skip_first=skip_first,
            on_empty=on_empty,
        ),
        tokenizer_revision=None if tokenizer else revision,
        trust_remote_code=trust_remote_code,
        tokenizer_processes=tokenizer_processes,
    )  # fmt: skip
    plan_data(data, skeleton, reading, token_budget, shard_tokens, padding, max_padded_share)
    del skeleton
    changed = tuple(allow_changed or ())
    writer = (
        ActivationWriter(out, overwrite=overwrite, allow_changed=changed, means=options)
        if keep_rows
        else RunningMean(out, options, overwrite=overwrite, allow_changed=changed)
    )
    finished = predict(reading, data, writer, Machine(devices, accelerator, num_nodes, cpu_threads), verify_samples, least_free)
    if finished.is_first:
        finished.tell()
        if finished.is_whole:
            tell_means(out)


def means_add(
    result: str,
    *,
    dataset: str,
    out: str | None = None,
    allow_duplicates: bool = False,
    model: str | None = None,
    tokenizer: str | None = None,
    config_name: str | None = None,
    split: str | None = None,
    text_column: str | None = None,
    messages_column: str | None = None,
    num_samples: int | None = None,
    sample_seed: int | None = None,
    on_empty: Literal["error", "skip"] = "error",
    token_budget: int = 8192,
    shard_tokens: int | None = None,
    devices: int = 1,
    accelerator: str = "auto",
    num_nodes: int = 1,
    cpu_threads: int | None = None,
    verify_samples: int = 16,
    least_free: float = 0.05,
    overwrite: bool = False,
) -> None:
    """Adds further samples to a result, without computing the old ones again.

    Model, hook points, poolings and text options are those of the result. The new samples are a run of their own, which can be
    killed and started again; the result is only replaced when it is complete and verified.

    Args:
        result: The result to add to: a run folder, or its means.safetensors.
        dataset: The further samples, as in `means run`.
        out: Folder of the run over them. Default: added-1, added-2, ... beside the result.
        allow_duplicates: Let samples count that are in the result already, by the hash of their tokens.
        model: The result's model, if it is called or lies otherwise now.
        tokenizer: The result's tokenizer, likewise.
        config_name: Configuration of a hub dataset.
        split: For example train or train[:1000].
        text_column: Column with the texts, if it is called otherwise than before.
        messages_column: Column with chat messages, likewise.
        num_samples: Take only so many samples, the first ones.
        sample_seed: With num_samples: a random choice with this seed instead of the first ones.
        on_empty: What to do about an empty text: error, or skip and record.
        token_budget: Most tokens in one batch.
        shard_tokens: About so many tokens in one shard.
        devices: Devices (or CPU processes) on each node.
        accelerator: auto, gpu or cpu.
        num_nodes: Nodes; start the same command on each.
        cpu_threads: Threads of each process on a CPU.
        verify_samples: Compute so many of the further samples again, alone; at least 1.
        least_free: Stop, keeping what is published, when less than this share of the memory is left (4 GiB at most). 0: never.
        overwrite: Remove the run that is in the folder of the added samples, and start it anew.
    """
    from exactivations.callbacks.process_watch import end_with_parent

    end_with_parent(int(os.environ.get("LOCAL_RANK", "0")))

    from exactivations.callbacks.running_mean import RunningMean
    from exactivations.lit_modules.extraction.origin import Samples, data_for, model_of, points_of, poolings_of
    from exactivations.lit_modules.models.language_model import load_skeleton
    from exactivations.scripts.means_table import tell_means
    from exactivations.scripts.prediction import Machine, Reading, plan_data, predict
    from exactivations.store.errors import InvalidInputError
    from exactivations.store.means_file import duplicates, hashes_as_bytes, path_of, read_means
    from exactivations.store.means_join import add_to, duplicates_in_words
    from exactivations.store.run_folder import RunFolder

    if verify_samples < 1:
        raise InvalidInputError("--verify-samples must be at least 1: a result with unverified samples in it would be refused")
    before, path = read_means(result), path_of(result)
    folder = Path(out) if out else path.parent / f"added-{len(before.parts)}"
    samples = Samples(dataset, config_name, split, text_column, messages_column, num_samples, sample_seed, on_empty)
    column = before.options.group_column
    data = data_for(before, samples, tokenizer, [column] if column else None)
    name, options = model_of(before, model)
    reading = Reading(name, options, points_of(before), poolings_of(before), before.identity["store_dtype"])
    plan_data(data, load_skeleton(name, options), reading, token_budget, shard_tokens, "none", 0.05)
    keys = hashes_as_bytes(data.tokens.token_hash.to_pylist())
    doubled = duplicates(before, keys)
    if len(doubled) and not allow_duplicates:
        raise InvalidInputError(duplicates_in_words(before, keys, data.tokens.sample_index, doubled))
    writer = RunningMean(folder, before.options, overwrite=overwrite)
    finished = predict(reading, data, writer, Machine(devices, accelerator, num_nodes, cpu_threads), verify_samples, least_free)
    if finished.is_first:
        finished.tell()
        if finished.is_whole:
            add_to(path, RunFolder(folder), allow_duplicates=allow_duplicates)
            print(f"added to {path}:")
            tell_means(str(path))
