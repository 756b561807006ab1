"""What a shard adds to means depends on its rows alone, not on how they came, and holds against plain loops over its samples."""

import json
import math
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exactivations.store.batches import ActivationBatch, ActivationSpec, Place
from exactivations.store.errors import InvalidInputError
from exactivations.store.incoming_shard import ShardPlan
from exactivations.store.moments import Moments
from exactivations.store.shard import open_shard, write_shard
from exactivations.store.shard_content import ShardContent, rows_of
from exactivations.store.shard_sums import MOST_GROUPS, Groups, MeanOptions, from_tensors, sums_of_shard, to_tensors, unsealed
from exactivations.store.summed_shard import ShardMemory, SummedShard
from exactivations.store.vectors import Vector, poolings_needed, vectors_of

WIDTH = 3
POINTS = ("resid_post.0", "resid_post.1")
DECAYS = ("exp_decay:0.023", "exp_decay:0.067", "exp_decay:0.159")
POOLINGS = ("last", "mean", *DECAYS)
SHORT, LONG = Vector(POINTS, "short"), Vector(POINTS[:1], "long")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
BOS = 2.0**15  # the state of a special token, which float16 holds, too


def shard(seed, n, dtype=torch.float32, longest=9):
    """Random rows of n samples; special tokens stand anywhere, and their states are BOS."""
    dice = np.random.default_rng(seed)
    lengths = dice.integers(1, longest + 1, n)
    mask = np.concatenate([random_mask(dice, length) for length in lengths])
    tensors = {
        "sample_index": torch.from_numpy(np.sort(dice.choice(10 * n, n, replace=False))),
        "n_tokens": torch.from_numpy(lengths.astype(np.int32)),
        "input_ids": torch.from_numpy(dice.integers(0, 100, lengths.sum()).astype(np.int32)),
        "token_mask": torch.from_numpy(mask),
    }
    for point in POINTS:
        tensors |= {f"{point}/{pooling}": torch.from_numpy(dice.normal(size=(n, WIDTH)) * 10 + 3).to(dtype) for pooling in POOLINGS}
        states = np.where(mask[:, None], dice.normal(size=(lengths.sum(), WIDTH)) * 10 + 3, BOS)
        tensors[f"{point}/tokens"] = torch.from_numpy(states).to(dtype)
    return tensors


def random_mask(dice, length):
    """Special tokens at the start, in the middle or at the end; at least one token counts."""
    mask = dice.random(length) < dice.choice([0.2, 0.7, 1.0])
    mask[0] &= dice.random() < 0.5
    mask[dice.integers(length)] = True
    return mask


def samples_of(tensors):
    """Each sample's part of every tensor, by plain counting."""
    found, first = [], 0
    for row, n in enumerate(tensors["n_tokens"].tolist()):
        mine = {}
        for name, values in tensors.items():
            per_token = name in ("input_ids", "token_mask") or name.endswith("/tokens")
            mine[name] = values[first : first + n].tolist() if per_token else values[row].tolist()
        found.append(mine)
        first += n
    return found


def bytes_of(tensors):
    return {name: (values.dtype, values.shape, values.contiguous().numpy().tobytes()) for name, values in tensors.items()}


