"""MeanActivations against numpy: what it gives is the mean that was asked for, or an error that names what is wrong."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exactivations.lit_modules.models.ground_truth import pool_by_definition
from exactivations.store import ActivationStore, MeanActivations
from exactivations.store.errors import (
    ExactivationsError,
    IdentityError,
    IncompleteStoreError,
    InvalidInputError,
    StoreError,
    VerificationError,
)
from exactivations.store.mean_activations import MIN_COUNT
from exactivations.store.means_fold import fold, fold_rows
from exactivations.store.means_join import add
from exactivations.store.position_weights import position_weights
from exactivations.store.run_folder import MEANS_FILE, RunFolder
from exactivations.store.shard_sums import MeanOptions
from exactivations.store.vectors import Vector
from tests.store.test_means_file import OPTIONS, VECTORS, WIDTH, deal, rows_by_definition, texts, write_means, write_run

NAMES = [vector.name for vector in VECTORS]
SHORT, LONG = "resid_post.0+1/short", "resid_post.0/long"
MEAN, LAST, FIRST, MAX = (f"resid_post.0/{pooling}" for pooling in ("mean", "last", "first", "max"))
LINEAR = [SHORT, LONG, MEAN, LAST, FIRST]
PLACES = ["resid_post.0+1", "resid_post.0"]
TEXTS = texts(60, labels=("a", "b", "c"), longest=12)
N_POSITIONS = 12
NUMPY = np.testing.assert_allclose


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of 60 samples with rows, groups and means of 12 positions, as many as any sample has."""
    path = tmp_path_factory.mktemp("means") / "run"
    write_means(write_run(path, deal(TEXTS, 3), MeanOptions(VECTORS, "label", N_POSITIONS)))
    return path


@pytest.fixture(scope="module")
def means(run):
    return MeanActivations.load(run)


def rows_of(name, group=None):
    vector = VECTORS[NAMES.index(name)]
    return rows_by_definition([text for text in TEXTS if group in (None, text.label)], vector)


