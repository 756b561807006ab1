"""Dealing samples, or whole groups of them, to parts of given shares, so that every stratum is spread over all parts."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

MOST_TRIES, GROUPS_OF_TRIES = 5, 20_000  # many groups balance each other at the first try; few do not, but take no time


def deal_samples(strata: IntArray, shares: tuple[float, ...], dice: np.random.Generator) -> IntArray:
    """Returns the part of each sample, int64 [n]: each stratum by its shares, its rounding making up for that of those before.

    Every part gets a sample of each stratum that has as many samples as there are parts.

    Args:
        strata: int64 [n], from 0, none left out.
        shares: Of each part.
        dice: What the choice depends on.
    """
    part = np.empty(len(strata), dtype=np.int64)
    order = dice.permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    owed = np.zeros(len(shares))  # what the strata so far owe to each part
    for members in np.split(order, np.cumsum(np.bincount(strata))[:-1]):
        ideal = np.array(shares) * len(members)
        owed += ideal
        sizes = np.floor(ideal).astype(np.int64)
        if len(members) >= len(shares):
            sizes = np.maximum(sizes, 1)
        while sizes.sum() < len(members):
            sizes[np.argmax(owed - sizes)] += 1
        while sizes.sum() > len(members):
            sizes[np.argmax(sizes)] -= 1
        owed -= sizes
        part[members] = np.repeat(np.arange(len(shares)), sizes)
    return part


def deal_groups(strata: IntArray, groups: IntArray, shares: tuple[float, ...], dice: np.random.Generator) -> IntArray:
    """Returns the part of each sample, int64 [n], groups being in one part only: the best of several deals.

    Groups are dealt one after the other, large ones first and in a random order among those of a similar size, each to the part
    that most lacks its strata (chi-square), and to none that has its share already, unless a stratum would be missing there. So a
    part exceeds its share by less than one group, but for groups that it got for a stratum's sake.

    Args:
        strata: int64 [n], from 0, none left out.
        groups: int64 [n], from 0, none left out; as many as there are parts at least.
        shares: Of each part.
        dice: What the order depends on.
    """
    table = _Table.of(strata, groups, shares)
    tries = max(1, min(MOST_TRIES, GROUPS_OF_TRIES // len(table.size)))
    _, part_of_group = min((table.deal(dice) for _ in range(tries)), key=lambda deal: deal[0])
    return part_of_group[groups]


@dataclass(frozen=True)
class _Table:
    """How many samples of each stratum each group has, of those that it has: one more stratum, the last, holds all samples.

    Attributes:
        start: int64 [G+1]: group g has strata[start[g]:start[g + 1]], counts likewise.
        strata: int64.
        counts: int64.
        size: int64 [G], samples of each group.
        groups_of: int64 [S], in how many groups each stratum is.
        target: float64 [3, S], what each part should get.
    """

    start: IntArray
    strata: IntArray
    counts: IntArray
    size: IntArray
    groups_of: IntArray
    target: FloatArray

    @classmethod
    def of(cls, strata: IntArray, groups: IntArray, shares: tuple[float, ...]) -> "_Table":
        n_strata = int(strata.max()) + 2
        both = np.concatenate([groups * n_strata + strata, groups * n_strata + n_strata - 1])
        pairs, counts = np.unique(both, return_counts=True)
        group, stratum = np.divmod(pairs, n_strata)
        total = np.bincount(stratum, weights=counts, minlength=n_strata)
        return cls(
            start=np.searchsorted(group, np.arange(int(groups.max()) + 2)),
            strata=stratum,
            counts=counts,
            size=np.bincount(groups),
            groups_of=np.bincount(stratum, minlength=n_strata),
            target=np.outer(shares, total),
        )

    def deal(self, dice: np.random.Generator) -> tuple[tuple[int, float], IntArray]:
        """Deals the groups once; returns how bad it is (strata absent from parts, then chi-square) and each group's part [G]."""
        part_of_group = np.empty(len(self.size), dtype=np.int64)
        dealt, left = np.zeros_like(self.target), self.groups_of.copy()
        order = dice.permutation(len(self.size))
        order = order[np.argsort(-np.frexp(self.size[order])[1], kind="stable")]  # of a similar size: the same power of two
        for group in order.tolist():
            mine = slice(self.start[group], self.start[group + 1])
            strata, counts = self.strata[mine], self.counts[mine]
            there, target = dealt[:, strata], self.target[:, strata]
            change = (counts * (2 * (there - target) + counts) / target).sum(axis=1)  # of chi-square
            lacks = there == 0
            needs = (lacks & (left[strata] <= lacks.sum(axis=0))).sum(axis=1)  # the last chance of a stratum that it lacks
            is_open = (there[:, -1] < target[:, -1]) | (needs > 0)
            part = np.lexsort((change, -needs, ~is_open))[0]
            dealt[part, strata] += counts
            left[strata] -= 1
            part_of_group[group] = part
        return (int((dealt == 0).sum()), float(((dealt - self.target) ** 2 / self.target).sum())), part_of_group
