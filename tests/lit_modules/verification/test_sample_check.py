"""Which samples are drawn, and what is said of one that is not what its text gives."""

import json
import re
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exactivations.datamodules.plan import PlanOptions, plan
from exactivations.lit_modules.models.ground_truth import compare, tolerance_for
from exactivations.lit_modules.verification.next_tokens import NextTokens
from exactivations.lit_modules.verification.sample_check import CheckedRun, SampleCheck, SampleResult, summarize
from exactivations.store import ActivationStore
from exactivations.store.shard import open_shard, write_shard
from tests.planted_faults import data_of, extractor_of, run, texts


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def drawing(lengths, options, index=None):
    """As much of a SampleCheck as drawing needs."""
    index = np.arange(len(lengths)) if index is None else np.array(index)
    store = SimpleNamespace(info=SimpleNamespace(keeps_rows=True))
    return SimpleNamespace(
        store=store, data=SimpleNamespace(plan=plan(lengths, options), tokens=SimpleNamespace(sample_index=index))
    )


@st.composite
def drawings(draw):
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=50))
    gaps = draw(st.lists(st.integers(1, 3), min_size=len(lengths), max_size=len(lengths)))  # some samples were skipped
    padding, share = draw(st.sampled_from([("none", 0.05), ("tail", 0.5)]))
    options = PlanOptions(draw(st.integers(1, 100)), draw(st.integers(1, 200)), padding, share)
    check = drawing(lengths, options, np.cumsum(gaps))
    shards = draw(st.lists(st.integers(0, check.data.plan.n_shards - 1), unique=True))
    return check, shards, draw(st.integers(1, 20)), draw(st.integers(0, 3)), draw(st.lists(st.integers(0, 150), max_size=8))


@given(drawn=drawings())
def test_a_draw_is_repeatable_without_doubles_from_its_shards_and_failed_samples_come_first(drawn):
    check, shards, n, seed, failed = drawn
    found = SampleCheck.draw(check, shards, n, seed, first=failed)
    assert found == SampleCheck.draw(check, shards, n, seed, first=failed)
    assert len(set(found)) == len(found) and all(type(i) is int for i in found)
    index, the_plan = check.data.tokens.sample_index.tolist(), check.data.plan
    inside = {index[p] for shard in shards for b in the_plan.batches_of(shard) for p in the_plan.batch(b)}
    again = sorted(inside.intersection(failed))
    assert set(found) <= inside and found[: len(again)] == again
    assert len(found) == min(len(inside), max(n, len(again)))


@given(drawn=drawings())
def test_a_draw_of_ten_holds_all_five_extremes(drawn):
    check, shards, *_ = drawn
    found, the_plan = SampleCheck.draw(check, shards, 10), check.data.plan  # half of them extremes
    position = {int(index): p for p, index in enumerate(check.data.tokens.sample_index)}
    batches = [(b, p) for shard in shards for b in the_plan.batches_of(shard) for p in the_plan.batch(b).tolist()]
    if not batches:
        assert found == []
        return
    drawn_positions = {position[i] for i in found}
    lengths = {p: the_plan.lengths[p] for _, p in batches}
    sizes = {p: len(the_plan.batch(b)) for b, p in batches}
    padding = {p: the_plan.lengths[the_plan.batch(b)].max() - the_plan.lengths[p] for b, p in batches}
    for extreme, values in [(max, lengths), (min, lengths), (max, sizes), (min, sizes), (max, padding)]:
        assert extreme(values[p] for p in drawn_positions) == extreme(values.values())


def test_another_seed_draws_others_and_all_are_drawn_if_so_many_are_asked_for():
    check = drawing([5] * 200, PlanOptions(20, 100))
    shards = list(range(check.data.plan.n_shards))
    assert SampleCheck.draw(check, shards, 20, 0) != SampleCheck.draw(check, shards, 20, 1)
    assert sorted(SampleCheck.draw(check, shards, 1000)) == list(range(200))
    assert SampleCheck.draw(check, [], 5) == SampleCheck.draw(check, shards, 0) == []


ROWS = texts(lengths=[7])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of samples of one length, so that any row fits in any other's place."""
    path = tmp_path_factory.mktemp("run") / "run"
    extractor, data = extractor_of("llama", "float32"), data_of(ROWS)
    run(path, extractor, data)
    return path, extractor, data


