"""What a report says of masks that were moved, cut, swapped or taken from elsewhere, and what old rules would have picked."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exactivations.store.alignment import compare
from exactivations.store.alignment_text import WIDTH, render
from exactivations.store.batch_rules import NO_BATCH, NO_ROW, pick_by_division
from exactivations.store.errors import InvalidInputError, StoreError
from tests.store.mask_folders import POOLED, foreign, hash_by_hand, save_flat, store_of
from tests.store.stores import WIDTHS, ids_of, make_store, mask_of

N = 207  # of shared/seeds/lpm-index-error.md
LENGTHS = [3 + (7 * i) % 11 for i in range(N)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("runs") / "store", LENGTHS)


def report_of(store, folder, **options):
    report = compare(store, folder, **options)
    text = render(report)
    assert all(len(line) <= WIDTH for line in text.splitlines()[2:]), text  # two lines begin with paths
    return report, text


def by_hand(saved, read, divisor):
    """The old code, one sample at a time over dicts: (the batch it computes, the sample whose mask it takes or why none)."""
    owner, count = {}, 0
    for batch, size in enumerate(saved):
        for row in range(size):
            owner[batch, row] = count
            count += 1
    out, seen = [], 0
    for size in read:
        batch = seen // (size if divisor is None else divisor)
        for row in range(size):
            none = NO_ROW if (batch, 0) in owner else NO_BATCH
            out.append((batch, owner.get((batch, row), none)))
        seen += size
    return out


@given(data=st.data(), saved=st.lists(st.integers(1, 9), min_size=1, max_size=8), divisor=st.none() | st.integers(1, 9))
def test_picks_are_those_of_the_old_code_for_any_batch_sizes(data, saved, divisor):
    n = sum(saved)
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=6))) if n > 1 else []
    read = data.draw(st.sampled_from([saved, [b - a for a, b in itertools.pairwise([0, *cuts, n])]]))
    picks = pick_by_division("rule", saved, read, divisor)
    assert list(zip(picks.batch.tolist(), picks.sample.tolist(), strict=True)) == by_hand(saved, read, divisor)


def test_the_first_example_is_right_under_the_hard_coded_64_and_all_ones_under_the_rule_that_was_in_the_code(store, tmp_path):
    report, text = report_of(store, foreign(tmp_path / "masks", LENGTHS, [64, 64, 64, 15]))
    assert not report.faults
    by_64, by_current = report.rules
    assert not len(by_64.picks.mismatched)
    assert by_64.picks.batch.tolist() == [0] * 64 + [1] * 64 + [2] * 64 + [3] * 15
    assert by_current.picks.mismatched.tolist() == list(range(192, 207))
    assert by_current.picks.batch[192:].tolist() == [192 // 15] * 15 == [12] * 15
    assert by_current.samples("ones") == list(range(192, 207))
    assert "207 masks in 4 batches of 3 x 64, 15" in text
    assert "samples 192 to 206: batch 12, which is not there" in text
    assert "Found by sample index, every mask is its sample's own" in text


def test_the_second_example_takes_each_batchs_masks_from_the_batch_before(store, tmp_path):
    report, text = report_of(store, foreign(tmp_path / "masks", LENGTHS, [50, 50, 50, 50, 7]))
    assert not report.faults, "counted by sample, nothing is wrong with them"
    by_64, by_first, by_current = report.rules
    assert by_64.picks.batch.tolist() == [0] * 50 + [0] * 50 + [1] * 50 + [2] * 50 + [3] * 7
    assert by_64.picks.sample.tolist() == [*range(50), *range(50), *range(50, 100), *range(100, 150), *range(150, 157)]
    assert len(by_64.picks.mismatched) == 157 and by_64.samples("own") == list(range(50))
    assert not len(by_first.picks.mismatched)
    assert by_current.picks.batch[200:].tolist() == [200 // 7] * 7 and by_current.samples("ones") == list(range(200, 207))
    for line in (
        "WRONG   divided by 64: 157 of 207 samples do not get their own mask",
        "samples 50 to 99: batch 0, with the masks of samples 0 to 49",
        "samples 100 to 149: batch 1, with the masks of samples 50 to 99",
        "samples 150 to 199: batch 2, with the masks of samples 100 to 149",
        "samples 200 to 206: batch 3, with the masks of samples 150 to 156",
    ):
        assert line in text


def test_activations_read_in_other_batches_than_the_masks_were_saved_in_run_out_of_rows(store, tmp_path):
    report, text = report_of(store, foreign(tmp_path / "masks", LENGTHS, [50, 50, 50, 50, 7]), batch_size=64)
    by_current = report.rules[2]
    assert by_current.samples("row") == [*range(50, 64), *range(114, 128), *range(178, 192)]
    assert by_current.samples("ones") == list(range(192, 207))
    assert by_current.samples("own") == list(range(50))
    assert "samples 50 to 63: batch 0, which has no such rows" in text


def test_a_long_mask_on_short_activations_is_the_index_error_of_the_seed(tmp_path):
    lengths = [498] * 50 + [181] * 50
    store = store_of(tmp_path / "store", lengths, names=POOLED)
    masks = [[True] * n for n in lengths]
    report, text = report_of(store, foreign(tmp_path / "masks", lengths, [50, 50], masks=masks))
    assert not report.faults
    assert report.rules[0].samples("length") == list(range(50, 100))
    assert report.rules[0].first_error == (50, 497, 181)
    assert "sample 50: index 497 is out of bounds for activations of 181 positions" in text
    assert "IndexError: the mask marks a position that the activations do not have" in " ".join(text.split())
    for n, outcome in ((182, "length"), (181, "other")):  # one position too many is enough
        store = store_of(tmp_path / f"store{n}", [n] * 50 + [181] * 50, names=POOLED)
        masks = [[True] * n] * 50 + [[True] * 181] * 50
        report, _ = report_of(store, foreign(tmp_path / f"masks{n}", [n] * 50 + [181] * 50, [50, 50], masks=masks))
        assert report.rules[0].samples(outcome) == list(range(50, 100))
    lengths.reverse()  # and the other way round nothing is raised
    masks = [[True] * n for n in lengths]
    store = store_of(tmp_path / "other", lengths, names=POOLED)
    report, _ = report_of(store, foreign(tmp_path / "others", lengths, [50, 50], masks=masks))
    assert report.rules[0].samples("other") == list(range(50, 100))


def test_no_index_error_is_claimed_for_masks_that_are_padded_on_the_left(tmp_path):
    lengths = [9, 8, 3, 2]
    store = store_of(tmp_path / "store", lengths, n_shards=1, names=POOLED)
    for side, outcome in (("right", "length"), ("left", "other")):
        report, _ = report_of(store, foreign(tmp_path / side, lengths, [2, 2], masks=[[True] * n for n in lengths], side=side))
        assert report.side == side and report.rules[0].outcome == ["own", "own", outcome, outcome]


def test_another_runs_masks_in_the_right_batches_are_the_index_error_that_was_seen(tmp_path):
    lengths = [181] * 15
    store = store_of(tmp_path / "store", lengths, names=POOLED)
    other = [498, *[100] * 14]
    folder = foreign(tmp_path / "masks", other, [15], samples=range(300, 315), masks=[[True] * n for n in other], with_ids=False)
    report, text = report_of(store, folder)
    assert report.problems[0] == "token_mask has 498 positions and marks some from 0 to 497, activations have 181"
    assert not len(report.rules[0].picks.mismatched) and report.rules[0].first_error == (0, 497, 181)
    assert "sample 0: index 497 is out of bounds for activations of 181 positions" in text
    assert sorted(report.problems) == [0], "the others are shorter: without ids their masks look right"


def test_no_index_error_is_claimed_where_a_length_in_the_batch_is_not_known(tmp_path):
    store = store_of(tmp_path / "store", [9, 9, 2], [0, 1, 2], n_shards=1, names=POOLED, skipped=[3])
    folder = foreign(tmp_path / "masks", [9, 9, 2, 20], [2, 2], masks=[[True] * n for n in (9, 9, 2, 20)])
    report, _ = report_of(store, folder)
    assert report.rules[0].outcome == ["own", "own", "other", "other"] and not report.faults


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("by", [1, 5, -1, -30])
def test_a_shifted_order_is_told_with_its_size_and_where_it_begins(store, tmp_path, by, side):
    order = [i for i in range(N) if not (by < 0 and 40 <= i < 40 - by)]
    order = order[:40] + list(range(1000, 1000 + max(by, 0))) + order[40:]
    order = (order + list(range(2000, 2040)))[:N]
    folder = foreign(tmp_path / "m", [LENGTHS[i] if i < N else 4 for i in order], [64, 64, 64, 15], samples=order, side=side)
    report, text = report_of(store, folder)
    first, word = (40, "later") if by > 0 else (40 - by, "earlier")
    away = f"{abs(by)} place{'s' if abs(by) > 1 else ''} {word}"
    assert f"shifted order: from sample {first} on, masks are {away}; {abs(by)} of 207 samples have no" in report.identity.verdict
    assert report.identity.offset[first : N - max(by, 0)].tolist() == [by] * (N - max(by, 0) - first)
    assert "samples 0 to 39: in place" in text and report.faults


def test_another_order_is_told_from_a_shift(store, tmp_path):
    order = np.random.default_rng(0).permutation(N).tolist()
    report, text = report_of(store, foreign(tmp_path / "m", [LENGTHS[i] for i in order], [100, 107], samples=order))
    moved = sum(i != k for k, i in enumerate(order))
    assert report.identity.verdict == f"the same samples in another order: {moved} of 207 are not in their place"
    assert report.identity.offset.tolist() == [order.index(i) - i for i in range(N)]
    assert "... and" in text and len(text.splitlines()) < 60


def test_a_foreign_dataset_of_the_same_shapes_is_told_by_its_ids_and_only_by_them(store, tmp_path):
    others = list(range(1000, 1000 + N))
    report, _ = report_of(store, foreign(tmp_path / "with", LENGTHS, [64, 64, 64, 15], samples=others))
    assert report.identity.verdict.startswith("a foreign dataset; 207 of 207 samples have no mask; 207 masks are of tokens")
    assert report.faults
    report, text = report_of(store, foreign(tmp_path / "without", LENGTHS, [64, 64, 64, 15], samples=others, with_ids=False))
    assert report.identity is None and "UNKNOWN whose masks these are: no input_ids are kept beside them" in text
    assert report.same_marks == (0, N) and report.faults == [report.marks_fault]
    assert "no mask marks the tokens that the store's own token_mask does (0 of 207)" in text
    pooled = store_of(tmp_path / "pooled", LENGTHS, names=POOLED)
    report, text = report_of(pooled, tmp_path / "without")
    assert not report.faults and "that they are this dataset's is not known" in text


def test_a_part_of_the_samples_and_a_few_foreign_ones_are_told(store, tmp_path):
    report, _ = report_of(store, foreign(tmp_path / "part", LENGTHS[:100], [50, 50]))
    assert report.identity.verdict == "some of the samples, each in its place; 107 of 207 samples have no mask"
    assert "there are 100 masks, expected 207" in report.faults[0]
    few = [i + 1000 if i in (3, 77) else i for i in range(N)]
    report, _ = report_of(store, foreign(tmp_path / "few", LENGTHS, [N], samples=few))
    assert "2 of 207 samples have no mask; 2 masks are of tokens not in the store" in report.identity.verdict
    assert sorted(report.problems) == [3, 77]


def test_equal_texts_are_no_shift(tmp_path):
    ids = [[5, 6, 7]] * 4 + [[8, 9]] + [[5, 6, 7]] * 3
    make_store(tmp_path / "s", list(range(8)), [len(i) for i in ids], names=POOLED, token_hash=[hash_by_hand(i) for i in ids])
    rows = torch.tensor([i + [0] * (3 - len(i)) for i in ids])
    report, _ = report_of(tmp_path / "s", save_flat(tmp_path / "m", [{"attention_mask": rows != 0, "input_ids": rows}]))
    assert report.identity.is_same and not report.faults
    moved = torch.roll(rows, 1, 0)
    report, _ = report_of(tmp_path / "s", save_flat(tmp_path / "m", [{"attention_mask": moved != 0, "input_ids": moved}]))
    assert report.identity.offset[4] == 1 and report.identity.offset[:4].tolist() == [0] * 4
    assert not report.identity.is_same


def test_a_text_that_is_in_its_place_again_after_a_shift_is_found_there(tmp_path):
    a, x = [5, 6, 7], [8, 9, 10]
    ids = [a, x, a, a, a]
    make_store(tmp_path / "s", list(range(5)), [3] * 5, names=POOLED, token_hash=[hash_by_hand(i) for i in ids])
    rows = torch.tensor([a, a, x, a, a])
    report, text = report_of(tmp_path / "s", save_flat(tmp_path / "m", [{"attention_mask": rows != 0, "input_ids": rows}]))
    assert report.identity.offset.tolist() == [0, 1, 1, 0, 0]
    assert "2 samples from 1 to 2, masks are 1 place later" in text


@settings(max_examples=40, deadline=None)
@given(data=st.data(), side=st.sampled_from(["right", "left"]))
def test_every_sample_is_found_where_a_permutation_put_it(tmp_path_factory, data, side):
    tmp_path = tmp_path_factory.mktemp("run")
    n = data.draw(st.integers(2, 12))
    lengths = data.draw(st.lists(st.integers(2, 6), min_size=n, max_size=n))
    order = data.draw(st.permutations(range(n)))
    cut = data.draw(st.integers(1, n - 1))
    index = [i + 1 for i in range(n)]  # sample 0 would have the padding's id
    store = store_of(tmp_path / "s", lengths, index, n_shards=1, names=POOLED, skipped=[0])
    folder = foreign(tmp_path / "m", [2, *(lengths[i] for i in order)], [1 + cut, n - cut], [0, *(i + 1 for i in order)], side=side)
    report, _ = report_of(store, folder)
    assert report.identity.offset.tolist() == [order.index(i) - i for i in range(n)]
    assert bool(report.faults) == (order != list(range(n)))


def test_marks_are_compared_with_the_stores_own_where_it_holds_token_rows(store, tmp_path):
    masks = [mask_of(i, n) for i, n in enumerate(LENGTHS)]
    masks[5] = [not mark for mark in masks[5]]
    report, text = report_of(store, foreign(tmp_path / "m", LENGTHS, [N], masks=masks))
    assert report.same_marks == (206, 207) and not report.faults
    assert "206 of 207 masks mark the same tokens as the store's own token_mask" in text


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    side=st.sampled_from(["right", "left"]),
    lengths=st.lists(st.integers(8, 30), min_size=2, max_size=12),
    front=st.integers(0, 3),
    names=st.sampled_from([WIDTHS, POOLED]),
)
def test_padding_masks_of_shorter_samples_are_refused_with_both_numbers(tmp_path_factory, data, side, lengths, front, names):
    tmp_path = tmp_path_factory.mktemp("run")
    shorter = [data.draw(st.integers(front + 1, n)) for n in lengths]
    shorter[:2] = front + 1, lengths[1]  # at least one that is much too short, and one that is not
    lengths[0] = max(lengths[0], front + 6)
    masks = [[False] * front + [True] * (m - front) + [False] * (n - m) for n, m in zip(lengths, shorter, strict=True)]
    masks = masks if side == "right" else [mask[::-1] for mask in masks]
    store = store_of(tmp_path / "s", lengths, n_shards=1, names=names)
    report, text = report_of(store, foreign(tmp_path / "m", lengths, [1, len(lengths) - 1], masks=masks, with_ids=False, side=side))
    if report.side_problem:  # all rows of one length, cut alike on both sides
        return
    wrong = {i: (m, n) for i, (m, n) in enumerate(zip(shorter, lengths, strict=True)) if m < n}
    assert sorted(report.problems) == sorted(wrong)
    for i, (m, n) in wrong.items():
        assert f"is a padding mask of {m} tokens, activations have {n};" in report.problems[i]
        assert "count real tokens as padding, silently" in report.problems[i]
        assert report.rules[0].outcome[i] != "own"
    assert "taken for padding masks, by their name attention_mask" in text


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    side=st.sampled_from(["right", "left"]),
    lengths=st.lists(st.integers(9, 30), min_size=1, max_size=12),
    ends=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    inside=st.booleans(),
    holds=st.sampled_from(["pooled", "content", "all", "unknown"]),
    with_ids=st.booleans(),
)
def test_content_masks_that_leave_out_special_tokens_are_no_false_alarm(
    tmp_path_factory, data, side, lengths, ends, inside, holds, with_ids
):
    """Some were cut, and have lost the special tokens of one end; chats have special tokens in the middle too."""
    tmp_path = tmp_path_factory.mktemp("run")
    cut = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))

    def content(i, n):
        first, last = ends[0], 0 if cut[i] else ends[1]
        return [first <= k < n - last and not (inside and k == first + 2) for k in range(n)]

    own = (lambda i, n: [True] * n) if holds == "all" else content
    names, kind = POOLED if holds == "pooled" else WIDTHS, None if holds in ("pooled", "unknown") else holds
    store = store_of(tmp_path / "s", lengths, n_shards=1, names=names, kind=kind, own=own)
    masks = [content(i, n) for i, n in enumerate(lengths)]
    folder = foreign(tmp_path / "m", lengths, [len(lengths)], masks=masks, with_ids=with_ids, side=side)
    report, text = report_of(store, folder, padding_side=side)
    assert not report.faults, text
    if holds in ("content", "unknown"):
        assert not report.warnings and report.same_marks == (len(lengths), len(lengths))
    elif report.warnings:
        assert "WARNING" in text and "not counted as a fault" in report.warnings[0]


def test_what_cannot_be_told_apart_is_a_warning_with_the_reason(tmp_path):
    store = store_of(tmp_path / "s", [9, 12, 10, 14], n_shards=1, names=POOLED)

    def warned(name, lengths, **how):
        masks = [[True] * n + [False] * (14 - n) for n in lengths]
        folder = save_flat(tmp_path / name, [{how.get("named", "attention_mask"): torch.tensor(masks)}])
        report, _ = report_of(store, folder, padding_side="right")
        assert not report.problems and not report.faults
        return " ".join(report.warnings)

    assert warned("own", [9, 12, 10, 14]) == ""
    assert "4 of 4 masks leave out tokens at the end where padding is: all leave out 1. Sample 0 has 9 tok" in warned(
        "eos", [8, 11, 9, 13]
    )
    assert "all leave out 6" in warned("same", [3, 6, 4, 8]), "as many of each"
    assert "1 of 4 masks leave out tokens" in warned("one", [9, 12, 10, 11])
    assert "its name says nothing" in warned("unnamed", [2, 12, 3, 11], named="token_mask")
    masks = [[True] * 3] + [[True] * n for n in (12, 10, 14)]
    masks[0] += [False] * 6
    report, _ = report_of(store, foreign(tmp_path / "ids", [9, 12, 10, 14], [4], masks=masks))
    assert report.identity.is_same and not report.faults and "the input_ids say whose they are" in report.warnings[0]


def test_a_few_tokens_too_short_is_told_if_it_is_scattered_or_if_the_stores_content_masks_count_them(tmp_path):
    lengths, shorter = [9, 12, 10, 14], [9, 11, 8, 11]
    masks = [[True] * m + [False] * (n - m) for m, n in zip(shorter, lengths, strict=True)]
    folder = foreign(tmp_path / "m", lengths, [4], masks=masks, with_ids=False)
    report, _ = report_of(store_of(tmp_path / "s", lengths, n_shards=1, names=POOLED), folder)
    assert sorted(report.problems) == [1, 2, 3]
    masks = [[True] * (n - 6) + [False] * 6 for n in lengths]  # as many of each: by itself it could be anything
    folder = foreign(tmp_path / "six", lengths, [4], masks=masks, with_ids=False)
    for last, n_wrong in ((1, 4), (6, 0)):
        content = store_of(
            tmp_path / f"s{last}", lengths, n_shards=1, kind="content", own=lambda i, n, k=last: [True] * (n - k) + [False] * k
        )
        report, _ = report_of(content, folder)
        assert len(report.problems) == n_wrong and bool(report.marks_fault) == bool(n_wrong)


SHAPES = {  # rows of 9, 12 and 10 tokens, as "1" and "0", and which are padding masks of fewer tokens
    "at most four, as many special tokens can be": (["111110000", "111111111111", "1111111111"], []),
    "five": (["111100000", "111111111111", "1111111111"], [0]),
    "five, first four left out": (["000010000", "000011100000", "0000111111"], [0, 1]),
    "five, first five left out": (["000001111", "000001100000", "0000011111"], []),
    "begun anywhere": (["000111111", "111111000000", "1111111111"], []),
    "with a gap": (["101111111", "101111000000", "1011111111"], []),
    "only the ends of texts": (["000000111", "000000001111", "0011111111"], []),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_shapes_that_are_taken_for_padding_masks(tmp_path, shape, side):
    rows, wrong = SHAPES[shape]
    masks = [[mark == "1" for mark in (row if side == "right" else row[::-1])] for row in rows]
    lengths = [len(row) for row in rows]
    folder = foreign(tmp_path / "m", lengths, [3], masks=masks, with_ids=False, side=side)
    report, _ = report_of(store_of(tmp_path / "s", lengths, n_shards=1, names=POOLED), folder, padding_side=side)
    assert sorted(report.problems) == wrong and bool(report.faults) == bool(wrong)


@pytest.mark.parametrize("reverse", [1, -1])
def test_masks_without_any_padding_can_be_of_shorter_samples_on_either_side(tmp_path, reverse):
    masks = [[mark == "1" for mark in row[::reverse]] for row in ("111100000", "111111111", "111111000")]
    folder = foreign(tmp_path / "m", [9] * 3, [3], masks=masks, with_ids=False)
    report, _ = report_of(store_of(tmp_path / "s", [9] * 3, n_shards=1, names=POOLED), folder)
    assert sorted(report.problems) == [0, 2]


@pytest.mark.parametrize(("mask", "wrong"), [("011111100000", []), ("011111000000", [1])])
def test_tokens_that_the_stores_content_masks_leave_out_too_are_not_missed(tmp_path, mask, wrong):
    lengths = [9, 12]
    store = store_of(tmp_path / "s", lengths, n_shards=1, kind="content", own=lambda i, n: [0 < k < n - 1 for k in range(n)])
    masks = [[mark == "1" for mark in row] for row in ("011111110", mask)]
    report, _ = report_of(store, foreign(tmp_path / "m", lengths, [2], masks=masks, with_ids=False))
    assert sorted(report.problems) == wrong and report.same_marks == (1, 2)


def test_an_old_rule_that_finds_a_mask_without_marks_counts_no_token(tmp_path):
    masks = [[True] * 3, [False] * 4]
    report, text = report_of(store_of(tmp_path / "s", [3, 4], n_shards=1), foreign(tmp_path / "m", [3, 4], [2], masks=masks))
    assert report.rules[0].outcome == ["own", "nothing"] and "sample 1: a mask that marks nothing: no token counts" in text


def test_marks_that_are_never_the_stores_are_a_fault_unless_ids_or_the_kinds_of_masks_explain_it(tmp_path):
    lengths = [9, 12, 10]

    def without_ends(i, n):
        return [0 < k < n - 1 for k in range(n)]

    def every(i, n):
        return [True] * n

    def shifted(i, n):
        return [k != 3 + i for k in range(n)]

    def report_for(number, own, mask, kind, **how):
        store = store_of(tmp_path / f"s{number}", lengths, n_shards=1, kind=kind, own=own)
        masks = [mask(i, n) for i, n in enumerate(lengths)]
        return report_of(store, foreign(tmp_path / f"m{number}", lengths, [3], masks=masks, **{"with_ids": False, **how}))

    report, text = report_for(0, without_ends, shifted, "content")
    assert report.faults == [report.marks_fault] and "WRONG   no mask marks the tokens" in text and "(0 of 3)" in report.marks_fault
    assert "cannot be laid over" in text
    report, _ = report_for(1, without_ends, shifted, "content", with_ids=True)
    assert not report.faults and report.same_marks == (0, 3)
    report, _ = report_for(2, without_ends, every, "content")
    assert not report.faults and "another kind of mask" in report.warnings[0], "it counts special tokens too"
    for number, kind in ((3, "all"), (4, None)):
        report, _ = report_for(number, every, without_ends, kind)
        assert not report.faults and report.same_marks == (0, 3)
    assert report_for(5, every, shifted, "content")[0].marks_fault, "a text without special tokens"
    report, _ = report_for(6, without_ends, lambda i, n: (shifted if i else without_ends)(i, n), "content")
    assert not report.faults and report.same_marks == (1, 3)


def test_two_stores_are_compared_by_sample_index_hash_and_length(store, tmp_path):
    same = store_of(tmp_path / "same", LENGTHS, seed=3, n_shards=5)
    report, text = report_of(store, same)
    assert not report.faults and report.same_marks == (N, N) and not report.rules
    assert "proven by token hash" in text
    hashes = [hash_by_hand(ids_of(i + (i >= 100), LENGTHS[i])) for i in range(N)]
    make_store(tmp_path / "other", list(range(N)), LENGTHS, names=POOLED, token_hash=hashes)
    report, text = report_of(store, tmp_path / "other")
    assert sorted(report.problems) == list(range(100, N)) and report.same_marks is None
    assert "other tokens in the other store" in report.problems[100]
    fewer = store_of(tmp_path / "fewer", [*LENGTHS[:100], 99], leave_out=[1])
    report, text = report_of(store, fewer)
    assert report.problems[100] == f"99 tokens in the other store, {LENGTHS[100]} in this one"
    assert report.problems[101] == "the other store does not have it" and "there are 101 masks" in report.faults[0]


def test_options_that_do_not_apply_and_folders_that_are_none_are_refused(store, tmp_path):
    with pytest.raises(InvalidInputError, match="is a store, whose masks have sample indices"):
        compare(store, store, padding_side="left")
    with pytest.raises(InvalidInputError, match="divisor must be at least 1, got 0"):
        compare(store, store, divisor=0)
    with pytest.raises(InvalidInputError, match="is not a folder"):
        compare(store, tmp_path / "gone")
    with pytest.raises(StoreError, match="is not a run folder"):
        compare(tmp_path, store)
