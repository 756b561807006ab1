"""What something was made of or chosen on, by hashes of tokens and groups: what it says of those samples is no test of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from exactivations.datamodules.examples import ActivationSource, IntArray
from exactivations.datamodules.label_files import column_of, groups_in
from exactivations.store.errors import InvalidInputError
from exactivations.store.means_file import hashes_as_bytes, keys_of

Hashes = npt.NDArray[np.uint8]

SEEN, SEEN_GROUPS = "seen_token_hash", "seen_group_hash"
"""What the tensors are called in a file."""


@dataclass(frozen=True)
class SeenSamples:
    """The samples of train and validation.

    Attributes:
        name: What saw them, for messages.
        tokens: uint8 [n, 16], their token hashes.
        groups: uint8 [m, 16], hashes of their groups; None if it was made without groups.
        group_column: The groups' column, of which no value was in two parts.
    """

    name: str
    tokens: Hashes
    groups: Hashes | None
    group_column: str | None

    def by_tokens(self, source: ActivationSource) -> npt.NDArray[np.bool_]:
        """Returns bool [n], which samples of a source have the tokens of a seen one."""
        return np.isin(keys_of(token_hashes(source, np.arange(len(source)))), keys_of(self.tokens))

    def of_groups(self, groups: Sequence[Any]) -> npt.NDArray[np.bool_]:
        """Returns bool [n], which of these groups, of `group_column`, were seen; none if there are none. 3 and "3" are the same."""
        if self.groups is None:
            return np.zeros(len(groups), dtype=np.bool_)
        seen = set(map(bytes, self.groups))
        return np.array([_group_hash(group) in seen for group in groups], dtype=np.bool_)

    def unseen(self, source: ActivationSource, *, unseen_only: bool) -> IntArray:
        """Returns the places of the samples that it can be tested on, int64 [m], ascending.

        Args:
            source: The samples.
            unseen_only: Leave the others out. They are an error otherwise.

        Raises:
            InvalidInputError: If some were seen, or another of their group was, and they are not to be left out, or all were;
                if a sample has no group.
        """
        by_tokens, by_group = self.by_tokens(source), np.zeros(len(source), dtype=np.bool_)
        if self.group_column is not None and self.group_column in source.samples.column_names:
            by_group = self.of_groups(groups_in(source, self.group_column))
        seen = np.flatnonzero(by_tokens | by_group)
        if len(seen) and not unseen_only:
            raise InvalidInputError(
                f"{self.name} was made of or chosen on sample {source.sample_index[seen[0]]} of {source.title}, or another of its "
                f"group ({by_tokens.sum():,} of {len(source):,} samples are known by token hash, {by_group.sum():,} by "
                f"{self.group_column or 'no'} group): what it says of them is no test. Pass --unseen-only to leave them out"
            )
        if len(seen) == len(source):
            raise InvalidInputError(
                f"{self.name} was made of or chosen on every sample of {source.title}, or others of their groups: nothing is left "
                "to test it on"
            )
        return np.setdiff1d(np.arange(len(source)), seen)

    def warnings(self, source: ActivationSource, what: str) -> list[str]:
        """Returns what of a source cannot be told; `what` is "the moderator", say."""
        if self.group_column is None:
            return [f"{what} was fitted without --group: samples that resemble those of its fit cannot be told"]
        if self.group_column not in source.samples.column_names:
            return [
                f"{source.title} has no column {self.group_column!r}, which no group straddled in the fit: samples of its groups "
                "cannot be told, only those with the same tokens"
            ]
        return []


def token_hashes(source: ActivationSource, places: IntArray) -> Hashes:
    """Returns the token hashes of samples by their place, uint8 [m, 16]."""
    return hashes_as_bytes(column_of(source, "token_hash").take(places).to_pylist())


def group_hashes(groups: Sequence[Any]) -> Hashes:
    """Returns the hashes of different groups, uint8 [m, 16], ascending."""
    return np.frombuffer(b"".join(sorted(set(map(_group_hash, groups)))), dtype=np.uint8).reshape(-1, 16).copy()


def _group_hash(group: Any) -> bytes:
    return xxhash.xxh3_128(str(group).encode()).digest()
