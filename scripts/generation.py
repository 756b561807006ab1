"""What every command that completes prompts with two models does: load a pair that fits, generate into a run folder, tell of it."""

from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_only
from transformers import PreTrainedTokenizerBase

from exactivations.callbacks.completion_progress import CompletionProgress
from exactivations.callbacks.completion_writer import CompletionWriter
from exactivations.callbacks.memory_watch import MemoryWatch
from exactivations.callbacks.process_watch import named_to_children
from exactivations.datamodules.named_tokenizer import load_tokenizer
from exactivations.datamodules.plan import PlanOptions
from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import text_at_cut_end
from exactivations.lit_modules.amplification.amplifier import AmplifyOptions, LogitDiffAmplifier
from exactivations.lit_modules.amplification.tokenizer_compatibility import tokenizer_compatibility
from exactivations.lit_modules.extraction.extractor import check_lengths
from exactivations.lit_modules.models.language_model import ModelOptions, load_skeleton, vocabulary_size
from exactivations.scripts.prediction import Machine, tell_plan, threads_for, trainer_of
from exactivations.store.completions import Completion
from exactivations.store.errors import InvalidInputError

TOKEN_BUDGET, PROMPTS_IN_SHARD = 2048, 32
LONGEST_LINE = 160  # of a completion that is shown


@dataclass(frozen=True, kw_only=True)
class NamedPair:
    """Two models by name, and how each is loaded."""

    before: str
    after: str
    before_options: ModelOptions
    after_options: ModelOptions

    @property
    def parts(self) -> tuple[tuple[str, ModelOptions], tuple[str, ModelOptions]]:
        """The before and the after model's name and options."""
        return (self.before, self.before_options), (self.after, self.after_options)

    @rank_zero_only
    def tell(self, alphas: str) -> None:
        """Prints, on rank 0, which model is which: swapped, they would fit as well, and what is amplified have the other sign."""
        print(f"amplifying what {self.after} has over {self.before}, alpha {alphas}", flush=True)

    def tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """Loads those of the "before" and the "after" model."""
        return {
            part: load_tokenizer(name, revision=options.revision, trust_remote_code=options.trust_remote_code)
            for part, (name, options) in zip(("before", "after"), self.parts, strict=True)
        }

    def common(self) -> tuple[torch.Tensor | None, str | None]:
        """Holds the tokenizers against each other.

        Returns:
            Bool [C], True for ids that mean the same token in both, and what differs, in words; None and None if the two
            vocabularies are one, padding included.

        Raises:
            InvalidInputError: If the tokenizers are incompatible.
        """
        compatibility = tokenizer_compatibility(**self.tokenizers())
        common = compatibility.common_or_refuse()
        of_before, of_after = (vocabulary_size(load_skeleton(name, options)) for name, options in self.parts)
        if compatibility.verdict == "identical" and of_before == of_after:
            return None, None
        aligned = f"the models have {of_before} (before) and {of_after} (after) embeddings; only ids that both share are drawn"
        return common, f"tokenizers: {compatibility.text}\n{aligned}"


@dataclass(frozen=True)
class Generation:
    """A run that came to its end, on this rank."""

    writer: CompletionWriter
    data: TextDataModule
    progress: CompletionProgress
    memory: MemoryWatch
    is_first: bool

    @property
    def is_whole(self) -> bool:
        """Whether all shards are in this folder, and none in another node's."""
        assert self.writer.info is not None
        return len(self.writer.folder.published(self.writer.info)) == self.data.plan.n_shards

    def tell(self) -> None:
        """Prints what was written, how fast, and what memory it took."""
        assert self.writer.info is not None
        published = self.writer.folder.published(self.writer.info)
        before = len(published & self.data.skip_shards)
        there = f" ({before:,} were there already)" if before else ""
        print(f"wrote {len(published) - before:,} shards{there} to {self.writer.folder.path}")
        if self.progress.seconds:
            rate = self.progress.n_tokens / self.progress.seconds
            n = self.progress.n_completions
            print(f"{n:,} completions on rank 0, {rate:,.0f} tokens/s; {self.memory.in_words()}")
        if not self.is_whole:
            left = self.data.plan.n_shards - len(published)
            print(f"{left:,} shards are in other nodes' folders: copy all folders into one to read them")


def plan_prompts(data: TextDataModule, pair: NamedPair, token_budget: int, shard_tokens: int | None) -> None:
    """Tokenizes and plans prompts, and holds them against both models, before any weights are loaded or processes started.

    Raises:
        InvalidInputError: If prompts were cut at an end at which the template has text: what continues them would not follow it.
    """
    if ends := text_at_cut_end(data.text):
        cut = data.tokens.sample_index[data.tokens.truncated]
        if len(cut):
            raise InvalidInputError(
                f"sample {cut[0]} is longer than {data.text.max_length} tokens and was cut on the {data.text.truncation_side}, the "
                f"template with it ({len(cut):,} of {len(data.tokens):,} prompts), which has {ends!r} there: pass a larger "
                "--max-length, or the other --truncation-side"
            )
    if shard_tokens is None:
        n_tokens = data.tokens.n_tokens
        shard_tokens = max(1, round(PROMPTS_IN_SHARD * float(n_tokens.mean())))  # a kill costs at most such a shard
    data.plan_options = PlanOptions(min(token_budget, max(shard_tokens, int(data.tokens.n_tokens.max()))), shard_tokens)
    data.setup()
    for name, options in pair.parts:
        check_lengths(load_skeleton(name, options), data)


def complete(
    pair: NamedPair,
    data: TextDataModule,
    options: AmplifyOptions,
    writer: CompletionWriter,
    machine: Machine,
    least_free: float,
    kind: type[LogitDiffAmplifier] = LogitDiffAmplifier,
) -> Generation:
    """Completes planned prompts into the writer's folder; what is there already is not generated again."""
    progress, memory = CompletionProgress(), MemoryWatch(least_free)
    trainer = trainer_of(machine, [writer, progress, memory])
    common, differences = pair.common()
    amplifier = kind(
        before=pair.before, after=pair.after, options=options, common=common, before_options=pair.before_options,
        after_options=pair.after_options, cpu_threads=threads_for(machine, trainer, writer),
    )  # fmt: skip
    if trainer.is_global_zero:
        tell_plan(data, str(writer.folder.path))
        if differences is not None:
            print(differences)
    with named_to_children():
        trainer.predict(amplifier, datamodule=data, return_predictions=False)
    return Generation(writer, data, progress, memory, trainer.is_global_zero)


def in_words(completion: Completion) -> str:
    """Returns a completion on two lines: whose it is and the end of its prompt, and what was generated."""
    head = f"sample {completion.sample_index}, alpha {completion.alpha:g}, rollout {completion.rollout}"
    return f"{head}: …{_shortened(str(completion.prompt)[-40:])}\n    {_shortened(str(completion.text))}"


def _shortened(text: str) -> str:
    text = repr(text)[1:-1]
    return text if len(text) <= LONGEST_LINE else text[: LONGEST_LINE - 1] + "…"
