"""A zoo of faults that well-known tools shipped, each planted in a few lines. `python -m tests.planted_faults` prints the table.

Each plants its fault in an ordinary run of a tiny model, and says by what it was caught: the error's message, and how far the
stored rows were from the truth where they were compared at all.
"""

import random
import re
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, LlamaConfig, PreTrainedTokenizerFast

from exactivations.callbacks import ActivationWriter, GroundTruthCheck
from exactivations.callbacks.host_copy import HostCopier, HostCopy
from exactivations.datamodules import TextDataModule
from exactivations.datamodules.plan import PlanOptions
from exactivations.datamodules.tokenization import TextOptions, TokenTable
from exactivations.lit_modules import ActivationExtractor, verify_store
from exactivations.lit_modules.extraction.pooling import pool
from exactivations.lit_modules.models.hook_points import reading
from exactivations.lit_modules.models.language_model import evaluating
from exactivations.lit_modules.verification.sample_check import SampleCheck
from exactivations.scripts.import_masks import import_masks
from exactivations.store import ActivationStore
from exactivations.store.batches import ActivationBatch
from exactivations.store.errors import ExactivationsError
from exactivations.store.shard import open_shard, write_shard
from tests.lit_modules.tiny_models import SMALL, in_dtype, tiny_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HOOK_POINTS = ["embed", "resid_post.0", "resid_post.1", "resid_post.2", "final_norm"]
POOLINGS = ["tokens", "mean", "last"]
UNK, BOS, PAD, FIRST_WORD = 0, 1, 2, 3
WORDS = [f"w{i}" for i in range(99 - FIRST_WORD)]
LENGTHS = [2, 4, 4, 4, 7, 12, 30]


def tokenizer(shift: int = 0) -> PreTrainedTokenizerFast:
    """One id a word, BOS before each text; with `shift` the words have other ids."""
    words = WORDS[shift:] + WORDS[:shift]
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[BOS]", "[PAD]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", bos_token="[BOS]", pad_token="[PAD]")


def texts(n: int = 40, lengths: list[int] = LENGTHS, seed: int = 0) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=dice.choice(lengths))) for _ in range(n)]


def data_of(rows: list[str], shift: int = 0, **options) -> TextDataModule:
    text = {name: options.pop(name) for name in ("max_length", "on_empty") if name in options}
    plan = PlanOptions(**({"token_budget": 64, "shard_tokens": 100} | options))
    return TextDataModule(rows, tokenizer(shift), text=TextOptions(**text), plan_options=plan)


def model_of(family: str, dtype: str, seed: int = 0):
    model = tiny_model(family, seed)
    if family == "mamba":  # with weights as large as the others' it overflows float16 by itself
        for parameter in model.parameters():
            parameter.data.mul_(0.3 if parameter.ndim > 1 else 1.0)
    return in_dtype(model, DTYPES[dtype])


def hook_points_of(family: str) -> list[str]:
    return [name for name in HOOK_POINTS if name != "final_norm" or family not in ("bert", "roberta")]


def extractor_of(
    family: str, dtype: str, kind: type[ActivationExtractor] = ActivationExtractor, poolings: list[str] = POOLINGS
) -> ActivationExtractor:
    return kind(model_of(family, dtype), hook_points_of(family), poolings)


def run(folder: Path, extractor: ActivationExtractor, data: TextDataModule, check: bool = True) -> GroundTruthCheck:
    """An ordinary run, with its ground-truth check."""
    truth = GroundTruthCheck(n_samples=16)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, callbacks=[*([truth] if check else []), ActivationWriter(folder)], logger=False,
        use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.predict(extractor, datamodule=data, return_predictions=False)
    return truth


IDENTITY = ("sample_index", "n_tokens", "input_ids", "token_mask")


class BatchByBatch(ActivationExtractor):
    """An extractor of which a subclass changes what becomes of a batch."""

    def predict_step(self, step, batch_idx=0):
        parts = [self(batch) for batch in step.batches()]
        whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in IDENTITY}
        rows = {name: torch.cat([part.activations[name] for part in parts]) for name in parts[0].activations}
        return ActivationBatch(**whole, activations=rows, place=step.place)


