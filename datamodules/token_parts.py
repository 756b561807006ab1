"""Tokens of parts of samples: which labelled ones are in which part, how rare classes come into all, and which are content."""

import numpy as np
import torch
from torch import Tensor

from exactivations.datamodules.examples import ActivationSource, IntArray
from exactivations.datamodules.labels import NOT_LABELLED, TokenLabels
from exactivations.datamodules.splits import PARTS, Split
from exactivations.store.errors import InvalidInputError


def rarest_classes(labels: TokenLabels) -> IntArray:
    """Returns for each sample the rarest class among its tokens, int64 [n], for rare classes to be spread over the parts.

    Samples without a labelled token count as of the commonest class.
    """
    labelled = labels.numbers != NOT_LABELLED
    counts = np.bincount(labels.numbers[labelled], minlength=len(labels.classes))
    by_rarity = np.argsort(counts, kind="stable")
    rank = np.empty(len(counts), dtype=np.int64)
    rank[by_rarity] = np.arange(len(counts))
    lowest = np.full(len(labels.start) - 1, len(counts) - 1)
    np.minimum.at(lowest, _samples(labels)[labelled], rank[labels.numbers[labelled]])
    rarest: IntArray = by_rarity[lowest]
    return rarest


def labelled_tokens(labels: TokenLabels, split: Split) -> dict[str, IntArray]:
    """Returns the numbers of the labelled tokens of each part, int64, ascending.

    Raises:
        InvalidInputError: If a class has no token in a part.
    """
    part_of_sample = np.empty(len(labels.start) - 1, dtype=np.int8)
    for number, part in enumerate(PARTS):
        part_of_sample[getattr(split, part)] = number
    labelled = np.flatnonzero(labels.numbers != NOT_LABELLED)
    part_of_token = part_of_sample[_samples(labels)[labelled]]
    found = {part: labelled[part_of_token == number] for number, part in enumerate(PARTS)}
    for part, numbers in found.items():
        absent = np.flatnonzero(np.bincount(labels.numbers[numbers], minlength=len(labels.classes)) == 0)
        if len(absent):
            raise InvalidInputError(
                f"no token of class {labels.classes[absent[0]]!r} of {labels.name} is in {part}: take another seed or share"
            )
    return found


def content_tokens(source: ActivationSource, places: IntArray) -> tuple[IntArray, Tensor]:
    """Returns the numbers of the content tokens of samples, sample after sample, and how many each has, int64 [n].

    Args:
        source: Whose.
        places: int64 [n], of the samples in `source.sample_index`.
    """
    start = source.token_start
    all_tokens = [np.arange(start[place], start[place + 1]) for place in places]
    tokens = np.concatenate([np.empty(0, dtype=np.int64), *all_tokens])
    content = source.are_content(tokens).numpy()
    owner = np.repeat(np.arange(len(places)), [len(numbers) for numbers in all_tokens])
    return tokens[content], torch.from_numpy(np.bincount(owner[content], minlength=len(places)))


def _samples(labels: TokenLabels) -> IntArray:
    """Returns the place of each token's sample, int64 [T]."""
    return np.repeat(np.arange(len(labels.start) - 1), np.diff(labels.start))