# --- a pure function of the rows ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 40), dtype=DTYPES, cuts=st.lists(st.integers(1, 39), max_size=8))
def test_batches_of_any_size_give_the_same_bits(tmp_path_factory, seed, n, dtype, cuts):
    tensors = shard(seed, n, dtype)
    options = MeanOptions((SHORT, LONG, Vector(POINTS[1:], "mean")), "label", 5)
    groups = Groups.of([f"g{i % 3}" for i in range(n)], tensors["sample_index"].numpy(), "label")
    expected = bytes_of(to_tensors(sums_of_shard(tensors, options, groups)))
    names = [name for name in tensors if "/" in name]
    specs = {name: ActivationSpec(name.endswith("/tokens"), WIDTH, dtype) for name in names}
    plan = ShardPlan(0, n, len(tensors["input_ids"]), specs)
    memory = ShardMemory(specs, n + 5, len(tensors["input_ids"]) + 20)  # larger, and used before
    for values in memory.of(ShardPlan(1, n + 5, len(tensors["input_ids"]) + 20, specs)).values():
        values.fill_(77)
    path = tmp_path_factory.mktemp("shard") / "s"
    incoming = SummedShard(path, plan, {}, ShardContent(options, lambda _: groups), memory)
    ends = [0, *tensors["n_tokens"].long().cumsum(0).tolist()]
    for start, stop in pairwise(sorted({0, n, *(cut for cut in cuts if cut < n)})):
        rows, tokens = slice(start, stop), slice(ends[start], ends[stop])
        batch = ActivationBatch(
            tensors["sample_index"][rows], tensors["n_tokens"][rows].long(), tensors["input_ids"][tokens],
            tensors["token_mask"][tokens], {name: tensors[name][tokens if specs[name].per_token else rows] for name in names},
            Place(0, start, ends[start]),
        )  # fmt: skip
        incoming.put(batch)
    incoming.publish()
    assert bytes_of(to_tensors(unsealed(open_shard(path)[0], path))) == expected


def test_taking_sums_changes_nothing_and_gives_the_same_bits_again():
    tensors, options = shard(0, 30), MeanOptions((SHORT, LONG), "label", 4)
    groups = Groups.of([i % 4 for i in range(30)], np.arange(30), "label")
    before = bytes_of(tensors)
    first = bytes_of(to_tensors(sums_of_shard(tensors, options, groups)))
    assert bytes_of(tensors) == before
    assert bytes_of(to_tensors(sums_of_shard(dict(reversed(tensors.items())), options, groups))) == first


# --- vectors -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 40), dtype=DTYPES)
def test_sums_are_those_of_the_layers_mean_of_every_sample(seed, n, dtype):
    tensors = shard(seed, n, dtype)
    found = sums_of_shard(tensors, MeanOptions(vectors_of(list(POINTS), ["mean", "short", "long"], average=True)), None)
    assert list(found) == ["resid_post.0+1/mean", "resid_post.0+1/short", "resid_post.0+1/long"]
    wanted = {"mean": ["mean"], "short": [DECAYS[1]], "long": ["last", *DECAYS]}
    for name, poolings in wanted.items():
        columns = [[tensors[f"{point}/{pooling}"].double().numpy() for point in POINTS] for pooling in poolings]
        rows = np.concatenate([(first + second) / 2 for first, second in columns], axis=1)
        moments = found[f"resid_post.0+1/{name}"]
        assert rows.shape[1] == moments.total.shape[1] == WIDTH * len(poolings)
        assert moments.count.tolist() == [n]
        scale = [math.fsum(abs(column)) for column in rows.T]
        assert (np.abs(moments.total[0] - [math.fsum(column) for column in rows.T]) <= 1e-12 * np.array(scale)).all()
        if n > 1:
            assert np.allclose(moments.variance[0], rows.var(axis=0, ddof=1), rtol=1e-11)


def test_long_is_last_and_three_half_lives_in_this_order_and_short_the_middle_one():
    values = {"last": 1.0, "exp_decay:0.023": 2.0, "exp_decay:0.067": 3.0, "exp_decay:0.159": 4.0}
    tensors = {f"p/{pooling}": torch.full((2, 3), value) for pooling, value in reversed(values.items())}
    assert Vector(("p",), "long").rows(tensors).tolist() == [[1.0] * 3 + [2.0] * 3 + [3.0] * 3 + [4.0] * 3] * 2
    assert Vector(("p",), "short").rows(tensors).tolist() == [[3.0] * 3] * 2
    assert poolings_needed(["short", "mean", "long"]) == ["exp_decay:0.067", "mean", "last", "exp_decay:0.023", "exp_decay:0.159"]