# --- what is given -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, "a", "b", "c"])
@pytest.mark.parametrize("name", NAMES)
def test_means_variances_counts_and_directions_are_numpys(means, name, group):
    rows = rows_of(name, group)
    mean = rows.mean(axis=0)
    assert means.count(name, group) == len(rows)
    assert means.mean(name, group).dtype == means.variance(name, group).dtype == torch.float32
    NUMPY(means.mean(name, group).numpy(), mean.astype(np.float32), rtol=1.2e-7)
    NUMPY(means.variance(name, group).numpy(), rows.var(axis=0, ddof=1), rtol=1e-6)
    direction = means.normalised(name, group).double().numpy()
    assert abs(np.linalg.norm(direction) - 1) < 1e-6
    NUMPY(direction, mean / np.linalg.norm(mean), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_difference_is_the_one_groups_mean_minus_the_other_ones(means, name):
    expected = rows_of(name, "a").mean(axis=0) - rows_of(name, "b").mean(axis=0)
    NUMPY(means.difference(name, "a", "b").numpy(), expected, rtol=1e-6, atol=1e-12)
    assert torch.equal(means.difference(name, "a", "b"), -means.difference(name, "b", "a"))
    assert not means.difference(name, "c", "c").any()


def test_a_small_difference_of_large_means_is_taken_in_float64(tmp_path):
    """In float32 both means would be 16777216."""
    pair = texts(2, labels=("a",))
    for text, label, value in zip(pair, "ab", (2.0**24, 2.0**24 + 2), strict=True):
        text.label, text.states = label, {point: torch.full((len(text.ids), WIDTH), value) for point in text.states}
    third = texts(1, seed=5, labels=("b",), first_index=2)
    third[0].states = {point: torch.full((len(third[0].ids), WIDTH), 2.0**24) for point in third[0].states}
    write_means(write_run(tmp_path / "run", [[*pair, *third]], MeanOptions((Vector(("resid_post.0",), "mean"),), "label")))
    assert MeanActivations.load(tmp_path / "run").difference(MEAN, "b", "a").tolist() == [1.0] * WIDTH


def test_names_places_groups_and_samples_are_told(means):
    assert means.names == NAMES and means.places == PLACES and means.groups == ["a", "b", "c"] and means.n_samples == 60
    assert repr(means) == f"MeanActivations(60 samples: {', '.join(NAMES)})"


def test_a_result_is_named_by_its_folder_or_its_file_as_text_or_path(run, means):
    for result in (run, str(run), run / MEANS_FILE, str(run / MEANS_FILE)):
        assert torch.equal(MeanActivations.load(result).mean(LONG), means.mean(LONG))


def test_means_by_position_are_those_of_tokens_that_count_from_the_end(means):
    for place in PLACES:
        at = [[] for _ in range(N_POSITIONS)]
        for text in TEXTS:
            points = list(text.states) if place == "resid_post.0+1" else ["resid_post.0"]
            counted = [token for token, counts in enumerate(text.mask.tolist()) if counts]
            for position, token in enumerate(reversed(counted)):
                at[position].append(np.mean([text.states[point][token].double().numpy() for point in points], axis=0))
        values, count = means.by_position(place)
        assert count.tolist() == [len(states) for states in at] and values.shape == (N_POSITIONS, WIDTH)
        for position, states in enumerate(at):
            if states:
                NUMPY(values[position].numpy(), np.mean(states, axis=0), rtol=1e-6)
            else:
                assert torch.isnan(values[position]).all()


def test_rows_of_a_store_are_in_its_order_and_only_what_it_holds_is_needed(means, run):
    store = ActivationStore(run)
    for vector in VECTORS:
        found = means.rows_of(store, vector.name)
        assert found.dtype == torch.float64
        assert np.array_equal(found.numpy(), rows_by_definition(TEXTS, vector))


# --- cosine and centre -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), n=st.integers(1, 20), name=st.sampled_from(NAMES), group=st.sampled_from([None, "a"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), power=st.integers(-30, 30),
)  # fmt: skip
def test_cosines_and_centred_rows_are_numpys(means, seed, n, name, group, dtype, power):
    mean = rows_of(name, group).mean(axis=0)
    rows = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, len(mean))) * 10.0**power).to(dtype)
    before, exact = rows.clone(), rows.double().numpy()
    cosine = means.cosine(rows, name, group)
    expected = [float(np.dot(row / np.linalg.norm(row), mean / np.linalg.norm(mean))) for row in exact]
    NUMPY(cosine.numpy(), expected, rtol=0, atol=1e-6)
    assert cosine.dtype == torch.float32 and cosine.shape == (n,) and cosine.abs().max() <= 1
    centred = means.centre(rows, name, group)
    NUMPY(centred.values.numpy(), exact - mean, rtol=1e-6, atol=1e-12)
    assert centred.values.dtype == torch.float32
    assert (centred.name, centred.by) == (name, "mean" if group is None else "mean of group a")
    assert centred.n_samples == (60 if group is None else means.count(name, "a"))
    assert torch.equal(rows, before)


def test_the_mean_itself_has_cosine_one_and_centres_to_nothing_and_its_opposite_minus_one(means):
    for name in NAMES:
        mean = torch.from_numpy(rows_of(name).mean(axis=0))
        assert means.cosine(torch.stack([mean, -mean, 1e-6 * mean]), name).tolist() == pytest.approx([1, -1, 1], abs=1e-7)
        assert means.centre(mean[None], name).values.abs().max() <= 1e-13 * mean.abs().max()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(NAMES))
def test_the_centred_rows_of_all_samples_have_mean_zero(means, seed, name):
    rows = rows_of(name)[np.random.default_rng(seed).permutation(60)]
    centred = means.centre(torch.from_numpy(rows), name).values.double().numpy()
    assert (np.abs(centred.mean(axis=0)) <= 1e-6 * np.abs(rows).max()).all()


# --- centring by position ----------------------------------------------------------------------------------------------


def blocks(dice, n, n_points):
    """n samples whose tokens count by random masks: states [T, d] of each point, masks, lengths."""
    lengths = dice.integers(1, N_POSITIONS + 4, n)
    masks = []
    for length in lengths:
        mask = dice.random(length) < dice.choice([0.3, 0.8, 1.0])
        mask[dice.integers(length)] = True
        mask[np.flatnonzero(mask)[:-N_POSITIONS]] = False  # as many as there are means of
        masks.append(mask)
    states = [torch.from_numpy(dice.normal(size=(lengths.sum(), WIDTH)) * 4 + 9).float() for _ in range(n_points)]
    return states, [torch.from_numpy(mask) for mask in masks], torch.from_numpy(lengths)


def pooled(states, masks, lengths, vector):
    """float64 [n, d] by definition: pooled, layers averaged, poolings concatenated."""
    out = []
    for sample, mask in enumerate(masks):
        start = int(lengths[:sample].sum())
        layers = [values[start : start + len(mask)] for values in states]
        parts = [torch.stack([pool_by_definition(layer, mask, p)[0] for layer in layers]).mean(dim=0) for p in vector.poolings]
        out.append(torch.cat(parts))
    return torch.stack(out)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 12), name=st.sampled_from(LINEAR))
def test_a_pooling_of_centred_tokens_is_the_centred_pooling(means, seed, n, name):
    """pool(x - mean) = pool(x) - pool(mean): the left from the states of the tokens, the right from pooled rows alone."""
    vector = means.vector(name)
    states, masks, lengths = blocks(np.random.default_rng(seed), n, len(vector.hook_points))
    rows = pooled(states, masks, lengths, vector)
    counted = torch.tensor([int(mask.sum()) for mask in masks])
    by_rows = means.centre_by_position(rows, name, counted, min_count=1)
    token_mask = torch.cat(masks)
    layers = torch.stack([values.double() for values in states]).mean(dim=0)
    by_tokens = means.centre_tokens(layers, vector.place, token_mask, lengths, min_count=1)
    expected = pooled([by_tokens.values], masks, lengths, vector)
    assert by_rows.values.dtype == torch.float32 and by_rows.values.shape == expected.shape
    scale = rows.abs().max()
    assert (by_rows.values.double() - expected).abs().max() <= 1e-6 * scale
    assert (by_rows.by, by_rows.name, by_rows.n_samples) == ("means by position", name, 60)
    assert torch.equal(by_tokens.values[~token_mask], layers[~token_mask].float()), "tokens that do not count stay as they are"
    assert (by_rows.values.double() - rows).abs().max() > 0.1 * scale, "and something was subtracted"


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 300),
    pooling=st.sampled_from(["mean", "last", "first", "exp_decay:0.023", "exp_decay:0.067", "exp_decay:0.159", "exp_decay:9"]),
)
def test_weights_by_position_are_those_of_the_definition(n, pooling):
    """The pooling of one-hot states is its weights."""
    expected = pool_by_definition(torch.eye(n), torch.ones(n, dtype=torch.bool), pooling)[0].flip(0).numpy()
    found = position_weights(pooling, n)
    assert found.dtype == np.float64 and found.shape == (n,)
    NUMPY(found, expected, rtol=1e-12, atol=1e-300)
    assert abs(found.sum() - 1) < 1e-12


@given(n=st.integers(1, 30), data=st.data())
def test_the_weights_of_a_position_are_those_of_the_definition(n, data):
    pooling = f"position:{data.draw(st.integers(-n, n - 1))}"
    expected = pool_by_definition(torch.eye(n), torch.ones(n, dtype=torch.bool), pooling)[0].flip(0).numpy()
    np.testing.assert_array_equal(position_weights(pooling, n), expected)
    for beyond in (n, -n - 1):
        with pytest.raises(InvalidInputError, match=f"has {n} tokens that count, the pooling position:{beyond} needs {n + 1} "):
            position_weights(f"position:{beyond}", n)


@pytest.mark.parametrize("pooling", ["max", "tokens"])
def test_a_pooling_that_is_no_weighted_sum_has_no_weights(pooling):
    with pytest.raises(InvalidInputError, match=f"pooling {pooling} is not a weighted sum of tokens"):
        position_weights(pooling, 3)


def test_max_cannot_be_centred_by_position(means):
    with pytest.raises(InvalidInputError, match="pooling max is not a weighted sum of tokens: it cannot be centred by position"):
        means.centre_by_position(torch.ones(1, WIDTH), MAX, torch.tensor([2]), min_count=1)


def counts_at(means):
    return means.by_position("resid_post.0")[1].tolist()