class Faulty(BatchByBatch):
    """An extractor whose states come from a batch that a subclass made, and whose rows a subclass may spoil."""

    def forward(self, batch):
        loaded, states = self.load(self.device), {}
        ids, arguments, real = self.inputs(batch)
        keep = lambda name, state: states.update({name: state})  # noqa: E731
        with evaluating(loaded.model), reading(loaded.model, loaded.hook_points, keep, stop=False) as run:
            run(input_ids=ids, **loaded.arguments, **arguments)
        activations = {}
        for name, state in states.items():
            activations[f"{name}/tokens"] = state[:, real].flatten(0, 1)
            for pooling in ("mean", "last"):
                activations[f"{name}/{pooling}"] = pool(state[:, real], batch.token_mask, pooling).to(state.dtype)
            self.spoil(name, state, activations)
        planned = {f"{name}/{pooling}": activations[f"{name}/{pooling}"].clone() for name in states for pooling in POOLINGS}
        flat = batch.input_ids.flatten(), batch.token_mask.flatten()
        return ActivationBatch(batch.sample_index, batch.n_tokens, *flat, planned, batch.place)

    def inputs(self, batch):
        return batch.input_ids, {}, slice(None)

    def spoil(self, name, state, activations):
        pass


def padded(batch, left=0, right=0):
    """Ids and mask with so many pads on each side, and where the real tokens are."""
    ids = torch.nn.functional.pad(batch.input_ids, (left, right), value=PAD)
    mask = torch.nn.functional.pad(torch.ones_like(batch.input_ids), (left, right))
    return ids, mask, slice(left, ids.shape[1] - right)


class LeftPaddedWithoutPositions(Faulty):
    def inputs(self, batch):
        ids, mask, real = padded(batch, left=3)
        return ids, {"attention_mask": mask}, real


class LeftPadAttended(Faulty):
    def inputs(self, batch):
        ids, _, real = padded(batch, left=3)
        return ids, {}, real


class RightPadAttended(Faulty):
    def inputs(self, batch):
        ids, _, real = padded(batch, right=3)
        return ids, {}, real


class LastPositionUnderRightPadding(Faulty):
    def inputs(self, batch):
        ids, mask, real = padded(batch, right=3)
        return ids, {"attention_mask": mask}, real

    def spoil(self, name, state, activations):
        activations[f"{name}/last"] = state[:, -1]


class SwappedRows(Faulty):
    def spoil(self, name, state, activations):
        for pooling in ("mean", "last"):
            rows = activations[f"{name}/{pooling}"]
            activations[f"{name}/{pooling}"] = torch.cat([rows[1:2], rows[:1], rows[2:]])


class NanRow(Faulty):
    def spoil(self, name, state, activations):
        activations[f"{name}/mean"][-1] = torch.nan


class MeanWithoutLastToken(Faulty):
    def spoil(self, name, state, activations):
        activations[f"{name}/mean"] = state[:, :-1].float().mean(dim=1).to(state.dtype)


class SmallDimensionsLost(Faulty):
    """One dimension holds nearly all of the norm, as in many large models; the others are those of another sample."""

    def spoil(self, name, state, activations):
        for pooling in ("mean", "last"):
            rows = activations[f"{name}/{pooling}"]
            activations[f"{name}/{pooling}"] = torch.cat([rows[:, :1], rows.roll(1, dims=0)[:, 1:]], dim=1)


class WrongInItsDtypeOnly(Faulty):
    """A kernel that is wrong in the run's dtype, and right in every other."""

    def spoil(self, name, state, activations):
        if state.dtype == self.specs()[f"{name}/mean"].dtype and self._given[0].training_dtype == state.dtype:
            activations[f"{name}/mean"] = activations[f"{name}/mean"].roll(1, dims=1)


class HookPointMoved(ActivationExtractor):
    """Reads `resid_post.<from>` at the module `path`."""

    moved, path = "resid_post.1", "layers.0"

    def load(self, device="cpu"):
        loaded = super().load(device)
        points = [replace(point, path=self.path) if point.name == self.moved else point for point in loaded.hook_points]
        self._loaded = replace(loaded, hook_points=points)
        return self._loaded


