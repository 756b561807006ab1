"""Intervals hold the truth about as often as they say where samples of a group resemble each other, and depend on nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from exactivations.lit_modules.probes import probe_metrics as pm
from exactivations.lit_modules.probes.group_bootstrap import Interval, auroc_intervals, interval_of_difference, intervals
from exactivations.lit_modules.probes.probe_inputs import UndefinedMetricError
from exactivations.store.errors import InvalidInputError

SEPARATION = 1.0


def grouped(seed, n_probes=1, n_groups=40, size=8, alike=0.5):
    """Scores [P, n] of which a share `alike` of the variance is the group's own, labels that are half and half in each group.

    Positives score SEPARATION standard deviations higher, and pairs are almost all of two groups, so that the true AUROC is
    Phi(SEPARATION / sqrt(2)); a group's part is one for its positives and another for its negatives, which else would cancel.
    """
    rng = np.random.default_rng(seed)
    labels, groups = np.tile([0, 1], n_groups * size // 2), np.repeat(np.arange(n_groups), size)
    parts = rng.normal(size=(n_probes, n_groups, 2))[:, groups, labels]
    scores = SEPARATION * labels + np.sqrt(alike) * parts + np.sqrt(1 - alike) * rng.normal(size=parts.shape)
    return torch.from_numpy(scores), torch.from_numpy(labels), torch.from_numpy(groups)


def widths(found):
    return np.array([interval.high - interval.low for interval in found])


def refuses(message, error=InvalidInputError):
    return pytest.raises(error, match=message)


def test_intervals_hold_the_truth_about_as_often_as_they_say_and_those_over_samples_do_not():
    scores, labels, groups = grouped(0, n_probes=400)
    truth = norm.cdf(SEPARATION / np.sqrt(2))
    by_group = auroc_intervals(scores, labels, groups, n_resamples=400, level=0.9)
    by_sample = auroc_intervals(scores, labels, torch.arange(len(labels)), n_resamples=400, level=0.9)
    held = np.mean([interval.low <= truth <= interval.high for interval in by_group])
    held_by_sample = np.mean([interval.low <= truth <= interval.high for interval in by_sample])
    # Of 400 at 90 %, the standard error is 1.5 %; 40 groups leave percentile intervals some percent short.
    assert 0.84 <= held <= 0.95
    assert held_by_sample < 0.75
    assert widths(by_group).mean() > 1.3 * widths(by_sample).mean()
    # The spread of the estimates over all these draws is what an interval of 90 % should span: 2 * 1.645 of it.
    assert widths(by_group).mean() == pytest.approx(3.29 * np.std([interval.estimate for interval in by_group]), rel=0.15)


def test_where_samples_of_a_group_have_nothing_in_common_groups_make_no_difference():
    scores, labels, groups = grouped(1, n_probes=50, alike=0.0)
    by_group = widths(auroc_intervals(scores, labels, groups))
    by_sample = widths(auroc_intervals(scores, labels, torch.arange(len(labels))))
    assert by_group.mean() == pytest.approx(by_sample.mean(), rel=0.1)


def test_the_fast_path_gives_to_the_bit_what_each_resample_taken_by_itself_gives():
    scores, labels, groups = grouped(2, n_probes=3, n_groups=7, size=6)
    labels[groups < 5] = 0  # so that some resamples have no positives
    scores = scores.round(decimals=1)
    fast = auroc_intervals(scores, labels, groups, n_resamples=200, seed=5)
    assert fast == [intervals(pm.auroc, row, labels, groups, n_resamples=200, seed=5) for row in scores]
    assert 0 < fast[0].n_undefined < 100
    over = auroc_intervals(scores[:2], labels, groups, baseline=scores[2], n_resamples=200, seed=5)
    assert over == [interval_of_difference(pm.auroc, row, scores[2], labels, groups, n_resamples=200, seed=5) for row in scores[:2]]


def test_weights_that_are_too_many_for_one_block_give_the_same(monkeypatch):
    scores, labels, groups = grouped(2, n_probes=3)
    expected = auroc_intervals(scores, labels, groups, n_resamples=100)
    for block in (1, 7 * len(labels)):
        monkeypatch.setattr("exactivations.lit_modules.probes.group_bootstrap._BLOCK", block)
        assert auroc_intervals(scores, labels, groups, n_resamples=100) == expected


@pytest.mark.parametrize("name", pm.CLASSIFICATION)
def test_a_resample_holds_whole_groups_as_often_as_they_were_drawn(name):
    scores, labels, groups = grouped(3, n_groups=6)
    probabilities, seen = scores[0].sigmoid(), []

    def spy(picked, picked_labels):
        seen.append(picked.sort().values)
        return pm.CLASSIFICATION[name](picked, picked_labels)

    found = intervals(spy, probabilities, labels, groups, n_resamples=50, level=0.9)
    assert found.estimate == pytest.approx(pm.CLASSIFICATION[name](probabilities, labels), abs=1e-6)
    assert len(seen) == 51 and found.low <= found.estimate <= found.high
    assert torch.equal(seen[0], probabilities.sort().values)
    for resample in seen[1:]:
        times = torch.stack([(resample[:, None] == probabilities[groups == group]).sum(0) for group in range(6)])
        assert (times == times[:, :1]).all() and times[:, 0].sum() == 6


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), name=st.sampled_from([*pm.CLASSIFICATION, *pm.REGRESSION]))
def test_the_order_of_samples_changes_no_bit(seed, name):
    scores, labels, groups = grouped(seed, n_groups=6, size=4)
    values, labels = (scores[0].sigmoid(), labels) if name in pm.CLASSIFICATION else (scores[0], labels + scores[0].sin())
    metric = (pm.CLASSIFICATION | pm.REGRESSION)[name]
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    options = {"n_resamples": 40, "seed": seed}
    found = intervals(metric, values, labels, groups, **options)
    assert intervals(metric, values[order], labels[order], groups[order], **options) == found
    names = [f"module {group}" for group in groups[order].tolist()]
    assert intervals(metric, values[order], labels[order], names, **options) == found
    if name == "auroc":
        assert auroc_intervals(values[order][None], labels[order], groups[order], **options) == [found]


def test_the_seed_decides():
    scores, labels, groups = grouped(4)
    assert auroc_intervals(scores, labels, groups, seed=1) == auroc_intervals(scores, labels, groups, seed=1)
    assert auroc_intervals(scores, labels, groups, seed=1) != auroc_intervals(scores, labels, groups, seed=2)


def test_a_difference_is_paired():
    scores, labels, groups = grouped(5, n_groups=60)
    ours = scores[0]
    baseline = ours + 0.3 * torch.randn(len(ours), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = interval_of_difference(pm.auroc, ours, ours, labels, groups, n_resamples=100)
    assert same == Interval(0.0, 0.0, 0.0, 60, 100, 0)
    found = interval_of_difference(pm.auroc, ours, baseline, labels, groups)
    assert found.estimate == pm.auroc(ours, labels) - pm.auroc(baseline, labels)
    (alone,) = auroc_intervals(ours[None], labels, groups)
    assert found.high - found.low < 0.5 * (alone.high - alone.low)
    turned = interval_of_difference(pm.auroc, baseline, ours, labels, groups)
    assert (turned.estimate, turned.low, turned.high) == pytest.approx((-found.estimate, -found.high, -found.low), abs=1e-12)


def test_a_higher_level_is_a_wider_interval_around_the_same_estimate():
    scores, labels, groups = grouped(6)
    narrow, wide = (auroc_intervals(scores, labels, groups, level=level)[0] for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high and wide.estimate == narrow.estimate


def test_probabilities_of_many_classes_are_resampled_too():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 3, 120))
    probabilities = torch.from_numpy(rng.normal(size=(120, 3)) + np.eye(3)[labels]).softmax(1)
    found = intervals(pm.auroc, probabilities, labels, torch.arange(120) // 6, n_resamples=100)
    assert found.low < found.estimate < found.high and found.n_groups == 20


def test_resamples_without_a_class_are_counted_and_drawn_again():
    scores, labels, groups = grouped(7, n_groups=10)
    labels[groups > 1] = 0
    found = intervals(pm.auroc, scores[0], labels, groups, n_resamples=500)
    without = 0.8**10  # all ten draws are of the eight groups without positives
    assert found.n_resamples == 500
    assert found.n_undefined / (500 + found.n_undefined) == pytest.approx(without, abs=0.05)
    assert intervals(pm.accuracy, scores[0].sigmoid(), labels, groups, n_resamples=100).n_undefined == 0  # which is defined


def test_a_metric_that_is_mostly_undefined_has_no_interval():
    scores, labels, groups = grouped(8, n_groups=10)

    def rarely(picked, picked_labels):
        if len(picked.unique()) < len(scores[0]):
            raise UndefinedMetricError("class 3 is missing")
        return 0.0

    with refuses(r"undefined in 101 of 101 resamples of 10 groups.*class 3 is missing.*more groups"):
        intervals(rarely, scores[0], labels, groups, n_resamples=100)
    with refuses("is of class 1", UndefinedMetricError):
        intervals(pm.auroc, scores[0], 0 * labels, groups)
    with refuses("is of class 1", UndefinedMetricError):
        auroc_intervals(scores, 0 * labels, groups)


def test_other_errors_of_a_metric_are_no_undefined_resamples():
    scores, labels, groups = grouped(9)
    with refuses("take the sigmoid"):
        intervals(pm.brier, scores[0], labels, groups)
    with refuses(r"came out as \[nan\]"):
        intervals(lambda picked, _: float("nan"), scores[0], labels, groups)


def test_too_few_groups_and_what_does_not_fit_are_refused():
    scores, labels, groups = grouped(10)
    few = groups % 4
    for call in (
        lambda: intervals(pm.auroc, scores[0], labels, few),
        lambda: auroc_intervals(scores, labels, few),
        lambda: interval_of_difference(pm.auroc, scores[0], scores[0], labels, few),
    ):
        with refuses("at least 5 groups, found 4: evaluate on samples of more groups"):
            call()
    with refuses("one for each of 320 samples, got 319"):
        intervals(pm.auroc, scores[0], labels, groups[:-1])
    with refuses("same samples, they are 320 and 319 and 320"):
        interval_of_difference(pm.auroc, scores[0], scores[0, :-1], labels, groups)
    with refuses(r"baseline \[n\], got \[1, 320\] and \[319\]"):
        auroc_intervals(scores, labels, groups, baseline=scores[0, :-1])
    with refuses("found .'NoneType', 'str'."):
        intervals(pm.auroc, scores[0], labels, [None, *map(str, groups.tolist()[1:])])
    with refuses("between 0 and 1, got 95"):
        intervals(pm.auroc, scores[0], labels, groups, level=95)
    with refuses("10 resamples leave none beyond either bound at a level of 0.95: take n_resamples of at least 4"):
        intervals(pm.auroc, scores[0], labels, groups, n_resamples=10)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), n_classes=st.integers(3, 20), decimals=st.integers(1, 12))
def test_of_many_classes_too_the_fast_path_gives_the_same_bits(seed, n_classes, decimals):
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, 100)]))
    groups = torch.from_numpy(rng.integers(0, 12, len(labels)))
    scores = torch.from_numpy(rng.normal(size=(2, len(labels), n_classes)).round(decimals)) + 2 * torch.eye(n_classes)[labels]
    scores = scores.softmax(dim=2)
    options = {"n_resamples": 40, "seed": seed}
    try:
        expected = [intervals(pm.auroc, of_probe, labels, groups, **options) for of_probe in scores]
    except InvalidInputError as error:  # too many resamples lack a class
        with refuses(r"undefined in 41 of \d+ resamples"):
            auroc_intervals(scores, labels, groups, **options)
        assert "undefined in 41" in str(error)
        return
    assert auroc_intervals(scores, labels, groups, **options) == expected
    (over,) = auroc_intervals(scores[:1], labels, groups, baseline=scores[1], **options)
    assert over == interval_of_difference(pm.auroc, *scores, labels, groups, **options)


def test_of_many_classes_a_missing_or_a_foreign_one_is_named():
    labels = torch.arange(120) % 2
    scores = torch.rand(1, 120, 3, generator=torch.Generator().manual_seed(0)).softmax(dim=2)
    with refuses("none of 120 samples is of class 2 .of 3 classes", UndefinedMetricError):
        auroc_intervals(scores, labels, torch.arange(120) // 6)
    with refuses("labels must be from 0 to 2 for 3 classes, found 0 to 3"):
        auroc_intervals(scores, torch.arange(120) % 4, torch.arange(120) // 6)