@pytest.mark.parametrize(
    ("points", "place"),
    [
        (("resid_post.25", "resid_post.26", "resid_post.27"), "resid_post.25+26+27"),
        (("resid_post.1",), "resid_post.1"),
        (("final_norm",), "final_norm"),
        (("embed", "resid_post.0"), "embed+resid_post.0"),
        (("resid_post.0", "attn_out.0"), "resid_post.0+attn_out.0"),
        (("embed", "final_norm"), "embed+final_norm"),
    ],
)
def test_averaged_layers_have_one_name(points, place):
    assert Vector(points, "mean").place == place
    assert Vector(points, "mean").name == f"{place}/mean"


def test_vectors_are_each_pooling_at_each_place_once():
    each = [Vector((point,), pooling) for point in POINTS for pooling in ("mean", "long")]
    assert list(vectors_of(list(POINTS), ["mean", "long", "mean"])) == each
    assert vectors_of(list(POINTS), ["mean", "mean"], average=True) == (Vector(POINTS, "mean"),)


def test_a_vector_of_something_that_is_not_there_names_it_and_what_there_is():
    tensors = {f"p/{pooling}": torch.ones(1, 2) for pooling in ("last", "mean")}
    with pytest.raises(InvalidInputError, match=r"p/long is made of p/exp_decay:0\.023, .*0\.159, found are p/last, p/mean$"):
        Vector(("p",), "long").rows(tensors)
    with pytest.raises(InvalidInputError, match=r"p\+q/mean is made of q/mean, found are p/last, p/mean$"):
        Vector(("p", "q"), "mean").rows(tensors)
    with pytest.raises(InvalidInputError, match="found are none"):
        Vector(("p",), "mean").rows({})


# --- positions ---------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 30), n_positions=st.integers(1, 12), dtype=DTYPES, average=st.booleans())
def test_positions_are_counted_from_the_end_over_tokens_that_count(seed, n, n_positions, dtype, average):
    tensors = shard(seed, n, dtype)
    vectors = vectors_of(list(POINTS), ["mean"], average=average)
    found = sums_of_shard(tensors, MeanOptions(vectors, n_positions=n_positions), None)
    for vector in vectors:
        at = [[] for _ in range(n_positions)]
        for sample in samples_of(tensors):
            position = 0
            for token in reversed(range(sample["n_tokens"])):
                if sample["token_mask"][token]:
                    if position < n_positions:
                        states = [sample[f"{point}/tokens"][token] for point in vector.hook_points]
                        at[position].append([sum(values) / len(states) for values in zip(*states, strict=True)])
                    position += 1
        moments = found[f"{vector.place}@positions"]
        assert moments.squares is None
        assert moments.count.tolist() == [len(states) for states in at]
        for position, states in enumerate(at):
            for column in range(WIDTH):
                values = [state[column] for state in states]
                scale = math.fsum(map(abs, values))
                assert abs(moments.total[position, column] - math.fsum(values)) <= 1e-13 * scale


def one_sample(mask):
    """One sample whose token t has the state t."""
    n = len(mask)
    return {
        "sample_index": torch.tensor([0]), "n_tokens": torch.tensor([n], dtype=torch.int32), "token_mask": torch.tensor(mask),
        "p/tokens": torch.arange(n)[:, None].float(), "p/mean": torch.ones(1, 1),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([True, True, True, True], [3, 2, 1, 0]),
        ([False, True, True, True], [3, 2, 1]),
        ([True, True, False, True], [3, 1, 0]),
        ([True, True, True, False], [2, 1, 0]),
        ([False, False, True, False], [2]),
        ([False, True, False, False], [1]),
    ],
    ids=["none", "start", "middle", "end", "everywhere", "two at the end"],
)
def test_a_special_token_is_in_no_position_and_the_others_move_up(mask, expected):
    found = sums_of_shard(one_sample(mask), MeanOptions((Vector(("p",), "mean"),), n_positions=6), None)["p@positions"]
    assert found.count.tolist() == [1] * len(expected) + [0] * (6 - len(expected))
    assert found.total[: len(expected), 0].tolist() == expected
    assert not found.total[len(expected) :].any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 30), n_positions=st.integers(1, 15), dtype=DTYPES)