class FinalNormForLastBlock(HookPointMoved):
    moved, path = "resid_post.2", "norm"


class LateCopier(HostCopier):
    """Hands out a buffer at once, and fills it only after it was read: a copy that nobody waited for."""

    def start(self, batch, check):
        late = {name: torch.zeros_like(values) for name, values in batch.activations.items()}

        @torch.inference_mode()
        def fill():
            for name, values in batch.activations.items():
                late[name].copy_(values)

        return HostCopy(replace(batch, activations=late), wait=lambda: None, release=fill)


@dataclass(frozen=True)
class Fault:
    """A fault of the zoo.

    Attributes:
        name: What it is.
        plant: Makes a run with the fault in a folder, in a dtype, and lets it be caught.
        says: What the message must say.
        family: The tiny model it is planted in.
    """

    name: str
    plant: Callable[[Path, str, str], object]
    says: str
    family: str = "llama"


def faulty(kind: type[ActivationExtractor], rows: list[str] | None = None):
    return lambda folder, family, dtype: run(folder, extractor_of(family, dtype, kind), data_of(rows or texts()))


def wrong_in_its_dtype_only(folder, family, dtype):
    model = model_of(family, dtype)
    model.training_dtype = DTYPES[dtype]
    run(folder, WrongInItsDtypeOnly(model, hook_points_of(family), POOLINGS), data_of(texts()))


def small_dimensions_lost(folder, family, dtype):
    model = model_of(family, dtype)
    model.get_input_embeddings().weight.data[:, 0] = 30.0
    extractor = SmallDimensionsLost(model, ["embed", "resid_post.0"], POOLINGS)
    run(folder, extractor, data_of(texts(lengths=[7])))


def one_bit(folder, family, dtype):
    """A bit flips in a shard after the run: found by its checksum, whatever was drawn."""
    data = data_of(texts())
    run(folder, extractor_of(family, dtype), data)
    path = ActivationStore(folder).folder.shard_path(0)
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    refuse(verify_store(folder, extractor_of(family, dtype), data), folder)


def rows_of_two_shards_swapped(folder, family, dtype):
    data = data_of(texts(lengths=[7]))
    run(folder, extractor_of(family, dtype), data, check=False)
    store = ActivationStore(folder, allow_unverified=True)
    shards = [open_shard(store.folder.shard_path(i)) for i in (0, 1)]
    (first, _), (second, _) = [({n: t.clone() for n, t in tensors.items()}, 0) for tensors, _ in shards]
    for name in store.names:
        n = 8 if name.endswith("/tokens") else 1
        first[name][:n], second[name][:n] = second[name][:n].clone(), first[name][:n].clone()
    for i, tensors in enumerate((first, second)):
        metadata = {key: value for key, value in shards[i][1].items() if key != "checksum"}
        write_shard(store.folder.shard_path(i), tensors, metadata)
    refuse(verify_store(folder, extractor_of(family, dtype), data, n_samples=40), folder)


def shifted_after_a_skipped_sample(folder, family, dtype):
    rows = texts(lengths=[7])
    rows[11] = ""
    gather = TokenTable.gather

    def off_by_one(self, positions):
        return gather(self, (positions + (positions >= 11)).clip(max=len(self) - 1))

    with mock.patch.object(TokenTable, "gather", off_by_one):  # no token rows, whose ids would tell at once
        run(folder, extractor_of(family, dtype, poolings=["mean", "last"]), data_of(rows, on_empty="skip"))


def stale_mask(folder, family, dtype):
    gather = TokenTable.gather

    def with_another_mask(self, positions):
        ids, mask = gather(self, positions)
        other = torch.rand(mask.shape, generator=torch.Generator().manual_seed(len(mask))) < 0.5
        other[np.cumsum(self.n_tokens[positions]) - self.n_tokens[positions]] = True  # the first token of each sample
        return ids, other

    with mock.patch.object(TokenTable, "gather", with_another_mask):  # no token rows, whose masks would tell at once
        run(folder, extractor_of(family, dtype, poolings=["mean", "last"]), data_of(texts()))