def test_a_position_of_too_few_tokens_is_refused_with_position_count_and_row(means):
    count = counts_at(means)
    thin = next(position for position, n in enumerate(count) if n < MIN_COUNT)
    assert 1 < thin < N_POSITIONS - 1, count
    rows, counted = torch.ones(4, WIDTH), torch.tensor([thin, 1, thin + 1, thin + 1])
    expected = (
        rf"position {thin} from the end of resid_post\.0 has a mean of {count[thin]} tokens, at least 10 are wanted, and row 2 "
    )
    with pytest.raises(InvalidInputError, match=expected):
        means.centre_by_position(rows, MEAN, counted)
    means.centre_by_position(rows, MEAN, counted, min_count=count[thin])
    means.centre_by_position(rows[:2], MEAN, counted[:2])
    means.centre_by_position(rows, LAST, counted)  # only the last token is looked at
    with pytest.raises(InvalidInputError, match=expected):
        means.centre_by_position(rows, FIRST, counted)
    n_tokens = torch.tensor([thin, thin + 3])
    mask = torch.ones(2 * thin + 3, dtype=torch.bool)
    mask[[thin, thin + 2]] = False  # the second one has thin + 1 that count
    with pytest.raises(
        InvalidInputError, match=rf"position {thin} from the end .* mean of {count[thin]} tokens.* sample 1 of these"
    ):
        means.centre_tokens(torch.ones(len(mask), WIDTH), "resid_post.0", mask, n_tokens)


def test_a_row_beyond_the_positions_is_refused_with_how_many_there_are(means):
    rows, counted = torch.ones(3, WIDTH), torch.tensor([1, N_POSITIONS + 1, 2])
    for name in (MEAN, FIRST):
        with pytest.raises(
            InvalidInputError,
            match=r"row 1 \(13 tokens that count\) reaches position 12 from the end of .*are kept of 12 positions",
        ):
            means.centre_by_position(rows, name, counted, min_count=1)
    with pytest.raises(InvalidInputError, match=r"sample 0 of these \(13 tokens that count\) reaches position 12 from the end"):
        means.centre_tokens(
            torch.ones(13, WIDTH), "resid_post.0", torch.ones(13, dtype=torch.bool), torch.tensor([13]), min_count=1
        )


@pytest.mark.parametrize("n", [N_POSITIONS, N_POSITIONS + 1, 500])
def test_a_pooling_that_looks_at_the_last_token_alone_may_be_of_any_length(means, n):
    expected = 1 - means.by_position("resid_post.0")[0][0]
    found = means.centre_by_position(torch.ones(1, WIDTH), LAST, torch.tensor([n]))
    assert torch.allclose(found.values[0], expected, rtol=1e-6)


@pytest.mark.parametrize("min_count", [0, -1])
def test_a_position_without_any_token_never_gives_nan_however_low_min_count_is(tmp_path, min_count):
    short = texts(5, longest=3)
    write_means(write_run(tmp_path / "run", [short], MeanOptions((Vector(("resid_post.0",), "mean"),), None, 8)))
    means = MeanActivations.load(tmp_path / "run")
    with pytest.raises(InvalidInputError, match="position 3 from the end"):
        means.centre_by_position(torch.ones(1, WIDTH), MEAN, torch.tensor([5]), min_count=min_count)
    with pytest.raises(InvalidInputError, match="position 3 from the end"):
        ones = torch.ones(5, dtype=torch.bool)
        means.centre_tokens(torch.ones(5, WIDTH), "resid_post.0", ones, torch.tensor([5]), min_count=min_count)


def test_no_rows_centred_are_no_rows(means):
    nothing, none = torch.ones(0, WIDTH), torch.zeros(0, dtype=torch.int64)
    assert means.centre(nothing, MEAN).values.shape == (0, WIDTH)
    assert means.cosine(nothing, MEAN).shape == (0,)
    assert means.centre_by_position(nothing, MEAN, none).values.shape == (0, WIDTH)
    assert means.centre_tokens(nothing, "resid_post.0", none.bool(), none).values.shape == (0, WIDTH)