@pytest.fixture
def spoilt(finished, tmp_path):
    """Copies the run, lets a test change one sample's part of a shard (checksum and all), and checks that sample."""

    def spoilt(sample, change):
        path, extractor, data = finished
        shutil.copytree(path, tmp_path / "run")
        store = ActivationStore(tmp_path / "run", allow_unverified=True)
        position = store.sample_index.tolist().index(sample)
        shard, row = int(store._shard[position]), int(store._row[position])
        tensors, metadata = open_shard(store.folder.shard_path(shard))
        tensors = {name: values.clone() for name, values in tensors.items()}
        change({name: v[8 * row : 8 * row + 8] if len(v) == tensors["n_tokens"].sum() else v[row] for name, v in tensors.items()})
        del metadata["checksum"]
        write_shard(store.folder.shard_path(shard), tensors, metadata)
        return SampleCheck(ActivationStore(tmp_path / "run", allow_unverified=True), extractor, data).check(sample)

    return spoilt


def test_an_untouched_sample_agrees_in_everything(spoilt):
    result = spoilt(11, lambda part: None)
    assert result.failures == [] and len(result.comparisons) == 15 and all(c.agrees for c in result.comparisons)
    assert all(c.error < 1e-5 for c in result.comparisons), "ten times less than what is allowed"


def test_a_wrong_id_is_found_with_its_place_and_both_ids(spoilt):
    result = spoilt(11, lambda part: part["input_ids"][5].fill_(98))
    (failure,) = result.failures
    assert re.match(
        r"sample 11: its stored ids are not those of its text, from token 5 on \(id 98 in the shard, \d+ in the text", failure
    )


def test_a_wrong_mask_is_found_with_its_place_and_both_counts(spoilt):
    (failure,) = spoilt(11, lambda part: part["token_mask"][3:5].fill_(False)).failures
    assert re.match(r"sample 11: its stored token_mask .* from token 3 on \(5 tokens count there, 7 do\)", failure)


@pytest.mark.parametrize("name", ["embed/mean", "resid_post.1/last", "final_norm/tokens"])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_a_wrong_row_is_found_with_its_activation_and_error(spoilt, name, size):
    def change(part):
        rows = part[name] if name.endswith("tokens") else part[name][None]
        rows[-1] += size * rows[-1].norm() * torch.nn.functional.one_hot(torch.tensor(0), rows.shape[1])

    result = spoilt(11, change)
    (failure,) = result.failures
    assert failure.startswith(f"sample 11: {name} is not what the sample gives alone: relative error {size:.2g}")
    assert ("at token 7" in failure) == name.endswith("tokens")
    assert [c.name for c in result.comparisons if not c.agrees] == [name]


def test_a_wrong_hash_in_the_table_is_found_with_both_hashes(finished, tmp_path):
    path, extractor, data = finished
    shutil.copytree(path, tmp_path / "run")
    table = pq.read_table(tmp_path / "run" / "samples.parquet")
    hashes = table.column("token_hash").to_pylist()
    true, hashes[11] = hashes[11], "0" * 32
    table = table.set_column(table.column_names.index("token_hash"), "token_hash", pa.array(hashes))
    pq.write_table(table, tmp_path / "run" / "samples.parquet")
    check = SampleCheck(ActivationStore(tmp_path / "run", allow_unverified=True), extractor, data)
    (failure,) = check.check(11).failures
    assert failure.startswith(
        f"sample 11 is not the one of this text: it has token hash {'0' * 32} and 8 tokens in the store, {true}"
    )
    assert check.check(10).failures == check.check(12).failures == []


def test_a_sample_that_is_not_in_the_store_or_the_dataset_is_a_failure_and_no_crash(finished):
    path, extractor, data = finished
    check = SampleCheck(ActivationStore(path), extractor, data)
    assert "sample 40 cannot be checked" in check.check(40).failures[0]


def other_sample(finished, sample, name):
    return ActivationStore(finished[0]).read(sample).activations[name]


@pytest.mark.parametrize("name", ["resid_post.1/mean", "resid_post.1/last", "resid_post.1/tokens"])
def test_the_row_of_a_neighbour_is_recognised(spoilt, finished, name):
    plan, (before, after) = finished[2].plan, (10, 12)
    batch = next(plan.batch(b).tolist() for b in range(plan.n_batches) if 11 in plan.batch(b))
    in_batch = next(i for i in batch if i not in (before, 11, after))
    other = [before, after, in_batch][["mean", "last", "tokens"].index(name.rpartition("/")[2])]
    (failure,) = spoilt(11, lambda part: part[name].copy_(other_sample(finished, other, name))).failures
    relation = {before: "the one before in the dataset", after: "the next in the dataset"}.get(other, r"\w.* row .*")
    assert re.search(rf"it looks like sample {other}, {relation}", failure)


@pytest.mark.parametrize("pooling", ["mean", "last", "tokens"])
@pytest.mark.parametrize("other", ["resid_post.0", "resid_post.2", "embed", "final_norm"])
def test_another_hook_point_is_recognised(spoilt, finished, pooling, other):
    rows = other_sample(finished, 11, f"{other}/{pooling}")
    (failure,) = spoilt(11, lambda part: part[f"resid_post.1/{pooling}"].copy_(rows)).failures
    assert failure.endswith(f"it looks like {other} of the same sample")


@pytest.mark.parametrize(("shift", "says"), [(1, "t - 1"), (-1, "t + 1")])
def test_rows_that_are_shifted_are_recognised(spoilt, shift, says):
    (failure,) = spoilt(11, lambda part: part["resid_post.1/tokens"].copy_(part["resid_post.1/tokens"].roll(shift, 0))).failures
    assert f"its rows are shifted: row t holds token {says}" in failure


def test_another_token_of_the_same_sample_is_recognised(spoilt, finished):
    rows = other_sample(finished, 11, "resid_post.1/tokens")
    (failure,) = spoilt(11, lambda part: part["resid_post.1/last"].copy_(rows[3])).failures
    assert "it looks like token 3 of 8 of the same sample" in failure


def test_what_looks_like_nothing_known_is_not_explained(spoilt):
    (failure,) = spoilt(11, lambda part: part["resid_post.1/mean"].normal_()).failures
    assert "looks like" not in failure and "shifted" not in failure


def summary(results, **more):
    return summarize(results, CheckedRun(["embed/mean"], "f", "c", torch.bfloat16, 1.23456, **more))


def test_nothing_checked_is_no_verification():
    verification = summary([])
    assert not verification.passed and verification.failures == ["no sample was checked"]


def test_the_verdict_counts_failures_of_samples_and_others_and_sorts_samples():
    wrong = [SampleResult(i, failures=[f"sample {i}: a", f"sample {i}: b"]) for i in range(120, 0, -1)]
    verification = summary([SampleResult(500), *wrong], damaged={3: "a shard is damaged"})
    assert (verification.passed, verification.n_failures, len(verification.failures)) == (False, 241, 100)
    assert verification.failures[:2] == ["sample 1: a", "sample 1: b"]
    assert verification.samples == [*range(1, 121), 500] and verification.failed_samples == list(range(1, 121))
    assert summary([SampleResult(3)]).passed and not summary([SampleResult(3)], damaged={0: "x"}).passed


def test_figures_that_are_not_finite_fail_and_still_fit_into_strict_json():
    """A head that overflows float16 (the model's own prediction is NaN then), and a truth that does."""
    inf, nan = float("inf"), float("nan")
    true = torch.tensor([[inf, 1.0]], dtype=torch.float64)
    compared = compare("embed/mean", 4, torch.ones(1, 2), true, true, torch.ones_like(true), [torch.float16])
    allowed = tolerance_for([torch.float16], nan)
    head = NextTokens("final_norm/last", 4, 1, 0, difference=inf, error=inf, rounding=nan, tolerance=allowed)
    assert not compared.agrees and not head.agrees
    verification = summary([SampleResult(4, [compared], [head], ["sample 4: wrong"])])
    json.dumps(asdict(verification), allow_nan=False)
    assert verification.figures[0].worst_error is None and verification.next_tokens[0].largest_difference == 1.0


def test_small_draws_of_other_seeds_are_other_samples_and_large_ones_spread_over_the_shards(finished):
    path, extractor, data = finished
    store = ActivationStore(path, allow_unverified=True)
    check = SampleCheck(store, extractor, data)
    shards = sorted(store.published)
    assert len({tuple(check.draw(shards, 2, seed)) for seed in range(8)}) > 4
    shard_of = dict(zip(data.tokens.sample_index.tolist(), data.plan.shard_of_sample.tolist(), strict=True))
    for seed in range(4):
        drawn = check.draw(shards, 2 * len(shards), seed)
        assert {shard_of[index] for index in drawn} == set(shards)