def test_the_states_of_special_tokens_leave_no_trace_in_any_position(seed, n, n_positions, dtype):
    tensors = shard(seed, n, dtype)
    options = MeanOptions((SHORT, Vector(POINTS[1:], "mean")), n_positions=n_positions)
    expected = bytes_of(to_tensors(sums_of_shard(tensors, options, None)))
    for point in POINTS:
        tensors[f"{point}/tokens"][~tensors["token_mask"]] = torch.nan
    assert bytes_of(to_tensors(sums_of_shard(tensors, options, None))) == expected
    everything = {**tensors, "token_mask": torch.ones_like(tensors["token_mask"])}
    if not tensors["token_mask"].all() and n_positions >= 9:  # with token_mask="all" they are in the last positions
        assert np.isnan(sums_of_shard(everything, options, None)["resid_post.1@positions"].total).any()


def test_the_states_of_one_sample_never_reach_another_ones_positions():
    """Sample s has s in every state: the shortest one ends where the next begins."""
    lengths = [1, 5, 1, 2, 7]
    tensors = {
        "n_tokens": torch.tensor(lengths, dtype=torch.int32),
        "token_mask": torch.ones(sum(lengths), dtype=torch.bool),
        "p/tokens": torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))[:, None].float(),
        "p/mean": torch.ones(5, 1),
    }
    found = sums_of_shard(tensors, MeanOptions((Vector(("p",), "mean"),), n_positions=8), None)["p@positions"]
    for position in range(8):
        assert found.total[position, 0] == sum(s for s, n in enumerate(lengths) if n > position)
        assert found.count[position] == sum(n > position for n in lengths)


# --- groups ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    labels=st.one_of(
        st.lists(st.sampled_from(["", "b", "a", "ä", "B", "a b"]), min_size=1, max_size=30),
        st.lists(st.integers(-3, 12), min_size=1, max_size=30),
        st.lists(st.booleans(), min_size=1, max_size=30),
    ),
)
def test_every_label_has_the_moments_of_its_samples(seed, labels):
    tensors = shard(seed, len(labels))
    groups = Groups.of(labels, tensors["sample_index"].numpy(), "label")
    assert groups.names == sorted({str(label) for label in labels})
    assert [groups.names[number] for number in groups.numbers] == [str(label) for label in labels]
    found = sums_of_shard(tensors, MeanOptions((SHORT,), "label"), groups)
    rows = (tensors["resid_post.0/exp_decay:0.067"].double() + tensors["resid_post.1/exp_decay:0.067"].double()).numpy() / 2
    moments = found["resid_post.0+1/short@groups"]
    for number, name in enumerate(groups.names):
        mine = rows[[str(label) == name for label in labels]]
        assert moments.count[number] == len(mine)
        assert np.allclose(moments.mean[number], mine.mean(axis=0), rtol=1e-12, atol=1e-12)
        if len(mine) > 1:
            assert np.allclose(moments.variance[number], mine.var(axis=0, ddof=1), rtol=1e-10)
    assert found["resid_post.0+1/short"].count.tolist() == [len(labels)]


def test_a_shard_in_which_a_group_has_no_sample_leaves_that_group_empty():
    tensors = shard(0, 4)
    groups = Groups.of(["a", "b", "c", "b", "b"], np.arange(5), "label").at(np.array([4, 1, 0, 3]))
    assert groups.names == ["a", "b", "c"] and groups.numbers.tolist() == [1, 1, 0, 1]
    moments = sums_of_shard(tensors, MeanOptions((LONG,), "label"), groups)["resid_post.0/long@groups"]
    assert moments.count.tolist() == [1, 3, 0]
    assert not moments.total[2].any() and not moments.squares[2].any()


