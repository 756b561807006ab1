"""TextDataModule: texts in, planned batches of whole samples out."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from exactivations.datamodules.draw import choose
from exactivations.datamodules.named_tokenizer import load_tokenizer
from exactivations.datamodules.plan import Plan, PlanOptions, plan
from exactivations.datamodules.sources import load_source
from exactivations.datamodules.tokenization import EncodedSample, TextOptions, TokenTable, encode_alone, tokenize, tokenizer_hash
from exactivations.store.batches import Place, TokenBatch, TokenStep
from exactivations.store.errors import InvalidInputError
from exactivations.store.run_folder import OWN_COLUMNS, SAMPLES_BLOCK
from exactivations.store.shard_sums import Groups


class TextDataModule(pl.LightningDataModule):
    """Tokenizes a dataset once, plans it, and yields this rank's part of the plan as `TokenStep`s.

    The items of its DataLoader *are* whole batches, as many as fit into a token budget (`batch_size=None`), so Lightning has
    nothing to sample, rebuild or shard: use `Trainer(use_distributed_sampler=False)`. Ranks get different numbers of
    batches, some of them none.

    Args:
        source: See `load_source`: "demo", a hub id, a file, a folder, a list of texts, or a `datasets.Dataset`.
        tokenizer: A tokenizer, or the name that `AutoTokenizer` loads it by, or "demo".
        tokenizer_revision: Branch, tag or commit of a hub tokenizer: that of the model it belongs to.
        trust_remote_code: Whether code from the tokenizer's repository may run here.
        config: Configuration of a hub dataset.
        split: For example "train[:1000]".
        keep_columns: Columns of the dataset that go into samples.parquet; None keeps all.
        num_samples: Take only so many samples: the first ones, or with `sample_seed` a random choice (in dataset order, under
            their own indices).
        sample_seed: Seed of that choice.
        text: How rows become tokens.
        plan_options: How samples are put into batches and shards.
        tokenizer_processes: Processes for a slow tokenizer; fast ones use all cores by themselves.
        num_workers: DataLoader workers. None pays in ordinary use: a batch is a copy from a memory map.

    Raises:
        InvalidInputError: In `setup`, for anything about the dataset or options that cannot be used as asked.
    """

    def __init__(
        self,
        source: str | Path | list[str] | datasets.Dataset | datasets.DatasetDict,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        *,
        tokenizer_revision: str | None = None,
        trust_remote_code: bool = False,
        config: str | None = None,
        split: str | None = None,
        keep_columns: list[str] | None = None,
        num_samples: int | None = None,
        sample_seed: int | None = None,
        text: TextOptions | None = None,
        plan_options: PlanOptions | None = None,
        tokenizer_processes: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        # A rank without batches is ordinary here (fewer shards than ranks), and every rank still reaches every collective.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        if sample_seed is not None and num_samples is None:
            raise InvalidInputError("sample_seed chooses num_samples samples at random: say how many")
        self.source, self.config, self.split = source, config, split
        self.keep_columns, self.num_samples, self.sample_seed = keep_columns, num_samples, sample_seed
        self.text, self.plan_options = text or TextOptions(), plan_options or PlanOptions()
        self.tokenizer_processes, self.num_workers = tokenizer_processes, num_workers
        self.skip_shards: frozenset[int] = frozenset()
        self._groups: dict[str, Groups] = {}
        self._tokenizer, self.tokenizer_revision, self.trust_remote_code = tokenizer, tokenizer_revision, trust_remote_code

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when it is first needed."""
        if not isinstance(self._tokenizer, str | Path):
            return self._tokenizer
        return load_tokenizer(self._tokenizer, revision=self.tokenizer_revision, trust_remote_code=self.trust_remote_code)

    def prepare_data(self) -> None:
        """Tokenizes into the cache, on one process of each node; the others then find it there."""
        self.setup()

    def setup(self, stage: str = "predict") -> None:
        """Loads, tokenizes (from the cache if it was done before) and plans. Doing it twice costs nothing."""
        _ = self.columns, self.plan

    @cached_property
    def full_dataset(self) -> datasets.Dataset:
        """The dataset as given: sample indices are positions in it."""
        full = load_source(self.source, self.config, self.split, self.text.text_column).with_format(None)
        if not len(full):
            raise InvalidInputError("the dataset has no samples")
        return full

    @cached_property
    def selected(self) -> npt.NDArray[np.int64]:
        """int64 [n], the indices of the samples that were asked for, ascending."""
        n = len(self.full_dataset)
        if self.num_samples is None:
            return np.arange(n)
        if not 1 <= self.num_samples <= n:
            raise InvalidInputError(f"{self.num_samples} samples were asked for, the dataset has {n}")
        if self.sample_seed is None:
            return np.arange(self.num_samples)
        return choose(n, self.num_samples, self.sample_seed)

    @cached_property
    def tokens(self) -> TokenTable:
        """The tokens of all samples."""
        dataset = self.full_dataset if self.num_samples is None else self.full_dataset.select(self.selected)
        return tokenize(dataset, self.selected, self.tokenizer, self.text, self.tokenizer_processes)

    @cached_property
    def plan(self) -> Plan:
        """The plan of all samples, the same on every rank."""
        return plan(self.tokens.n_tokens, self.plan_options)

    @cached_property
    def columns(self) -> list[str]:
        """The columns of the dataset that are kept."""
        available: list[str] = self.full_dataset.column_names
        columns = available if self.keep_columns is None else list(dict.fromkeys(self.keep_columns))
        for name in columns:
            if name not in available:
                raise InvalidInputError(f"the dataset has no column {name!r} to keep or group by; it has {', '.join(available)}")
            if name in OWN_COLUMNS:
                raise InvalidInputError(
                    f"the dataset's column {name!r} has a name that the store uses itself: rename it, or keep other columns"
                )
        return columns

    def groups(self, column: str) -> Groups:
        """Returns the group of each sample by a kept column, in dataset order.

        Raises:
            InvalidInputError: If the column is not kept, or a sample has no value in it.
        """
        if column not in self.columns:
            raise InvalidInputError(f"cannot group by column {column!r}: it has to be one that is kept ({', '.join(self.columns)})")
        if column not in self._groups:
            values = self.full_dataset.select_columns([column])[self.tokens.sample_index][column]
            self._groups[column] = Groups.of(list(values), self.tokens.sample_index, column)
        return self._groups[column]

    @property
    def samples(self) -> pa.Table:
        """The table of all samples in dataset order, the content of samples.parquet. Made anew each time, as it can be large."""
        return pa.concat_tables(self.sample_blocks())

    def sample_blocks(self) -> Iterator[pa.Table]:
        """Yields `samples` in blocks of SAMPLES_BLOCK rows, so that kept texts need never be in memory together."""
        kept = self.full_dataset.select_columns(self.columns).with_format("arrow")
        for start in range(0, len(self.tokens), SAMPLES_BLOCK):
            block = slice(start, start + SAMPLES_BLOCK)
            index = self.tokens.sample_index[block]
            table = kept[index] if self.columns else pa.table({})
            own = {
                "sample_index": index,
                "n_tokens": self.tokens.n_tokens[block].astype(np.int32),
                "token_hash": self.tokens.token_hash[block],
                "truncated": self.tokens.truncated[block],
                "shard": self.plan.shard_of_sample[block].astype(np.int32),
                "row": self.plan.row_of_sample[block].astype(np.int32),
            }
            yield pa.table({**own, **{name: table.column(name).combine_chunks() for name in self.columns}})

    def encode_alone(self, sample_index: int) -> EncodedSample:
        """Tokenizes one sample anew from its text, without the cache, the plan or any other sample.

        Raises:
            InvalidInputError: If the dataset has no such sample, or it has no tokens that count.
        """
        n = len(self.full_dataset)
        if not 0 <= sample_index < n:
            raise InvalidInputError(f"sample {sample_index}: the dataset has samples 0 to {n - 1}")
        try:
            return encode_alone(self.full_dataset[int(sample_index)][self.text.column], self.tokenizer, self.text)
        except InvalidInputError as error:
            raise InvalidInputError(f"sample {sample_index} {error}") from error

    def batch_of(self, value: Any) -> TokenBatch:
        """Returns one text (or conversation) as a batch of one sample, with the tokens and the mask that it has in this data.

        It needs no `setup`, and the text need not be in the dataset. For many texts make a data module of them with the same
        `text`: its `predict_dataloader`, or `LiveActivations`, puts them into batches.

        Raises:
            InvalidInputError: If it has no tokens that count, or cannot be tokenized.
        """
        try:
            sample = encode_alone(value, self.tokenizer, self.text)
        except InvalidInputError as error:
            raise InvalidInputError(f"the {'conversation' if self.text.messages_column else 'text'} {error}") from error
        return TokenBatch.of(sample.input_ids[None], token_mask=sample.token_mask[None])

    def batch_with(self, sample_index: int) -> TokenBatch:
        """Returns the planned batch that a sample is in."""
        position = int(np.searchsorted(self.tokens.sample_index, sample_index))
        assert self.tokens.sample_index[position] == sample_index, f"sample {sample_index} is not in the plan"
        batch = int(self.plan.batch_of_sample[position])
        return next(token_step(self.tokens, self.plan, range(batch, batch + 1)).batches())

    def identity(self) -> dict[str, Any]:
        """What of the data decides the values of a run, by field name."""
        return {
            "dataset": self.tokens.content_hash,
            "n_samples": len(self.tokens),
            "tokenizer": tokenizer_hash(self.tokenizer),
            **self.text.identity(),
            **asdict(self.plan_options),
        }

    def predict_dataloader(self) -> DataLoader[TokenStep]:
        """Yields this rank's batches, shard by shard, without the shards in `skip_shards`."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return DataLoader(
            self.steps_of(self.shards_of(rank, world_size)),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def shards_of(self, rank: int, world_size: int) -> list[int]:
        """Returns the shards that a rank computes, in the order in which it does."""
        return self.plan.assign(world_size, self.skip_shards)[rank]

    def steps_of(self, shards: list[int]) -> "PlannedSteps":
        """Returns the batches of some shards, in steps."""
        return PlannedSteps(self.tokens, self.plan, self.plan.steps(shards, self.plan_options.token_budget))


class PlannedSteps(Dataset[TokenStep]):
    """Batches of a plan, one `TokenStep` an item; `steps` are the numbers of the batches of each."""

    def __init__(self, tokens: TokenTable, plan: Plan, steps: list[range]) -> None:
        self._tokens, self._plan, self._steps = tokens, plan, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, item: int) -> TokenStep:
        return token_step(self._tokens, self._plan, self._steps[item])


def token_step(tokens: TokenTable, plan: Plan, batches: range) -> TokenStep:
    """Returns consecutive batches of a plan, given by their numbers there."""
    start = plan.batch_start[batches.start : batches.stop + 1]
    positions = plan.order[start[0] : start[-1]]
    input_ids, token_mask = tokens.gather(positions)
    widths = plan.batch_length[batches.start : batches.stop]
    n_tokens = tokens.n_tokens[positions]
    n_real = np.add.reduceat(n_tokens, start[:-1] - start[0])
    return TokenStep(
        sample_index=torch.from_numpy(tokens.sample_index[positions]),
        n_tokens=torch.from_numpy(n_tokens),
        input_ids=input_ids,
        token_mask=token_mask,
        shapes=tuple(zip(np.diff(start).tolist(), widths.tolist(), n_real.tolist(), strict=True)),
        place=Place(*plan.place(batches.start)),
    )
