"""`exactivations extract`: activations of a dataset, into a store."""

import os
from dataclasses import replace
from typing import Any, Literal

from exactivations.scripts.show import how_to_read


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
    store_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    random_weights: int | None = None,
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
    """Extracts activations of every sample of a dataset into a store; started again, it goes on where it was.

    Args:
        model: "demo" (embedded), a Hugging Face hub id, or a local path.
        dataset: "demo" (embedded), a hub id, a .jsonl, .csv, .parquet or .txt file, or a folder saved by `datasets`.
        out: The run folder to write.
        layers: Layers at which the block hooks are read, such as 1 3, or "all"; needed by resid_post and the like.
            Negative ones count from the last: -1.
        hooks: What is read: resid_post, attn_out, mlp_out, attn_z, mlp_act (at each layer), embed, final_norm, module:<path>,
            input:<path>, or one full name such as resid_post.3. Default: resid_post.
        pooling: tokens, last, first, mean, max, exp_decay:<half-life>, position:<k> (of the tokens that count; -2 is the
            last but one), each at each hook point. Default: mean last.
        config_name: Configuration of a hub dataset.
        split: For example train or train[:1000].
        text_column: Column with the texts.
        keep: Columns of the dataset that go into samples.parquet. Default: all.
        num_samples: Take only so many samples, the first ones.
        sample_seed: With num_samples: a random choice with this seed instead of the first ones.
        max_length: Cut longer texts to so many tokens; how many were cut is told. Longer conversations are refused.
        truncation_side: Which end of a text is cut off; the tokenizer's own special tokens stay.
        add_special_tokens: Whether the tokenizer adds its own special tokens (BOS, [CLS], ...).
        template: Text around each text, with {text} where it goes.
        messages_column: Column with chat messages, to which the chat template is applied; takes the place of text_column.
        add_generation_prompt: Whether the chat template opens the assistant's next turn.
        chat_template_kwargs: Further variables of the chat template, as JSON, such as {"enable_thinking": false}.
        token_mask: Which tokens poolings count: content (no special tokens), assistant (as the chat template marks), or all.
        skip_first: So many first tokens of each sample are not content: 1 where the tokenizer adds no BOS (GPT-2, Pythia), whose
            first token is an attention sink with a norm far above all others.
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
        random_weights: Draw the weights with this seed instead of loading them: an untrained model, as a control.
        devices: Devices (or CPU processes) on each node.
        accelerator: auto, gpu or cpu.
        num_nodes: Nodes; start the same command on each, by torchrun, SLURM or hand.
        cpu_threads: Threads of each process on a CPU; they decide the last bits. Default: what the run folder was begun with,
            or the cores divided by the devices.
        tokenizer_processes: Processes for slow tokenizers; fast ones use all cores by themselves.
        verify_samples: At the end, compute so many samples again, alone, and compare them with the store. 0 verifies nothing, and
            leaves a store that readers refuse until `exactivations verify` was run on it.
        least_free: Stop, keeping what is published, when less than this share of the memory is left (4 GiB at most). 0: never.
        overwrite: Remove the run that is in the folder, and start anew.
        allow_changed: Of torch, transformers, device_type, cpu_threads: what may differ from the run that is being continued.
    """
    from exactivations.callbacks.process_watch import end_with_parent

    end_with_parent(int(os.environ.get("LOCAL_RANK", "0")))

    from exactivations.callbacks.activation_writer import ActivationWriter
    from exactivations.datamodules.text import TextDataModule
    from exactivations.datamodules.tokenization import TextOptions
    from exactivations.lit_modules.models.language_model import ModelOptions
    from exactivations.scripts.prediction import Machine, Reading, hook_points_of, plan_data, predict

    options = ModelOptions(revision, dtype, attn_implementation, trust_remote_code, random_weights)
    reading = Reading(model, options, [], pooling or ["mean", "last"], store_dtype)
    skeleton, names = hook_points_of(reading, layers, hooks or ["resid_post"])
    reading = replace(reading, hook_points=names)
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
            truncation_side=truncation_side, chat_template_kwargs=chat_template_kwargs, skip_first=skip_first,
            on_empty=on_empty,
        ),
        tokenizer_revision=None if tokenizer else revision,
        trust_remote_code=trust_remote_code,
        tokenizer_processes=tokenizer_processes,
    )  # fmt: skip
    plan_data(data, skeleton, reading, token_budget, shard_tokens, padding, max_padded_share)
    del skeleton
    writer = ActivationWriter(out, overwrite=overwrite, allow_changed=tuple(allow_changed or ()))
    finished = predict(reading, data, writer, Machine(devices, accelerator, num_nodes, cpu_threads), verify_samples, least_free)
    if finished.is_first:
        finished.tell()
        if finished.is_whole:
            print(how_to_read(out, next(iter(finished.extractor.specs()))))