def test_a_sample_without_a_label_is_refused_by_its_index_in_the_dataset():
    with pytest.raises(InvalidInputError, match=r"sample 70 has no value in column 'kind' \(2 samples have none\)"):
        Groups.of(["a", None, "b", None], np.array([3, 70, 71, 90]), "kind")


def test_as_many_groups_as_are_kept_pass_and_one_more_is_refused():
    labels = [f"g{i}" for i in range(MOST_GROUPS)]
    assert Groups.of(labels * 2, np.arange(2 * MOST_GROUPS), "kind").names == sorted(labels)
    with pytest.raises(InvalidInputError, match=r"column 'kind' has 1,025 different values, means are kept for 1,024 at most"):
        Groups.of([*labels, "one more"], np.arange(MOST_GROUPS + 1), "kind")


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.text(st.sampled_from(["a", "\0", " ", "\n", "é", "\u0301", "\U0001f600"]), max_size=3), min_size=1))
def test_labels_that_differ_in_any_character_are_different_groups(labels):
    groups = Groups.of(labels, np.arange(len(labels)), "label")
    assert groups.names == sorted(set(labels))
    assert [groups.names[number] for number in groups.numbers] == labels


def test_a_long_text_in_the_column_does_not_take_its_length_for_every_sample():
    """A column of texts is refused, and before that it must not fill the memory: here 400 times 40,000 characters."""
    labels = ["x" * 40_000, *map(str, range(399))]
    tracemalloc.start()
    try:
        Groups.of(labels, np.arange(400), "text")
        assert tracemalloc.get_traced_memory()[1] < 10 * 40_000
    finally:
        tracemalloc.stop()


# --- options -----------------------------------------------------------------------------------------------------------


def test_options_refuse_no_vectors_doubled_ones_and_negative_positions():
    with pytest.raises(InvalidInputError, match=r"each named once, got \['resid_post.0\+1/short', 'resid_post.0\+1/short'\]"):
        MeanOptions((SHORT, Vector(POINTS, "short")))
    with pytest.raises(InvalidInputError, match=r"means need vectors, each named once, got \[\]"):
        MeanOptions(())
    with pytest.raises(InvalidInputError, match="n_positions must be at least 0, got -1"):
        MeanOptions((SHORT,), n_positions=-1)


def test_a_vector_of_no_hook_points_is_refused_before_anything_is_computed():
    with pytest.raises(InvalidInputError):
        MeanOptions((Vector((), "mean"),)).check_stored({"p/mean": {}})


def test_options_that_need_more_than_is_extracted_name_it():
    held = {f"{point}/{pooling}": {"width": 5} for point in POINTS for pooling in POOLINGS}
    MeanOptions((SHORT, LONG, Vector(POINTS[1:], "mean"))).check_stored(held)
    with pytest.raises(InvalidInputError, match=r"the means need resid_post\.1/max, extracted are resid_post\.0/last, "):
        MeanOptions((SHORT, Vector(POINTS[1:], "max"))).check_stored(held)
    with pytest.raises(InvalidInputError, match=r"need resid_post\.0/exp_decay:0\.067, resid_post\.1/exp_decay:0\.067, extracted"):
        MeanOptions((SHORT,)).check_stored({"resid_post.0/mean": {"width": 5}})
    del held["resid_post.0/exp_decay:0.159"]
    with pytest.raises(InvalidInputError, match=r"the means need resid_post\.0/exp_decay:0\.159, extracted"):
        MeanOptions((LONG,)).check_stored(held)


def test_means_by_position_need_the_tokens_of_every_layer():
    held = {f"{point}/{pooling}": {"width": 5} for point in POINTS for pooling in POOLINGS} | {"resid_post.0/tokens": {"width": 5}}
    MeanOptions((LONG,), n_positions=4).check_stored(held)
    with pytest.raises(InvalidInputError, match=r"the means need resid_post\.1/tokens, extracted"):
        MeanOptions((SHORT,), n_positions=4).check_stored(held)


