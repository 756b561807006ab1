"""ActivationDataModule: rows and labels of the same samples, in parts that no group straddles."""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from exactivations.datamodules.example_order import ExamplesInOrder, ShuffledExamples
from exactivations.datamodules.example_reading import Steps, WholeVectors, refuse_not_finite_rows
from exactivations.datamodules.examples import ActivationSource, Examples, IntArray, refuse_other_samples
from exactivations.datamodules.label_files import column_of, groups_in
from exactivations.datamodules.labels import Kind, Labels, TokenLabels, labels_of, token_labels_of
from exactivations.datamodules.official_splits import official_split, parts_of, read_split
from exactivations.datamodules.splits import PARTS, Split, split
from exactivations.datamodules.token_parts import content_tokens, labelled_tokens, rarest_classes
from exactivations.store.errors import InvalidInputError

TRUE_LABELS = "labels"


class ActivationDataModule(pl.LightningDataModule):
    """Joins activations with labels by identity, splits them by group, and yields `Examples`.

    Without `batch_size` an item is one whole vector: all rows of the part, which exact optimisation needs. Vectors are dealt to
    the ranks, and only one is in memory at a time. With `batch_size` an item is a step: so many examples of all vectors, the same
    steps on any number of ranks, each of which reads only its share of them from the memory map.

    Use `Trainer(use_distributed_sampler=False, num_sanity_val_steps=0)`.

    Args:
        source: A store, or `LiveActivations`.
        label: The column of labels; see `labels_of`.
        label_file: The file it is in, if it was not kept in the store.
        label_kind: "classes", "values" or "auto".
        unit: What has a label: each "sample", or each "token" (the column then holds a list a sample; see `token_labels_of`).
        over_tokens: Give each sample's label with the rows of its content tokens, for an attention probe; needs `batch_size`.
        names: Which activations; None takes all that fit the unit.
        group: The column of which no value is to be in two parts; None lets every sample go alone.
        split_column: The column that says which part a sample is in, see `official_split`; None draws the parts.
        split_file: The split.json of an earlier run over the same samples, instead; see `Split.from_json`.
        shares: Of train, validation and test.
        seed: Of the split, of shuffled labels, and of the order in training.
        n_shuffles: How many variants there are, beside the true labels, in which they are shuffled within each part.
        others: Further sources of the same samples, such as an untrained model's; their vectors are called "<key>: <name>".
        batch_size: Examples of a step, on all ranks together.

    Raises:
        InvalidInputError: In `setup`, for labels, groups or sources that do not belong to the same samples, a class that is absent
            from a part, or activations of another unit; later, for a row that is not finite, naming its sample, for whole
            vectors that are larger than the memory, and for a trainer that would read otherwise than it is dealt.
    """

    def __init__(
        self,
        source: ActivationSource,
        label: str,
        *,
        label_file: str | Path | None = None,
        label_kind: Kind = "auto",
        unit: Literal["sample", "token"] = "sample",
        over_tokens: bool = False,
        names: Sequence[str] | None = None,
        group: str | None = None,
        split_column: str | None = None,
        split_file: str | Path | None = None,
        shares: Sequence[float] = (0.6, 0.2, 0.2),
        seed: int = 0,
        n_shuffles: int = 0,
        others: Mapping[str, ActivationSource] | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # there may be more ranks than vectors
        if unit == "token" and (over_tokens or label_kind == "values"):
            raise InvalidInputError("labels of tokens are classes, and each goes with its own token's row")
        if over_tokens and batch_size is None:
            raise InvalidInputError("samples with the rows of all their tokens come in steps: give a batch_size")
        if batch_size is not None and batch_size < 1:
            raise InvalidInputError(f"batch_size must be at least 1, got {batch_size}")
        if split_column is not None and split_file is not None:
            raise InvalidInputError("the parts are those of a column or of a file: name split_column or split_file, not both")
        self.split_column, self.split_file = split_column, split_file
        self.source, self.others = source, dict(others or {})
        self.label, self.label_file, self.label_kind = label, label_file, label_kind
        self.unit, self.over_tokens = unit, over_tokens
        self.group, self.shares, self.seed, self.batch_size = group, tuple(shares), seed, batch_size
        self.variants = [TRUE_LABELS, *(f"shuffled {number}" for number in range(n_shuffles))]
        self._wanted = None if names is None else list(names)
        self._added: dict[str, Tensor] = {}
        self._added_labels: list[IntArray] = []

    def setup(self, stage: str = "fit") -> None:
        """Joins and splits. Doing it twice costs nothing."""
        _ = self.names, self._targets

    def add(self, name: str, rows: Tensor) -> None:
        """Adds a vector that no source has, such as a baseline of the texts.

        Args:
            name: What it is called.
            rows: [n, D], of all samples in the order of `source.sample_index`.

        Raises:
            InvalidInputError: If the unit is not samples, the name is taken, or there is another number of rows.
        """
        if self.unit == "token" or self.over_tokens:
            raise InvalidInputError(f"{name} cannot be added: it has a row for each sample, not for each token")
        if name in self.names or rows.ndim != 2 or len(rows) != len(self.source):
            raise InvalidInputError(
                f"{name} must have a name of its own and a row for each sample, [{len(self.source)}, D]; it is {list(rows.shape)}"
            )
        self._added[name] = rows

    def add_control(self, variant: str, numbers: IntArray) -> None:
        """Adds a variant of the labels, such as a control task.

        Args:
            variant: What it is called.
            numbers: int64, a class for every sample of the source, or for every token of it.

        Raises:
            InvalidInputError: If the labels are real values, the name is taken, or there are another number or other classes.
        """
        n = len(self.source) if self.unit == "sample" else int(self.source.token_start[-1])
        if not self.classes or variant in self.variants or variant.startswith("shuffled "):
            raise InvalidInputError(f"{variant} must be of classes, and have a name of its own")
        if numbers.shape != (n,) or numbers.min() < 0 or numbers.max() >= len(self.classes):
            raise InvalidInputError(f"{variant} must be {n:,} class numbers from 0 to {len(self.classes) - 1}")
        self.variants.append(variant)
        self._added_labels.append(numbers)

    @cached_property
    def labels(self) -> Labels | TokenLabels:
        """The labels of all samples or tokens."""
        if self.unit == "token":
            return token_labels_of(self.source, self.label, self.label_file)
        return labels_of(self.source, self.label, self.label_file, kind=self.label_kind)

    @property
    def classes(self) -> list[str]:
        """The names of the classes [K]; empty for real values."""
        return self.labels.classes

    @cached_property
    def groups(self) -> list[Any]:
        """The group of each sample, by its place in `source.sample_index`; without a column each is its own."""
        return groups_in(self.source, self.group)

    @cached_property
    def split(self) -> Split:
        """The parts, as places in `source.sample_index`."""
        return self._split_and_how[0]

    @property
    def how_split(self) -> str:
        """Where the parts are from, in words; also whether validation was drawn from an official train part."""
        return self._split_and_how[1]

    @cached_property
    def _split_and_how(self) -> tuple[Split, str]:
        labels = self.labels
        if isinstance(labels, TokenLabels):
            strata: Any = rarest_classes(labels)
        else:
            strata = labels.values if labels.numbers is None else labels.numbers
        groups, classes = None if self.group is None else self.groups, labels.classes or None
        if self.split_column is not None or self.split_file is not None:
            if self.split_column is not None:
                values, where, how = column_of(self.source, self.split_column).to_pylist(), self.split_column, "column"
            else:
                assert self.split_file is not None
                recorded = read_split(self.split_file, self.source.sample_index)
                values, where, how = parts_of(recorded), str(self.split_file), "file"
            found, is_drawn = official_split(
                values, strata, groups, column=where, sample_index=self.source.sample_index, shares=self.shares, seed=self.seed,
                group_column=self.group, classes=classes, every_class=self.unit == "sample",  # of tokens see `labelled_tokens`
            )  # fmt: skip
            drawn = f"; validation, of which it has none, was drawn from its train part (seed {self.seed})" if is_drawn else ""
            return found, f"those of {how} {where!r}{drawn}"
        drawn_split = split(strata, groups, shares=self.shares, seed=self.seed, group_column=self.group, classes=classes)
        return drawn_split, f"shares {', '.join(f'{share:g}' for share in self.shares)}, seed {self.seed}"

    @property
    def names(self) -> list[str]:
        """The vectors of all sources, and what was added."""
        return [*self._places, *self._added]

    @cached_property
    def _places(self) -> dict[str, tuple[ActivationSource, str]]:
        """Where each vector is."""
        per_token = self.unit == "token" or self.over_tokens
        what = f"a row for each {'token' if per_token else 'sample'}"
        fitting = [name for name, of_tokens in self.source.per_token.items() if of_tokens == per_token]
        names = fitting if self._wanted is None else self._wanted
        for name in names or [""]:
            if name not in fitting:
                raise InvalidInputError(
                    f"{self.source.title} has no activation {name or 'at all'} with {what}; of such it has: "
                    f"{', '.join(fitting) or 'none. Extract with another --pooling'}"
                )
        places = {name: (self.source, name) for name in names}
        for key, other in self.others.items():
            refuse_other_samples(key, other, self.source)
            absent = [name for name in names if other.per_token.get(name) != per_token]
            if absent:
                raise InvalidInputError(
                    f"{other.title} ({key}) has no {absent[0]} ({len(absent)} of {len(names)} vectors): extract the same of it, or "
                    "name those that both have"
                )
            places |= {f"{key}: {name}": (other, name) for name in names}
        return places

    def numbers(self, part: str) -> IntArray:
        """Returns the examples of a part, int64 [n], ascending: places of samples, or numbers of labelled tokens."""
        return self._numbers[part]

    @cached_property
    def _numbers(self) -> dict[str, IntArray]:
        if isinstance(self.labels, TokenLabels):
            return labelled_tokens(self.labels, self.split)
        return {part: getattr(self.split, part) for part in PARTS}

    def sample_of(self, numbers: IntArray) -> IntArray:
        """Returns the place of each example's sample, int64 [n]."""
        if self.unit == "sample":
            return numbers
        places: IntArray = np.searchsorted(self.source.token_start, numbers, side="right") - 1
        return places

    def groups_of(self, part: str) -> list[Any]:
        """Returns the group of each example of a part."""
        return [self.groups[place] for place in self.sample_of(self.numbers(part)).tolist()]

    def targets(self, part: str) -> Tensor:
        """Returns the labels of a part, [V, n]: the true ones first, then the other variants."""
        return self._of_variants(part, slice(None))

    def counts(self) -> dict[str, dict[str, Any]]:
        """Returns of each part how many examples, samples and groups it has, and how many examples of each class."""
        found = {}
        for part in PARTS:
            numbers, labels = self.numbers(part), self.targets(part)[0]
            counts = torch.bincount(labels, minlength=len(self.classes)).tolist() if self.classes else []
            found[part] = {
                "examples": len(numbers),
                "samples": len(set(self.sample_of(numbers).tolist())),
                "groups": len(set(self.groups_of(part))),
                "classes": dict(zip(self.classes, counts, strict=True)),
            }
        return found

    @cached_property
    def _targets(self) -> dict[str, list[Any]]:
        """The labels of each part, by variant."""
        labels, found = self.labels, {}
        values = labels.numbers if labels.numbers is not None else labels.values
        assert values is not None
        for at, part in enumerate(PARTS):
            true = values[self.numbers(part)]
            n_shuffles = sum(variant.startswith("shuffled ") for variant in self.variants)
            shuffles = [np.random.default_rng([self.seed, at, i]).permutation(true) for i in range(n_shuffles)]
            found[part] = [true, *shuffles]
        return found

    def _of_variants(self, part: str, chosen: Any) -> Tensor:
        rows = [variant[chosen] for variant in self._targets[part]]
        rows += [control[self.numbers(part)[chosen]] for control in self._added_labels]
        return torch.from_numpy(np.stack(rows))

    def train_dataloader(self) -> DataLoader[Examples]:
        """Whole vectors, or shuffled steps."""
        return self._loader("train", shuffled=True)

    def val_dataloader(self) -> DataLoader[Examples]:
        """The validation part."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Examples]:
        """The test part."""
        return self._loader("test")

    def _loader(self, part: str, *, shuffled: bool = False) -> DataLoader[Examples]:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.trainer and (self.trainer.sanity_checking or _deals_again(self.trainer)):
            raise InvalidInputError(
                "each rank reads what it is dealt, and nothing is validated before it was trained: make the trainer with "
                "use_distributed_sampler=False and num_sanity_val_steps=0"
            )
        numbers = self.numbers(part)
        if self.batch_size is None:
            return DataLoader(
                WholeVectors(partial(self.examples, part), numbers, self.names, part, rank, world_size), batch_size=None
            )
        order: Sampler[Any] = (
            ShuffledExamples(numbers, self.sample_of(numbers), self.batch_size, self.seed, rank, world_size)
            if shuffled
            else ExamplesInOrder(numbers, self.batch_size, rank, world_size)
        )
        return DataLoader(Steps(partial(self.examples, part, self.names)), batch_size=None, sampler=order)

    def examples(self, part: str, names: Sequence[str], numbers: IntArray, n_in_step: int | None = None) -> Examples:
        """Returns chosen examples of a part.

        Args:
            part: "train", "validation" or "test".
            names: Which vectors.
            numbers: int64 [n], of this part.
            n_in_step: Examples of the step on all ranks; None if these are all.

        Raises:
            InvalidInputError: If a row is not finite, naming its sample.
        """
        n_tokens, of_rows = None, numbers
        if self.over_tokens:
            of_rows, n_tokens = content_tokens(self.source, numbers)
        rows = {name: self._rows(name, of_rows) for name in names}
        at = np.searchsorted(self.numbers(part), numbers)
        assert np.array_equal(self.numbers(part).take(at, mode="clip"), numbers), f"examples that are not all of {part}"
        return Examples(rows, self._of_variants(part, at), torch.from_numpy(numbers), n_tokens, n_in_step or len(numbers))

    def _rows(self, name: str, numbers: IntArray) -> Tensor:
        if name in self._added:
            rows = self._added[name][torch.from_numpy(numbers)]
        else:
            source, inner = self._places[name]
            rows = source.rows(inner, numbers)
        per_token = self.unit == "token" or self.over_tokens
        places = np.searchsorted(self.source.token_start, numbers, side="right") - 1 if per_token else numbers
        refuse_not_finite_rows(name, rows, self.source.sample_index[places])
        return rows


def _deals_again(trainer: pl.Trainer) -> bool:
    """Returns whether the trainer would deal to the ranks what was dealt to them already; Lightning has no public word for it."""
    return trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler
