"""The type that travels from an ActivationDataModule to a probe, and what it is read from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from exactivations.store.errors import InvalidInputError

IntArray = npt.NDArray[np.int64]


class ActivationSource(Protocol):
    """What activations are read from: an `ActivationStore`, or `LiveActivations`, which computes them.

    Attributes: `sample_index` int64 [n], ascending; `samples`, a table with a row for each, which has the columns sample_index,
    n_tokens and token_hash; `token_start` int64 [n+1], how many tokens there are before each; `title`, what messages call it.
    """

    sample_index: IntArray

    @property
    def title(self) -> str: ...  # noqa: D102

    @property
    def samples(self) -> pa.Table: ...  # noqa: D102

    @property
    def token_start(self) -> IntArray: ...  # noqa: D102

    @property
    def per_token(self) -> Mapping[str, bool]:
        """Whether there is a row for each token, and not for each sample, by the name of the activation."""

    def rows(self, name: str, numbers: IntArray) -> Tensor:
        """Returns rows [m, D] by the number of the sample, or of the token (counted through all samples)."""

    def are_content(self, numbers: IntArray) -> Tensor:
        """Returns whether tokens by number are content, and not special, bool [m]."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Examples:
    """Rows with their labels: an example is a sample, or a token that is labelled.

    Attributes:
        rows: By the name of the vector: [n, D] in the dtype they are stored in. With `n_tokens`, [T, D].
        labels: [V, n], the true labels and then shuffled ones; int64 class numbers, or float64 values.
        number: int64 [n], always on the host: whose they are, the place of the sample in `sample_index` or the number of the token.
        n_tokens: int64 [n], rows of each example, one after the other; None if it is one for each.
        n_in_step: Examples of this step on all ranks together.
    """

    rows: dict[str, Tensor]
    labels: Tensor
    number: Tensor
    n_tokens: Tensor | None
    n_in_step: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Examples":
        """Returns the examples with rows, labels and n_tokens on the device; whose they are stays on the host."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        rows = {name: moved(rows) for name, rows in self.rows.items()}
        return replace(self, rows=rows, labels=moved(self.labels), n_tokens=None if self.n_tokens is None else moved(self.n_tokens))


def refuse_other_samples(key: str, other: ActivationSource, source: ActivationSource) -> None:
    """Refuses a source that is not of the very samples of another.

    Raises:
        InvalidInputError: Naming the first sample that is in one only, or has other tokens.
    """
    if not np.array_equal(other.sample_index, source.sample_index):
        differ = np.setxor1d(other.sample_index, source.sample_index)
        raise InvalidInputError(
            f"{other.title} ({key}) and {source.title} differ: sample {differ[0]} is in one only ({len(differ):,} are)"
        )
    hashes = [one.samples.column("token_hash").to_pylist() for one in (other, source)]
    wrong = [at for at, (there, here) in enumerate(zip(*hashes, strict=True)) if there != here]
    if wrong:
        raise InvalidInputError(
            f"{other.title} ({key}): sample {source.sample_index[wrong[0]]} has other tokens than in {source.title} "
            f"({len(wrong):,} of {len(source):,} samples): extract the same texts with the same tokenizer and options"
        )