def test_tokens_are_no_vector():
    held = {"resid_post.0/tokens": {"width": 5}, "resid_post.0/mean": {"width": 5}}
    with pytest.raises(InvalidInputError, match=r"resid_post\.0/tokens has a row per token"):
        MeanOptions((Vector(POINTS[:1], "mean"), Vector(POINTS[:1], "tokens"))).check_stored(held)


@pytest.mark.parametrize(
    "options",
    [MeanOptions((SHORT,)), MeanOptions((SHORT, LONG), "label", 7), MeanOptions((Vector(("embed", "final_norm"), "max"),))],
)
def test_options_come_back_from_json(options):
    assert MeanOptions.from_json(json.loads(json.dumps(options.to_json()))) == options


# --- files -------------------------------------------------------------------------------------------------------------


def test_sums_come_back_from_a_file_bit_for_bit_beside_rows(tmp_path):
    tensors, options = shard(1, 20, torch.bfloat16), MeanOptions((SHORT, LONG), "label", 30)
    groups = Groups.of([i % 3 for i in range(20)], np.arange(20), "label")
    sums = sums_of_shard(tensors, options, groups)
    content = ShardContent(options, lambda number: groups if number == 4 else None).of(4, tensors)
    write_shard(tmp_path / "s", content, {"shard": 4})
    found = unsealed(open_shard(tmp_path / "s")[0], tmp_path / "s")
    assert found.keys() == sums.keys() == {
        *(f"{vector.name}{what}" for vector in (SHORT, LONG) for what in ("", "@groups")),
        *(f"{vector.place}@positions" for vector in (SHORT, LONG)),
    }  # fmt: skip
    for name, moments in sums.items():
        assert found[name].count.dtype == np.int64 and found[name].total.dtype == np.float64
        assert found[name].count.tobytes() == moments.count.tobytes() and found[name].total.tobytes() == moments.total.tobytes()
        assert (found[name].squares is None) == (moments.squares is None) == name.endswith("@positions")
        assert moments.squares is None or found[name].squares.tobytes() == moments.squares.tobytes()
    rows = {name: values for name, values in content.items() if not name.startswith("sums")}
    assert rows.keys() == tensors.keys() and all(torch.equal(rows[name], tensors[name]) for name in rows)


def test_sums_are_kept_in_float64_and_survive_as_views():
    wide = np.random.default_rng(0).normal(size=(4, 10))
    moments = Moments(np.arange(4) + 1, wide[:, ::2], wide[:, 1::2])
    found = from_tensors(to_tensors({"a/b@groups": moments}))["a/b@groups"]
    assert np.array_equal(found.total, wide[:, ::2]) and np.array_equal(found.squares, wide[:, 1::2])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 25), dtype=DTYPES, data=st.data())
def test_the_rows_that_are_kept_are_exactly_those_and_their_tokens(seed, n, dtype, data):
    tensors = shard(seed, n, dtype)
    rows = sorted(data.draw(st.sets(st.integers(0, n - 1))))
    before = samples_of(tensors)
    found = rows_of(tensors, torch.tensor(rows, dtype=torch.int64))
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == tensors[name].dtype and found[name].shape[1:] == tensors[name].shape[1:] for name in tensors)
    assert samples_of(found) == [before[row] for row in rows]
    assert len(found["input_ids"]) == sum(before[row]["n_tokens"] for row in rows)


def test_sums_beside_witnesses_are_those_of_all_rows():
    tensors, options = shard(2, 20), MeanOptions((SHORT,), n_positions=3)
    content = ShardContent(options, None, lambda shard: np.array([shard, 3, 17])).of(1, tensors)
    assert samples_of({n: v for n, v in content.items() if not n.startswith("sums")}) == [
        samples_of(tensors)[i] for i in (1, 3, 17)
    ]
    sums = {name: values for name, values in content.items() if name.startswith("sums/")}
    assert bytes_of(sums) == bytes_of(to_tensors(sums_of_shard(tensors, options, None)))
