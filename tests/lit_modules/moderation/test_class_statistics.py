"""Statistics taken in any blocks and folded from any parts are numpy's of all rows, also when means are large."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exactivations.lit_modules.moderation.class_statistics import ClassStatistics
from exactivations.store.errors import InvalidInputError

CLOSE = 1e-10


def rows_of(seed, n, width, n_classes, offset=0.0):
    """Correlated rows whose means are `offset` deviations from zero and differ by class; every class has a row."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, n - n_classes)])
    rng.shuffle(labels)
    mixed = rng.standard_t(6, (n, width)) @ rng.normal(size=(width, width)) / np.sqrt(width)
    far = mixed.std(axis=0) * (offset * rng.choice([-1, 1], width) + rng.normal(size=(n_classes, width)))
    return mixed + far[labels], labels


def taken(rows, labels, n_classes, cuts=()):
    """Takes rows in blocks that end at these cuts."""
    statistics = ClassStatistics(n_classes, rows.shape[1])
    for block, numbers in zip(np.split(rows, sorted(cuts)), np.split(labels, sorted(cuts)), strict=True):
        statistics.update(torch.from_numpy(block), torch.from_numpy(numbers))
    return statistics


def whole(rows, labels, n_classes):
    """Means, within-class scatter and sum of fourth powers by definition; what was rounded off large means is taken off, too."""
    means, within, fourth = [], 0.0, 0.0
    for number in range(n_classes):
        mine = rows[labels == number]
        rounded = mine.mean(0)
        rest = (mine - rounded).mean(0)
        y = mine - rounded - rest
        means.append(rounded + rest)
        within, fourth = within + y.T @ y, fourth + (np.square(y).sum(1) ** 2).sum()
    return np.stack(means), within, fourth


def assert_same(found, count, means, within, fourth, scale):
    assert found.count.tolist() == list(count)
    assert np.abs(found.means.numpy() - means).max() <= CLOSE * (np.abs(means).max() + scale)
    assert np.linalg.norm(found.within.numpy() - within) <= CLOSE * np.linalg.norm(within)
    assert torch.equal(found.within, found.within.mT)
    assert found.fourth == pytest.approx(fourth, rel=CLOSE)


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(), seed=st.integers(0, 2**31), n=st.integers(20, 200), width=st.integers(1, 12),
    n_classes=st.sampled_from([2, 5]), offset=st.sampled_from([0.0, 1.0, 1e2, 1e4]),
)  # fmt: skip
def test_any_cuts_order_and_parts_give_the_statistics_of_all_rows(data, seed, n, width, n_classes, offset):
    rows, labels = rows_of(seed, n, width, n_classes, offset)
    order = data.draw(st.sampled_from([np.arange(n), np.random.default_rng(seed).permutation(n), labels.argsort()]))
    cuts = st.lists(st.integers(0, n), max_size=6)
    ends = sorted(data.draw(cuts))
    parts = [
        taken(part, numbers, n_classes, [cut for cut in data.draw(cuts) if cut < len(part)])
        for part, numbers in zip(np.split(rows[order], ends), np.split(labels[order], ends), strict=True)
    ]
    found = ClassStatistics.fold(parts)
    expected = whole(rows, labels, n_classes)
    assert_same(found.result(), np.bincount(labels), *expected, rows.std())
    assert sum(int(part.count.sum()) for part in parts) == n  # folding left the parts as they were
    again = ClassStatistics.from_tensors(found.tensors()).result()
    assert torch.equal(again.within, found.result().within) and torch.equal(again.means, found.result().means)
    assert again.fourth == found.result().fourth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_rows_are_summed_in_float64(dtype):
    rows, labels = rows_of(0, 500, 6, 2, offset=30.0)
    narrow = torch.from_numpy(rows).to(dtype)
    found = ClassStatistics(2, 6).update(narrow, torch.from_numpy(labels)).result()
    assert_same(found, np.bincount(labels), *whole(narrow.double().numpy(), labels, 2), rows.std())
    assert found.means.dtype == found.within.dtype == torch.float64


def test_what_is_merged_or_saved_stays_as_it_is():
    rows, labels = rows_of(1, 60, 4, 3)
    first, second = taken(rows[:30], labels[:30], 3), taken(rows[30:], labels[30:], 3)
    sent, before = first.tensors(), second.tensors()
    ClassStatistics.from_tensors(sent).merge(second)
    assert all(torch.equal(tensor, first.tensors()[name]) for name, tensor in sent.items())
    assert all(torch.equal(tensor, second.tensors()[name]) for name, tensor in before.items())
    folded = ClassStatistics.from_tensors(sent).merge(ClassStatistics.from_tensors(second.tensors()))
    assert torch.equal(folded.result().within, first.merge(second).result().within)


def test_what_is_refused_is_named_and_leaves_no_trace():
    rows, labels = (torch.from_numpy(values) for values in rows_of(2, 20, 3, 2))
    statistics = ClassStatistics(2, 3).update(rows[:10], labels[:10])
    before = statistics.tensors()
    broken = rows.clone()
    broken[7, 2] = torch.nan
    refused = [
        (broken, labels, r"rows\[7, 2\] is nan"),
        (rows, labels + 1, "labels must be from 0 to 1 for 2 classes, found 1 to 2"),
        (rows, labels - 1, "found -1 to 0"),
        (rows, labels[:5], r"labels must be class numbers int64 \[20\]"),
        (rows, labels.int(), "int32"),
        (rows[:, :2], labels, r"rows must be \[n, 3\], got \[20, 2\]"),
    ]
    for values, numbers, message in refused:
        with pytest.raises(InvalidInputError, match=message):
            statistics.update(values, numbers)
    statistics.update(rows[:0], labels[:0])
    assert all(torch.equal(before[name], after) for name, after in statistics.tensors().items())


def test_a_class_without_rows_is_named_and_one_row_is_enough():
    rows = torch.arange(12.0).view(4, 3)
    statistics = ClassStatistics(3, 3).update(rows, torch.tensor([0, 0, 2, 0]))
    with pytest.raises(InvalidInputError, match=r"no row is of class 1 \(of 3 classes, 4 rows\)"):
        statistics.result()
    found = statistics.update(rows[:1], torch.tensor([1])).result()
    assert found.count.tolist() == [3, 1, 1] and found.means[1].tolist() == [0.0, 1.0, 2.0] and found.total == 5


def test_what_does_not_fit_together_is_not_merged_folded_or_read():
    with pytest.raises(InvalidInputError, match="2 classes in 4 dimensions cannot be merged with those of 2 classes in 3"):
        ClassStatistics(2, 3).merge(ClassStatistics(2, 4))
    with pytest.raises(InvalidInputError, match="no statistics to fold"):
        ClassStatistics.fold([])
    with pytest.raises(InvalidInputError, match="at least 2 classes"):
        ClassStatistics(1, 3)
    tensors = ClassStatistics(2, 3).tensors()
    with pytest.raises(InvalidInputError, match="lack third"):
        ClassStatistics.from_tensors({name: tensor for name, tensor in tensors.items() if name != "third"})
    with pytest.raises(InvalidInputError, match=r"second of statistics of 2 classes in 3 dimensions must be torch\.float64"):
        ClassStatistics.from_tensors({**tensors, "second": tensors["second"].float()})