def mask_of_another_length(folder, family, dtype):
    """Another run's masks, saved by batch number: laid over a store's samples by their index."""
    run(folder, extractor_of(family, dtype), data_of(texts(12, lengths=[7])))
    masks = folder.with_name("masks")
    (masks / "batch_0").mkdir(parents=True)
    save_file({"attention_mask": torch.ones(12, 5, dtype=torch.int64)}, masks / "batch_0" / "attention_mask.safetensors")
    import_masks(str(masks), store=str(folder), out=str(folder.with_name("masks.parquet")))


def overflow(folder, family, dtype):
    """Too large for float16: computed in it, or (from a wider dtype) stored in it."""
    model = model_of(family, dtype)
    weight = model.layers[1].mlp.down_proj.weight
    weight.data.copy_((weight.data.float() * 3e6).clamp(-6e4, 6e4))
    run(folder, ActivationExtractor(model, hook_points_of(family), POOLINGS, store_dtype="float16"), data_of(texts()))


def another_revision(folder, family, dtype):
    run(folder, extractor_of(family, dtype), data_of(texts()))
    other = ActivationExtractor(model_of(family, dtype, seed=1), hook_points_of(family), POOLINGS)
    verify_store(folder, other, data_of(texts()))


def another_tokenizer(folder, family, dtype):
    run(folder, extractor_of(family, dtype), data_of(texts()))
    verify_store(folder, extractor_of(family, dtype), data_of(texts(), shift=1))


def truncated_against_whole(folder, family, dtype):
    run(folder, extractor_of(family, dtype), data_of(texts(), max_length=9))
    whole = data_of(texts())
    whole.setup()
    store = ActivationStore(folder)
    checked = SampleCheck(store, extractor_of(family, dtype), whole)
    longest = int(max(store.sample_index, key=lambda i: len(whole.full_dataset[int(i)]["text"])))
    raise Caught(checked.check(longest).failures[0])


def copy_not_waited_for(folder, family, dtype):
    with mock.patch("exactivations.callbacks.activation_writer.HostCopier", LateCopier):
        run(folder, extractor_of(family, dtype), data_of(texts()))


def rotary_rounded(folder, family, dtype):
    extractor = extractor_of(family, dtype)
    buffer = extractor._given[0].rotary_emb.inv_freq
    buffer.data = buffer.data.to(torch.bfloat16).to(buffer.dtype)
    run(folder, extractor, data_of(texts()))


def rotary_rounded_and_verified_later(folder, family, dtype):
    """The same, past the check at loading: made by another tool, say. It takes long samples and sharp attention to show."""
    config = LlamaConfig(**SMALL | {"num_attention_heads": 2}, num_key_value_heads=2, max_position_embeddings=2048)

    def long_extractor():
        torch.manual_seed(0)
        model = AutoModel.from_config(config)
        for name, parameter in model.named_parameters():
            parameter.data.mul_(20.0 if "q_proj" in name or "k_proj" in name else 3.0 if parameter.ndim > 1 else 1.0)
        return ActivationExtractor(in_dtype(model, DTYPES[dtype]), hook_points_of(family), POOLINGS)

    extractor, data = long_extractor(), data_of(texts(2, lengths=[1500]), token_budget=4000)
    buffer = extractor._given[0].rotary_emb.inv_freq
    buffer.data = buffer.data.to(torch.bfloat16).to(buffer.dtype)
    with mock.patch("exactivations.lit_modules.extraction.extractor.refuse_rounded_buffers", lambda model, **_: None):
        run(folder, extractor, data, check=False)
    refuse(verify_store(folder, long_extractor(), data), folder)


class Caught(ExactivationsError):
    """For what a function returns and does not raise."""


def refuse(verification, folder):
    if not verification.passed:
        ActivationStore(folder)  # which refuses it