@pytest.mark.parametrize("counted", [[1], [1, 2, 3], [0, 1], [-1, 1], [[1, 1]]], ids=str)
def test_counts_that_are_not_of_these_rows_are_refused(means, counted):
    with pytest.raises(InvalidInputError, match=r"n_counted must be \[n\] with n = 2 and at least 1 each"):
        means.centre_by_position(torch.ones(2, WIDTH), MEAN, torch.tensor(counted), min_count=1)


def test_a_mask_or_lengths_that_are_not_of_these_tokens_are_refused(means):
    for mask, n_tokens in ((4, [2, 2]), (5, [2, 2]), (5, [6]), (6, [5])):
        with pytest.raises(InvalidInputError, match="token_mask and n_tokens must be of 5 tokens"):
            mask = torch.ones(mask, dtype=torch.bool)
            means.centre_tokens(torch.ones(5, WIDTH), "resid_post.0", mask, torch.tensor(n_tokens), min_count=1)


def test_without_positions_nothing_is_centred_by_position(tmp_path):
    write_means(write_run(tmp_path / "run", deal(texts(5), 1), MeanOptions(VECTORS)))
    means = MeanActivations.load(tmp_path / "run")
    for ask in (
        lambda: means.by_position("resid_post.0"),
        lambda: means.centre_by_position(torch.ones(1, WIDTH), MEAN, torch.tensor([1])),
        lambda: means.centre_tokens(torch.ones(1, WIDTH), "resid_post.0", torch.tensor([True]), torch.tensor([1])),
    ):
        with pytest.raises(InvalidInputError, match="no means by position were taken"):
            ask()
    with pytest.raises(InvalidInputError, match="there is no group 'a'; there are none"):
        means.mean(MEAN, "a")


# --- what is refused ---------------------------------------------------------------------------------------------------


def askers(means):
    """Everything that takes rows [n, 3] of the mean."""
    return {
        "cosine": lambda rows: means.cosine(rows, MEAN),
        "centre": lambda rows: means.centre(rows, MEAN),
        "centre by position": lambda rows: means.centre_by_position(rows, MEAN, torch.ones(len(rows)).long(), min_count=1),
        "centre tokens": lambda rows: means.centre_tokens(
            rows, "resid_post.0", torch.ones(len(rows)).bool(), torch.ones(len(rows)).long(), min_count=1
        ),
    }


ASKERS = ["cosine", "centre", "centre by position", "centre tokens"]


@pytest.mark.parametrize("asker", ASKERS)
@pytest.mark.parametrize("shape", [(2, WIDTH - 1), (2, 4 * WIDTH), (2, 1), (WIDTH,), (1, 2, WIDTH)])
def test_rows_of_another_width_are_refused_with_both(means, asker, shape):
    with pytest.raises(InvalidInputError, match=rf"is {WIDTH} wide, got rows of shape {re.escape(str(list(shape)))}"):
        askers(means)[asker](torch.ones(shape))


