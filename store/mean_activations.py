"""MeanActivations: mean vectors that were computed by a run, ready to be compared with, subtracted and exported."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError, VerificationError
from exactivations.store.means_file import MeansFile, origin_of, read_means, refuse_another_origin
from exactivations.store.moments import FloatArray, IntArray, Moments
from exactivations.store.position_weights import position_weights
from exactivations.store.shard_sums import GROUPS, POSITIONS
from exactivations.store.vectors import Vector

MIN_COUNT = 10


@dataclass(frozen=True)
class Centred:
    """Rows from which a mean was subtracted, and which one.

    Attributes:
        values: float32 [n, d].
        name: Of the vector, or the place.
        by: What was subtracted: "mean", "mean of group <name>" or "means by position".
        n_samples: Samples in that mean.
    """

    values: Tensor
    name: str
    by: str
    n_samples: int


@dataclass(frozen=True)
class MeanActivations:
    """Means, variances and counts of vectors, in float32, from sums in float64.

    Names are those of `names`: "<hook point>/<pooling>", several layers averaged as in "resid_post.25+26+27/short".
    """

    file: MeansFile

    @classmethod
    def load(cls, result: str | Path, *, allow_unverified: bool = False) -> "MeanActivations":
        """Reads a result, named by its run folder or its file.

        Raises:
            IncompleteStoreError: If the run is not finished.
            VerificationError: If samples of a run in it were not computed again alone, and that was not allowed.
            StoreError: If there is no result, or it is damaged.
        """
        file = read_means(result)
        unverified = [part for part in file.parts if not part.verified]
        if unverified and not allow_unverified:
            remedy = f"Verify the run (exactivations verify {result})" if len(file.parts) == 1 else "Verify that run, join it anew"
            raise VerificationError(
                f"the means in {result} are not verified: of the {unverified[0].n_samples:,} samples of {unverified[0].dataset} "
                f"none was computed again alone and agreed. {remedy}, or allow it (--allow-unverified, "
                "allow_unverified=True)"
            )
        return cls(file)

    def __repr__(self) -> str:
        return f"MeanActivations({self.n_samples:,} samples: {', '.join(self.names)})"

    @property
    def names(self) -> list[str]:
        """The vectors."""
        return [vector.name for vector in self.file.options.vectors]

    @property
    def places(self) -> list[str]:
        """The hook points, or averages of some, that the vectors are taken at."""
        return list(self.file.options.places)

    @property
    def groups(self) -> list[str]:
        """The groups that have means of their own."""
        return self.file.groups

    @property
    def n_samples(self) -> int:
        """Samples in the means."""
        return self.file.n_samples

    def count(self, name: str, group: str | None = None) -> int:
        """Returns how many samples are in a mean."""
        moments, bin_ = self._moments(name, group)
        return int(moments.count[bin_])

    def mean(self, name: str, group: str | None = None) -> Tensor:
        """Returns a mean, float32 [d].

        Raises:
            InvalidInputError: If there is no such vector or group.
        """
        return torch.from_numpy(self._mean64(name, group)).float()

    def normalised(self, name: str, group: str | None = None) -> Tensor:
        """Returns a mean divided by its Euclidean norm, float32 [d]."""
        mean = self._mean64(name, group)
        norm = float(np.linalg.norm(mean))
        if not norm > 0:
            raise InvalidInputError(f"the mean of {name} is zero: it has no direction")
        return torch.from_numpy(mean / norm).float()

    def variance(self, name: str, group: str | None = None) -> Tensor:
        """Returns the variance of each dimension, divided by count - 1, float32 [d]."""
        moments, bin_ = self._moments(name, group)
        if moments.count[bin_] < 2:
            raise InvalidInputError(f"a variance needs two samples, {_of(name, group)} has {int(moments.count[bin_])}")
        return torch.from_numpy(moments.variance[bin_]).float()

    def difference(self, name: str, group: str, other: str) -> Tensor:
        """Returns the mean of a group minus that of another one, float32 [d]: a difference-of-means vector."""
        return torch.from_numpy(self._mean64(name, group) - self._mean64(name, other)).float()

    def by_position(self, place: str) -> tuple[Tensor, Tensor]:
        """Returns the means of states by position from the end, float32 [P, d], and how many tokens are in each, int64 [P].

        A position without tokens has NaN.
        """
        moments = self._positions(place)
        return torch.from_numpy(moments.mean).float(), torch.from_numpy(moments.count)

    def rows_of(self, store: ActivationStore, name: str, places: Tensor | None = None) -> Tensor:
        """Returns a vector of every sample of a store, float64 [n, d], in the order of its `sample_index`.

        Args:
            store: The store.
            name: The vector.
            places: int64 [m], only of the samples at these places in `sample_index`.

        Raises:
            IdentityError: If the store is of another model, tokenizer, dtype or text option.
            InvalidInputError: If it does not hold what the vector is made of.
        """
        vector = self.vector(name)
        points = [point for point in vector.hook_points if point in store.info.present_identity.get("hook_points", [])]
        there = origin_of(store.info.present_identity, points)
        refuse_another_origin(self.file.origin_at(points), there, str(store.folder.path))
        needed = {f"{point}/{pooling}" for point in vector.hook_points for pooling in vector.poolings}
        held = needed & set(store.names)
        if held != needed:
            raise InvalidInputError(
                f"{name} is made of {', '.join(sorted(needed))}; {store.folder.path} holds {', '.join(store.names)}"
            )
        rows = {source: store.pooled(*source.rsplit("/", 1)) for source in sorted(held)}
        if places is not None:
            rows = {source: values[places] for source, values in rows.items()}
        return torch.from_numpy(vector.rows(rows))

    def cosine(self, rows: Tensor, name: str, group: str | None = None) -> Tensor:
        """Returns the cosine of each row [n, d] to a mean, float32 [n].

        Raises:
            InvalidInputError: If the rows have another width, or one of them is zero.
        """
        mean = self._mean64(name, group)
        values = self._checked(rows, name, len(mean))
        norms = np.linalg.norm(values, axis=1) * np.linalg.norm(mean)
        if not (norms > 0).all():
            raise InvalidInputError(f"row {int((~(norms > 0)).argmax())} of {name}, or its mean, is zero: it has no direction")
        return torch.from_numpy(values @ mean / norms).float()

    def centre(self, rows: Tensor, name: str, group: str | None = None) -> Centred:
        """Subtracts a mean from rows [n, d].

        Raises:
            InvalidInputError: If that cannot be done: never are rows given back as they were.
        """
        mean = self._mean64(name, group)
        values = self._checked(rows, name, len(mean)) - mean
        by = "mean" if group is None else f"mean of group {group}"
        return Centred(torch.from_numpy(values).float(), name, by, self.count(name, group))

    def centre_by_position(self, rows: Tensor, name: str, n_counted: Tensor, *, min_count: int = MIN_COUNT) -> Centred:
        """Subtracts from each pooled row [n, d] what its pooling makes of the means by position: pool(x) - pool(mean).

        By linearity this is pool(x - mean), without the states of the tokens. A pooling with a half-life weighs every token, if
        ever so little: a sample longer than the positions that were kept is refused.

        Args:
            rows: Rows of a vector.
            name: The vector. Its poolings must be linear: `max` is not.
            n_counted: int [n], how many tokens of each sample count.
            min_count: A position of fewer tokens than this has no mean to speak of, and is refused.

        Raises:
            InvalidInputError: For a sample that reaches a position without enough tokens; the message names both.
        """
        vector, moments = self.vector(name), self._positions(self.vector(name).place)
        width = moments.total.shape[1]
        values = self._checked(rows, name, width * len(vector.poolings))
        counts = n_counted.numpy()
        if counts.shape != (len(values),) or (len(counts) and counts.min() < 1):
            raise InvalidInputError(
                f"n_counted must be [n] with n = {len(values)} and at least 1 each, got shape {list(counts.shape)}"
            )
        subtracted = np.empty_like(values)
        for n in np.unique(counts).tolist():
            of_length = np.flatnonzero(counts == n)
            weights = [position_weights(pooling, n) for pooling in vector.poolings]
            used = np.any([w > 0 for w in weights], axis=0)
            self._refuse_thin(moments, used, vector.place, min_count, f"row {of_length[0]} ({n} tokens that count)")
            reach = min(n, len(moments.count))  # `used` is False beyond
            means = np.where(used[:reach, None], moments.mean[:reach], 0.0)
            subtracted[of_length] = np.concatenate([w[:reach] @ means for w in weights])
        return Centred(torch.from_numpy(values - subtracted).float(), name, "means by position", self.n_samples)

    def centre_tokens(
        self, values: Tensor, place: str, token_mask: Tensor, n_tokens: Tensor, *, min_count: int = MIN_COUNT
    ) -> Centred:
        """Subtracts from the state of every token that counts the mean at its position from the end.

        Args:
            values: [T, d], the tokens of whole samples, one after the other.
            place: Where they were read.
            token_mask: bool [T]. The states of tokens that do not count stay as they are: they have no mean.
            n_tokens: int [n], tokens of each sample.
            min_count: See `centre_by_position`.
        """
        moments = self._positions(place)
        out = self._checked(values, place, moments.total.shape[1]).copy()
        if token_mask.shape != (len(out),) or int(n_tokens.sum()) != len(out):
            raise InvalidInputError(
                f"token_mask and n_tokens must be of {len(out)} tokens, got {list(token_mask.shape)} and {int(n_tokens.sum())}"
            )
        ends = np.cumsum(n_tokens.numpy())
        for sample, (start, end) in enumerate(zip((ends - n_tokens.numpy()).tolist(), ends.tolist(), strict=True)):
            counted = start + np.flatnonzero(token_mask[start:end].numpy())[::-1]
            used = np.ones(len(counted), dtype=bool)
            self._refuse_thin(moments, used, place, min_count, f"sample {sample} of these ({len(counted)} tokens that count)")
            out[counted] -= moments.mean[: len(counted)]
        return Centred(torch.from_numpy(out).float(), place, "means by position", self.n_samples)

    def vector(self, name: str) -> Vector:
        """Returns what a vector is made of."""
        try:
            return self._vectors[name]
        except KeyError:
            raise InvalidInputError(f"there is no mean of {name}; there are means of {', '.join(self.names)}") from None

    @cached_property
    def _vectors(self) -> Mapping[str, Vector]:
        return {vector.name: vector for vector in self.file.options.vectors}

    def _moments(self, name: str, group: str | None) -> tuple[Moments, int]:
        self.vector(name)
        if group is None:
            return self.file.sums[name], 0
        if group not in self.groups:  # every group that is listed has samples
            raise InvalidInputError(f"there is no group {group!r}; there are {', '.join(map(repr, self.groups)) or 'none'}")
        return self.file.sums[name + GROUPS], self.groups.index(group)

    def _mean64(self, name: str, group: str | None) -> FloatArray:
        moments, bin_ = self._moments(name, group)
        if not moments.count[bin_]:
            raise InvalidInputError(f"{_of(name, group)} has no samples")
        mean: FloatArray = moments.mean[bin_]
        return mean

    def _positions(self, place: str) -> Moments:
        if place not in self.places:
            raise InvalidInputError(f"there is no place {place}; there are {', '.join(self.places)}")
        if not self.file.options.n_positions:
            raise InvalidInputError("no means by position were taken: compute the means with --positions")
        return self.file.sums[place + POSITIONS]

    def _refuse_thin(self, moments: Moments, used: Any, place: str, min_count: int, whose: str) -> None:
        if used[len(moments.count) :].any():
            raise InvalidInputError(
                f"{whose} reaches position {int(np.flatnonzero(used)[-1])} from the end of {place}, means are kept of "
                f"{len(moments.count)} positions (0 to {len(moments.count) - 1}): take more --positions, or cut the sample"
            )
        reach = min(len(used), len(moments.count))
        thin: IntArray = np.flatnonzero(used[:reach] & (moments.count[:reach] < max(min_count, 1)))
        if len(thin):
            raise InvalidInputError(
                f"position {int(thin[0])} from the end of {place} has a mean of {int(moments.count[thin[0]])} tokens, at least "
                f"{max(min_count, 1)} are wanted, and {whose} reaches it: take the means of more samples, cut this one, or lower "
                "that (--min-count, min_count)"
            )

    @staticmethod
    def _checked(rows: Tensor, name: str, width: int) -> FloatArray:
        if rows.ndim != 2 or rows.shape[1] != width:
            raise InvalidInputError(f"{name} is {width} wide, got rows of shape {list(rows.shape)}: another model's or pooling's")
        values: FloatArray = rows.detach().to(torch.float64).cpu().numpy()
        if not np.isfinite(values).all():
            raise InvalidInputError(f"row {int((~np.isfinite(values)).any(axis=1).argmax())} of {name} is not finite")
        return values


def _of(name: str, group: str | None) -> str:
    return name if group is None else f"group {group} of {name}"