ZOO = [
    Fault("left padding without positions, absolute positions", faulty(LeftPaddedWithoutPositions), r"sample \d+: embed", "gpt2"),
    Fault("pad token attended (left padding without mask)", faulty(LeftPadAttended), r"sample \d+: resid_post"),
    Fault("pad token attended (an encoder without mask)", faulty(RightPadAttended), r"sample \d+: resid_post", "bert"),
    Fault("position [-1] read under right padding", faulty(LastPositionUnderRightPadding), r"sample \d+: \S+/last"),
    Fault("hook point off by one", faulty(HookPointMoved), r"resid_post.1/.*it looks like resid_post.0 of the same sample"),
    Fault("final norm taken for the last block", faulty(FinalNormForLastBlock), "resid_post.2/.*it looks like final_norm"),
    Fault("two rows of a batch swapped", faulty(SwappedRows), r"sample \d+: .*it looks like sample \d+"),
    Fault("mean without the last token", faulty(MeanWithoutLastToken, texts(lengths=[60])), r"sample \d+: \S+/mean is not what"),
    Fault("rows swapped but for one large dimension", small_dimensions_lost, r"sample \d+: embed/(mean|last) is not what"),
    Fault("wrong in this dtype only", wrong_in_its_dtype_only, r"sample \d+: \S+/mean is not what .* a kernel of this dtype"),
    Fault("one bit of a shard flipped", one_bit, r"00000.safetensors is damaged"),
    Fault("rows of two shards swapped", rows_of_two_shards_swapped, r"sample \d+: "),
    Fault("rows shifted after a skipped sample", shifted_after_a_skipped_sample, r"looks like sample \d+, the next in the dataset"),
    Fault("stale mask of the right shape", stale_mask, r"sample \d+: embed/(mean|last)"),
    Fault("mask of another length", mask_of_another_length, r"sample \d+: token_mask has 5 positions"),
    Fault("float16 overflow to inf", overflow, r"sample \d+: \S+ is -?inf.*float16 ends at 65,504"),
    Fault("NaN rows", faulty(NanRow), r"sample \d+: \S+/mean is nan"),
    Fault("weights of another revision", another_revision, "was not made of this model and data.*\n  model: "),
    Fault("another tokenizer", another_tokenizer, r"tokenizer: .*(\n.*)*sample 0 has token_hash"),
    Fault("truncated sample against the whole one", truncated_against_whole, r"sample \d+ .*cut to 9 tokens"),
    Fault("buffer read before its asynchronous copy finished", copy_not_waited_for, r"sample \d+: "),
    Fault("rotary buffer rounded to bfloat16, at loading", rotary_rounded, "rotary_emb.inv_freq .* was cast"),
    Fault("rotary buffer rounded to bfloat16, in a store", rotary_rounded_and_verified_later, r"sample \d+: resid_post"),
]  # fmt: skip


def caught(fault: Fault, dtype: str, folder: Path) -> str:
    """Plants a fault and returns the message that it was caught with; empty if it was not."""
    try:
        fault.plant(folder, fault.family, dtype)
    except ExactivationsError as error:
        return str(error)
    return ""


def largest_error(message: str) -> str:
    errors = [float(error) for error in re.findall(r"relative error ([^ ,]+)", message)]
    return f"{max(errors):.2g}" if errors else "refused"


def shown(message: str) -> str:
    """What names the sample or the cause in a message, short enough for a table."""
    lines = [line.strip() for line in message.splitlines()]
    line = next((line for line in lines if re.match(r"sample|model|tokenizer|buffer|\S+ is damaged", line)), lines[0])
    line = re.sub(r"/\S*/", "", line)
    line = re.sub(r".*?(sample \d+: )", r"\1", line, count=1)
    hint = line.rpartition("; ")[2] if " is not what the sample gives alone" in line else ""
    line = line.partition(" is not what the sample gives alone")[0] + (f": {hint}" if hint else "")
    return line if len(line) <= 130 else f"{line[:130].rpartition(' ')[0]} …"


def main() -> None:
    """Prints the table of docs/verification.md."""
    print("| fault | float32 | bfloat16 | float16 | what is said |\n|---|---|---|---|---|")
    with ExitStack() as stack:
        for fault in ZOO:
            told = [caught(fault, d, Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run") for d in DTYPES]
            found = [largest_error(message) if message else "MISSED" for message in told]
            print(f"| {fault.name} | {' | '.join(found)} | {shown(told[0])} |", flush=True)


if __name__ == "__main__":
    main()