@pytest.mark.parametrize("asker", ASKERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_refused_by_their_number(means, asker, value):
    rows = torch.ones(4, WIDTH)
    rows[2, 1] = value
    with pytest.raises(InvalidInputError, match=r"row 2 of resid_post\.0(/mean)? is not finite"):
        askers(means)[asker](rows)


def test_a_row_of_zeros_has_no_cosine(means):
    rows = torch.ones(4, WIDTH)
    rows[3] = 0
    with pytest.raises(InvalidInputError, match=r"row 3 of resid_post\.0/mean, or its mean, is zero"):
        means.cosine(rows, MEAN)


def test_a_mean_of_zeros_has_no_direction(tmp_path):
    everything = texts(4)
    for text in everything:
        text.states = {point: torch.zeros(len(text.ids), WIDTH) for point in text.states}
    write_means(write_run(tmp_path / "run", [everything]))
    means = MeanActivations.load(tmp_path / "run")
    assert means.mean(MEAN).tolist() == means.variance(MEAN).tolist() == [0.0] * WIDTH
    with pytest.raises(InvalidInputError, match=r"the mean of resid_post\.0/mean is zero"):
        means.normalised(MEAN)
    with pytest.raises(InvalidInputError, match="or its mean, is zero"):
        means.cosine(torch.ones(2, WIDTH), MEAN)


def test_one_sample_has_a_mean_and_no_variance(tmp_path):
    pair = texts(2, labels=("a",))
    pair[1].label = "b"
    write_means(write_run(tmp_path / "run", [pair]))
    means = MeanActivations.load(tmp_path / "run")
    NUMPY(means.mean(MEAN, "b").numpy(), rows_by_definition(pair[1:], VECTORS[2])[0], rtol=1e-6)
    with pytest.raises(InvalidInputError, match=r"a variance needs two samples, group b of resid_post\.0/mean has 1"):
        means.variance(MEAN, "b")
    assert torch.isfinite(means.variance(MEAN)).all()


def test_what_there_is_not_is_named_with_what_there_is(means, run):
    there = re.escape(", ".join(NAMES))
    for ask in (
        lambda: means.mean("resid_post.9/mean"),
        lambda: means.count("resid_post.9/mean", "a"),
        lambda: means.vector("resid_post.9/mean"),
        lambda: means.cosine(torch.ones(1, WIDTH), "resid_post.9/mean"),
        lambda: means.centre_by_position(torch.ones(1, WIDTH), "resid_post.9/mean", torch.tensor([1])),
        lambda: means.rows_of(ActivationStore(run), "resid_post.9/mean"),
    ):
        with pytest.raises(InvalidInputError, match=rf"there is no mean of resid_post\.9/mean; there are means of {there}$"):
            ask()
    for ask in (lambda: means.mean(MEAN, "z"), lambda: means.difference(MEAN, "a", "z"), lambda: means.variance(MEAN, "z")):
        with pytest.raises(InvalidInputError, match=r"there is no group 'z'; there are 'a', 'b', 'c'$"):
            ask()
    with pytest.raises(InvalidInputError, match=r"there is no place resid_post\.1; there are resid_post\.0\+1, resid_post\.0$"):
        means.by_position("resid_post.1")


@pytest.mark.parametrize(
    ("field", "value"), [("model", "m2"), ("weights", "w2"), ("tokenizer", "t2"), ("dtype", "bfloat16"), ("max_length", 9)]
)
def test_rows_of_another_models_store_are_refused_with_both_values(tmp_path, means, field, value):
    write_run(tmp_path / "other", deal(texts(4, seed=3), 1), None, **{field: value})
    with pytest.raises(
        IdentityError, match=rf"\n  {field}: .* in the means, {value!r} in {re.escape(str(tmp_path / 'other'))}$"
    ) as e:
        means.rows_of(ActivationStore(tmp_path / "other"), MEAN)
    assert repr(means.file.identity[field]) in str(e.value)


def test_rows_of_a_store_of_other_texts_plan_or_machine_are_given(tmp_path, means):
    other = texts(7, seed=3)
    write_run(tmp_path / "other", deal(other, 2), None, dataset="e", token_budget=3, torch="9", cpu_threads=8)
    assert np.array_equal(means.rows_of(ActivationStore(tmp_path / "other"), LONG).numpy(), rows_by_definition(other, VECTORS[1]))


def test_of_a_run_that_kept_means_only_the_rows_of_its_witnesses_are_given(tmp_path, means):
    shards = deal(texts(9, seed=3), 2)
    write_run(tmp_path / "other", shards, keeps_rows=False)
    store = ActivationStore(tmp_path / "other", allow_witnesses=True)
    kept = sorted((text for shard in shards for text in shard[:2]), key=lambda text: text.index)
    assert store.sample_index.tolist() == [text.index for text in kept]
    for vector in VECTORS:
        assert np.array_equal(means.rows_of(store, vector.name).numpy(), rows_by_definition(kept, vector))


def test_rows_that_a_store_does_not_hold_are_named(tmp_path, means):
    folder = write_run(tmp_path / "other", deal(texts(4, seed=3), 1), None)
    store = ActivationStore(folder.path)
    del store.info.activations["resid_post.0/exp_decay:0.023"]
    with pytest.raises(InvalidInputError, match=r"resid_post\.0/long is made of resid_post\.0/exp_decay:0\.023, .* holds "):
        means.rows_of(store, LONG)


# --- loading -----------------------------------------------------------------------------------------------------------


def test_an_unfinished_run_has_no_means(tmp_path):
    write_run(tmp_path / "run", deal(texts(9), 3), leave_out=(1,), verified=False)
    for result in (tmp_path / "run", str(tmp_path / "run")):
        with pytest.raises(IncompleteStoreError, match=r"not finished: 1 of 3 shards are missing.*Start the same command again"):
            MeanActivations.load(result)
    with pytest.raises(IncompleteStoreError):
        MeanActivations.load(tmp_path / "run", allow_unverified=True)


def test_a_run_whose_last_step_is_missing_says_so(tmp_path):
    write_run(tmp_path / "run", deal(texts(9), 3))
    with pytest.raises(StoreError, match="are not folded yet: start the same command again") as error:
        MeanActivations.load(tmp_path / "run")
    assert not isinstance(error.value, IncompleteStoreError)


def test_unverified_means_are_refused_unless_that_is_allowed(tmp_path):
    write_means(write_run(tmp_path / "run", deal(texts(9), 3), verified=False))
    with pytest.raises(VerificationError, match=r"are not verified: of the 9 samples of d none was computed again alone.*exactiv"):
        MeanActivations.load(tmp_path / "run")
    assert MeanActivations.load(tmp_path / "run", allow_unverified=True).n_samples == 9


def test_one_unverified_part_is_enough_to_refuse(tmp_path):
    start = fold(write_run(tmp_path / "run", deal(texts(9), 3)))
    add(start, write_run(tmp_path / "b", deal(texts(4, seed=1), 1), verified=False)).write(tmp_path / MEANS_FILE)
    with pytest.raises(VerificationError, match="of the 4 samples of d none"):
        MeanActivations.load(tmp_path)
    assert MeanActivations.load(tmp_path, allow_unverified=True).n_samples == 13


def test_a_folder_that_holds_rows_and_no_means_says_how_to_take_them(tmp_path):
    folder = write_run(tmp_path / "run", deal(texts(9), 3), None)
    with pytest.raises(StoreError, match=r"holds rows, and no means of them: exactivations means from-store"):
        MeanActivations.load(tmp_path / "run")
    fold_rows(folder, OPTIONS).write(tmp_path / "elsewhere.safetensors")
    assert MeanActivations.load(tmp_path / "elsewhere.safetensors").n_samples == 9


def test_a_path_that_is_not_there_or_is_no_result_is_told(tmp_path, run):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nothing", tmp_path / "nothing" / "below", tmp_path / "nothing.safetensors", tmp_path / "empty"):
        with pytest.raises(StoreError, match=rf"^{re.escape(str(path))} holds no means: there is no "):
            MeanActivations.load(path)
    with pytest.raises(StoreError, match="is no means file of version 1"):
        MeanActivations.load(RunFolder(run).shard_path(0))
    for name in ("run.json", "samples.parquet"):
        with pytest.raises(ExactivationsError):
            MeanActivations.load(run / name)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small result, and what is in it."""
    path = tmp_path_factory.mktemp("small")
    options = MeanOptions((Vector(("resid_post.0",), "mean"),), "label", 2)
    whole = write_means(write_run(path / "run", deal(texts(4), 2), options))
    return whole, path / "damaged.safetensors"


@settings(max_examples=300, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), part=st.sampled_from(["header", "anywhere"]))
def test_a_flipped_bit_anywhere_in_the_file_is_an_error_and_never_other_values(small, place, bit, part):
    whole, path = small
    damaged = bytearray(whole)
    end = 8 + int.from_bytes(whole[:8], "little") if part == "header" else len(whole)
    damaged[int(place * end)] ^= 1 << bit
    path.write_bytes(damaged)
    with pytest.raises(ExactivationsError):
        MeanActivations.load(path, allow_unverified=True)


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), more=st.binary(max_size=9))
def test_a_file_that_is_cut_off_or_goes_on_is_an_error(small, place, more):
    whole, path = small
    path.write_bytes(whole[: int(place * len(whole))])
    with pytest.raises(ExactivationsError):
        MeanActivations.load(path, allow_unverified=True)
    path.write_bytes(whole + more)
    if more:
        with pytest.raises(ExactivationsError):
            MeanActivations.load(path, allow_unverified=True)
    else:
        assert MeanActivations.load(path).n_samples == 4
