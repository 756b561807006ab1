"""Every sample is in one part, groups never straddle, every class is everywhere, and shares are near what was asked."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split
from sklearn.utils.class_weight import compute_class_weight

from exactivations.datamodules.splits import PARTS, Split, class_weights, split
from exactivations.store.errors import InvalidInputError

SHARES = (0.7, 0.15, 0.15)


def refused(call, *parts):
    with pytest.raises(InvalidInputError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def positions(parts):
    return [getattr(parts, name).tolist() for name in PARTS]


def part_of(parts, n):
    """The part of each sample, by hand; fails where a sample is in none or in two."""
    found = {}
    for number, indices in enumerate(positions(parts)):
        assert indices == sorted(indices)
        for index in indices:
            assert index not in found
            found[index] = number
    assert sorted(found) == list(range(n))
    return np.array([found[index] for index in range(n)])


@st.composite
def grouped(draw):
    """Labels and groups of random sizes and of random purity."""
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    n_groups, n_classes = draw(st.integers(3, 40)), draw(st.integers(1, 4))
    sizes = dice.integers(1, draw(st.sampled_from([2, 5, 30])), n_groups)
    groups = np.repeat(dice.permutation(n_groups) * 3, sizes)
    purity = draw(st.sampled_from([0, 0.5, 1]))
    own = dice.integers(n_classes, size=n_groups * 3)
    labels = np.where(dice.random(len(groups)) < purity, own[groups], dice.integers(n_classes, size=len(groups)))
    order = dice.permutation(len(groups))
    return np.unique(labels[order], return_inverse=True)[1], groups[order]


shares_asked = st.sampled_from([SHARES, (0.5, 0.25, 0.25), (0.8, 0.1, 0.1), (1 / 3, 1 / 3, 1 / 3), (0.1, 0.3, 0.6)])


@settings(max_examples=150, deadline=None)
@given(case=grouped(), shares=shares_asked, seed=st.integers(0, 1000))
def test_groups_never_straddle_and_every_sample_is_in_one_part(case, shares, seed):
    labels, groups = case
    try:
        parts = split(labels, groups, shares=shares, seed=seed, group_column="file")
    except InvalidInputError as error:
        assert "is absent from" in str(error)
        assume(False)
    part = part_of(parts, len(labels))
    assert (parts.seed, parts.shares, parts.group_column) == (seed, shares, "file")
    for group in np.unique(groups):
        assert len(set(part[groups == group])) == 1
    for number in np.unique(labels):
        assert set(part[labels == number]) == {0, 1, 2}
    assert positions(split(labels, groups.tolist(), shares=shares, seed=seed)) == positions(parts)


@settings(max_examples=60, deadline=None)
@given(case=grouped(), shares=shares_asked, seed=st.integers(0, 1000), real=st.booleans())
def test_no_part_exceeds_its_share_by_a_group_and_the_order_of_samples_does_not_matter(case, shares, seed, real):
    labels, groups = case
    labels = labels / 7 if real else np.zeros_like(labels)  # no class for whose sake a part could get more
    parts = split(labels, groups, shares=shares, seed=seed)
    largest = np.bincount(groups).max()
    sizes = np.bincount(part_of(parts, len(groups)), minlength=3)
    excess = sizes - np.array(shares) * len(groups)
    most = largest * (2 if real else 1)  # the last group of a bin goes where the bin would be missing
    assert (excess < most).all() and (excess > -2 * most).all()  # what one part lacks, the two others have
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = split(labels[order], groups[order], shares=shares, seed=seed)
    np.testing.assert_array_equal(part_of(shuffled, len(labels)), part_of(parts, len(labels))[order])


def test_many_small_groups_give_the_shares_of_all_and_of_every_class():
    dice = np.random.default_rng(0)
    groups = dice.integers(300, size=3000)
    labels = (dice.random(3000) < dice.random(300)[groups]).astype(np.int64) * 2 + (groups % 10 == 0)
    for seed in range(3):
        part = part_of(split(labels, groups, seed=seed), 3000)
        for mine in (labels >= 0, *(labels == number for number in range(4))):
            assert np.abs(np.bincount(part[mine]) / mine.sum() - SHARES).max() < 0.02


def test_groups_of_very_different_sizes_are_shared_well_too():
    dice = np.random.default_rng(0)
    groups = np.repeat(np.arange(50), (5 + 400 / (1 + np.arange(50))).astype(int))
    labels = dice.integers(3, size=len(groups))
    for seed in range(5):
        assert np.abs(np.bincount(part_of(split(labels, groups, seed=seed), len(groups))) / len(groups) - SHARES).max() < 0.02


def test_a_class_of_three_groups_is_in_every_part():
    groups = np.repeat(np.arange(60), 4)
    labels = np.where(np.isin(groups, [5, 17, 40]), 1, 0)
    for seed in range(20):
        part = part_of(split(labels, groups, seed=seed), len(labels))
        assert sorted(part[labels == 1][::4]) == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(3, 60), min_size=1, max_size=12), shares=shares_asked, seed=st.integers(0, 1000), dice=st.randoms()
)
def test_without_groups_each_class_has_its_shares_to_a_sample_or_one_in_each_part(counts, shares, seed, dice):
    labels = [number for number, count in enumerate(counts) for _ in range(count)]
    dice.shuffle(labels)
    labels = np.array(labels)
    parts = split(labels, shares=shares, seed=seed)
    part = part_of(parts, len(labels))
    for number, count in enumerate(counts):
        ideal = np.array(shares) * count
        sizes = np.bincount(part[labels == number], minlength=3)
        assert (sizes >= 1).all()
        forced = np.maximum(1 - ideal, 0).sum()  # what parts get beyond their share, so that they have one at all
        assert np.abs(sizes - ideal).max() <= 2 + forced
    assert parts.group_column is None
    assert positions(split(labels, shares=shares, seed=seed)) == positions(parts)


def test_without_groups_a_split_is_as_even_as_that_of_scikit_learn():
    labels = np.random.default_rng(0).choice(5, 2000, p=[0.5, 0.3, 0.1, 0.07, 0.03])
    parts = split(labels)
    train, rest = train_test_split(np.arange(2000), test_size=0.3, stratify=labels, random_state=0)
    validation, test = train_test_split(rest, test_size=0.5, stratify=labels[rest], random_state=0)
    for ours, theirs in ((parts.train, train), (parts.validation, validation), (parts.test, test)):
        assert abs(len(ours) - len(theirs)) <= 1
        assert np.abs(np.bincount(labels[ours]) - np.bincount(labels[theirs])).max() <= 1


def test_rounding_of_many_small_classes_does_not_add_up():
    part = part_of(split(np.repeat(np.arange(200), 10)), 2000)
    assert np.abs(np.bincount(part) - [1400, 300, 300]).max() <= 1


@pytest.mark.parametrize("with_groups", [False, True])
def test_real_values_are_spread_by_quantiles(with_groups):
    dice = np.random.default_rng(1)
    values = dice.exponential(size=1500)
    groups = np.arange(1500) // 3 if with_groups else None
    part = part_of(split(values, groups), 1500)
    rank = values.argsort().argsort() * 10 // 1500
    for decile in range(10):
        assert np.abs(np.bincount(part[rank == decile]) / 150 - SHARES).max() < 0.03
    assert positions(split(values.astype(np.float32), groups))  # the other dtype of values
    assert len(split(np.zeros(100)).train) == 70  # all in one bin
    assert np.abs(np.bincount(part_of(split(np.repeat([0.0, 1.0, 2.0], 100)), 300)) - [210, 45, 45]).max() <= 1


@pytest.mark.parametrize("groups", [None, np.arange(300) // 5])
def test_another_seed_gives_another_split(groups):
    labels = np.arange(300) % 3
    assert len({str(positions(split(labels, groups, seed=seed))) for seed in range(5)}) == 5


def test_three_groups_are_one_for_each_part():
    for seed in range(5):
        parts = split(np.array([0, 1] * 6), ["a", "b", "b", "a", "c", "c"] * 2, seed=seed)
        assert all(len(part) == 4 for part in (parts.train, parts.validation, parts.test))


def test_a_split_comes_back_by_sample_index_in_any_order():
    index = np.array([3, 8, 9, 20, 21, 22, 40, 41, 50, 60])
    parts = split(np.arange(10) % 2, np.arange(10), shares=(0.4, 0.3, 0.3), seed=4, group_column="file")
    content = json.loads(json.dumps(parts.to_json(index)))
    assert content["train"] == index[parts.train].tolist()
    again = Split.from_json(content, index)
    assert positions(again) == positions(parts)
    assert (again.seed, again.shares, again.group_column) == (4, (0.4, 0.3, 0.3), "file")
    assert again.to_json(index) == content
    order = np.random.default_rng(0).permutation(10)
    np.testing.assert_array_equal(part_of(Split.from_json(content, index[order]), 10), part_of(parts, 10)[order])


def test_a_recorded_split_of_other_samples_is_refused():
    index = np.arange(10)
    parts = split(np.zeros(10, dtype=np.int64))
    content = parts.to_json(index)
    first = content["train"][0]
    refused(lambda: parts.to_json(index[1:]), "10 samples", "has 9")
    refused(
        lambda: Split.from_json(content, index[index != first]), f"sample {first} of the recorded split is not there (1 of its 10"
    )
    refused(lambda: Split.from_json(content, np.arange(12)), "sample 10 is in no part", "2 of 12")
    refused(lambda: Split.from_json(content | {"test": [*content["test"], first]}, index), f"sample {first} in train and in test")
    refused(lambda: Split.from_json(content | {"shares": [1, 2, 3]}, index), "sum to 1")
    refused(lambda: Split.from_json({"train": []}, index), "lacks validation, test, seed, shares, group_column")
    for name, wrong in (("test", ["4"]), ("test", 4), ("test", [True, 4]), ("seed", 1.5), ("group_column", 3)):
        refused(
            lambda name=name, wrong=wrong: Split.from_json(content | {name: wrong}, index), name.split("_")[-1], "something else"
        )
    for wrong in (None, [1, "x", 2], 1):
        refused(lambda wrong=wrong: Split.from_json(content | {"shares": wrong}, index), "three positive numbers")


def test_what_cannot_be_split_is_refused():
    labels, groups = np.arange(30) % 2, np.arange(30) // 3
    for shares in ((0.7, 0.15, 0.1), (0.8, 0.2, 0), (1.2, -0.1, -0.1), (0.5, 0.5), (float("nan"), 0.5, 0.5)):
        refused(lambda shares=shares: split(labels, shares=shares), "shares", "sum to 1", str(shares))
    for seed in (-1, 0.5, True):
        refused(lambda seed=seed: split(labels, seed=seed), "seed", repr(seed))
    refused(lambda: split(labels, groups % 2, group_column="file"), "2 groups of column 'file'", "another group column")
    refused(lambda: split(labels[:2]), "2 samples", "at least three")
    refused(lambda: split(labels[:0], groups[:0]), "0 groups")
    refused(lambda: split(labels, groups[:-1], group_column="file"), "29 groups of column 'file' for 30 labels")
    refused(
        lambda: split(labels, ["a", None, *["b"] * 27, None], group_column="file"),
        "position 1 has no group of column 'file' (2 of 30",
    )
    refused(lambda: split(labels, ["a", 1, *["b"] * 28]), "int, str", "make them text")
    refused(lambda: split(labels, groups / 2), "float", "make them text")
    refused(lambda: split(labels - 1), "position 0 has -1", "15 of 30")
    refused(lambda: split(np.where(labels == 1, np.inf, 0.0)), "position 1 has inf", "15 of 30")
    refused(lambda: split(labels.reshape(15, 2)), "shape [15, 2]")
    refused(lambda: split(labels.astype(str)), "whole numbers or floats")


def test_a_class_that_cannot_be_everywhere_is_named():
    groups = np.arange(40) // 2
    rare = np.where(groups < 2, 1, 0)
    refused(
        lambda: split(rare, groups, group_column="file", classes=["no", "yes"]),
        "class 'yes' is absent from", "it is in 2 groups of column 'file' (1 of 2 classes", "leave the class out",
    )  # fmt: skip
    refused(lambda: split(np.where(groups < 1, 1, 0)), "class 1 is absent from", "in 2 samples", "leave the class out")
    refused(
        lambda: split(np.where(groups < 1, 5, np.arange(40) == 39), groups), "class 1 is absent", "in 1 group ", "2 of 3 classes"
    )
    # Each class is in three of four groups, but two parts get one group alone.
    labels, groups = np.array([0, 1, 2, 0, 1, 3, 0, 2, 3, 1, 2, 3]), np.repeat(np.arange(4), 3)
    refused(lambda: split(labels, groups), "it is in 3 groups (", "try another seed, larger shares or another group column")


@given(st.lists(st.integers(0, 4), min_size=1, max_size=50))
def test_class_weights_are_those_of_scikit_learn(numbers):
    numbers = np.unique(numbers, return_inverse=True)[1]
    n_classes = int(numbers.max()) + 1
    oracle = compute_class_weight("balanced", classes=np.arange(n_classes), y=numbers)
    weights = class_weights(numbers, n_classes)
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights, oracle, rtol=1e-15)  # one division, in another order


def test_class_weights_of_absent_or_unknown_classes_are_refused():
    refused(lambda: class_weights(np.array([0, 2]), 3), "class 1 has no sample", "1 of 3")
    refused(lambda: class_weights(np.array([0, -1, 1]), 2), "0 to 1, found -1 (1 of 3", "leave those out")
    refused(lambda: class_weights(np.array([0, 1, 2]), 2), "found 2")
