"""means.safetensors: the same shards give the same bytes, however they were written, added or merged; what differs is refused."""

import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from exactivations.lit_modules.models.ground_truth import pool_by_definition
from exactivations.store.errors import (
    ExactivationsError,
    IdentityError,
    IncompleteStoreError,
    InvalidInputError,
    StoreError,
    VerificationError,
)
from exactivations.store.means_file import duplicates, read_means
from exactivations.store.means_fold import fold, fold_rows
from exactivations.store.means_join import add, merge
from exactivations.store.run_folder import MEANS_FILE, RunFolder, RunInfo, contents_of
from exactivations.store.shard import write_shard
from exactivations.store.shard_content import ShardContent
from exactivations.store.shard_sums import Groups, MeanOptions, to_tensors
from exactivations.store.vectors import Vector
from exactivations.store.verification import write_verification
from tests.store.stores import verdict

POINTS, WIDTH = ("resid_post.0", "resid_post.1"), 3
POOLINGS = ("last", "first", "mean", "max", "exp_decay:0.023", "exp_decay:0.067", "exp_decay:0.159")
IDENTITY = {
    "model": "m", "weights": "w1", "tokenizer": "t", "dtype": "float32", "store_dtype": "float32", "max_length": 512,
    "token_mask": "content", "dataset": "d", "n_samples": 0, "token_budget": 64, "hook_points": list(POINTS), "torch": "2.0",
    "device_type": "cpu", "cpu_threads": 1,
}  # fmt: skip
VECTORS = (
    Vector(POINTS, "short"), Vector(POINTS[:1], "long"), *(Vector(POINTS[:1], name) for name in ("mean", "last", "first", "max")),
)  # fmt: skip
OPTIONS = MeanOptions(VECTORS, "label", 6)


@dataclass
class Text:
    """A sample with its states [L, D] at each hook point."""

    index: int
    ids: list
    mask: torch.Tensor
    label: object
    states: dict

    @property
    def token_hash(self):
        return xxhash.xxh3_128(np.array(self.ids, dtype="<i4").tobytes()).hexdigest()

    def stored(self, name, dtype):
        point, pooling = name.split("/")
        return pool_by_definition(self.states[point], self.mask, pooling).to(dtype)


def texts(n, seed=0, labels=("a", "b"), first_index=0, longest=9, dtype=torch.float32):
    """Samples of random lengths, masks (special tokens anywhere) and states that are exact in the dtype."""
    dice, found = np.random.default_rng((seed, n)), []
    for i in range(n):
        length = int(dice.integers(1, longest + 1))
        mask = dice.random(length) < dice.choice([0.5, 1.0])
        mask[dice.integers(length)] = True
        states = {point: torch.from_numpy(dice.normal(size=(length, WIDTH)) * 4 + 9).to(dtype) for point in POINTS}
        ids = dice.integers(0, 50_000, length).tolist()
        found.append(Text(first_index + i, ids, torch.from_numpy(mask), labels[int(dice.integers(len(labels)))], states))
    return found


def tensors_of(shard, names, dtype):
    tensors = {
        "sample_index": torch.tensor([text.index for text in shard]),
        "n_tokens": torch.tensor([len(text.ids) for text in shard], dtype=torch.int32),
        "input_ids": torch.tensor([i for text in shard for i in text.ids], dtype=torch.int32),
        "token_mask": torch.cat([text.mask for text in shard]),
    }
    return tensors | {name: torch.cat([text.stored(name, dtype) for text in shard]) for name in names}


def write_run(
    path, shards, options=OPTIONS, *, keeps_rows=True, order=None, leave_out=(), verified=True,
    stored_as=torch.float32, about=None, when="2026-01-01", **identity,
):  # fmt: skip
    """Writes a finished, verified run as a writer leaves it, without the fold; options None keeps rows only."""
    folder = RunFolder(path)
    everything = sorted((text for shard in shards for text in shard), key=lambda text: text.index)
    places = {text.index: (number, row) for number, shard in enumerate(shards) for row, text in enumerate(shard)}
    groups = Groups.of([text.label for text in everything], np.array([text.index for text in everything]), "label")
    names = [f"{point}/{pooling}" for point in POINTS for pooling in (*POOLINGS, "tokens")]
    identity = {**IDENTITY, "n_samples": len(everything), "store_dtype": str(stored_as).removeprefix("torch."), **identity}
    if options is not None:
        grouped = options.group_column is not None
        identity["means"] = {
            **options.to_json(), "groups": groups.names if grouped else [], "groups_digest": groups.digest if grouped else None,
            "keeps_rows": keeps_rows,
        }  # fmt: skip
    n_tokens = sum(len(text.ids) for text in everything)
    about = {"model": "m", "dataset": "d", "started": when, **(about or {})}
    info = RunInfo(
        identity, about, len(shards), len(everything), n_tokens, n_tokens,
        {name: {"per_token": name.endswith("/tokens"), "width": WIDTH, "dtype": identity["store_dtype"]} for name in names},
    )  # fmt: skip
    table = pa.table(
        {
            "sample_index": np.array([text.index for text in everything], dtype=np.int64),
            "n_tokens": np.array([len(text.ids) for text in everything], dtype=np.int32),
            "token_hash": [text.token_hash for text in everything],
            "truncated": [False] * len(everything),
            "shard": np.array([places[text.index][0] for text in everything], dtype=np.int32),
            "row": np.array([places[text.index][1] for text in everything], dtype=np.int32),
            "label": [text.label for text in everything],
        }
    )
    path.mkdir(parents=True)
    folder.prepare(info, [table], overwrite=False, allow_changed=frozenset())
    number_of = {text.index: number for text, number in zip(everything, groups.numbers, strict=True)}
    content = options and ShardContent(
        options,
        (lambda shard: Groups(groups.names, np.array([number_of[text.index] for text in shards[shard]])))
        if options.group_column
        else None,
        None if keeps_rows else lambda shard: np.arange(min(2, len(shards[shard]))),
    )
    for shard in order or range(len(shards)):
        if shard not in leave_out:
            tensors = tensors_of(shards[shard], names, stored_as)
            tensors = content.of(shard, tensors) if content else tensors
            write_shard(folder.shard_path(shard), tensors, {"shard": shard, "fingerprint": info.fingerprint})
    if verified:
        contents = contents_of(folder.checksums(info), folder.samples_footer())
        write_verification(folder, verdict(info.fingerprint, contents=contents, when=when))
    return folder


def write_means(folder):
    """Folds a run and returns the bytes of its result."""
    fold(folder).write(folder.path / MEANS_FILE)
    return (folder.path / MEANS_FILE).read_bytes()


def deal(all_texts, n_shards, seed=0):
    """Deals texts to shards at random, none of them empty."""
    order = np.random.default_rng(seed).permutation(len(all_texts))
    return [[all_texts[i] for i in part] for part in np.array_split(order, n_shards)]


def bits(sums):
    return {name: values.contiguous().numpy().tobytes() for name, values in to_tensors(sums).items()}


def rows_by_definition(all_texts, vector, dtype=torch.float32):
    """float64 [n, d], from the stored values, layers averaged, poolings concatenated."""
    parts = {"short": ["exp_decay:0.067"], "long": ["last", "exp_decay:0.023", "exp_decay:0.067", "exp_decay:0.159"]}
    out = []
    for text in all_texts:
        row = []
        for pooling in parts.get(vector.pooling, [vector.pooling]):
            layers = [text.stored(f"{point}/{pooling}", dtype)[0].double().numpy() for point in vector.hook_points]
            row.append(np.mean(layers, axis=0))
        out.append(np.concatenate(row))
    return np.array(out)


def check_against_whole_data(sums, groups, all_texts, vectors=VECTORS):
    for vector in vectors:
        rows = rows_by_definition(all_texts, vector)
        bins = [(sums[vector.name], 0, rows)]
        for number, name in enumerate(groups):
            bins.append((sums[vector.name + "@groups"], number, rows[[text.label == name for text in all_texts]]))
        for moments, number, mine in bins:
            assert moments.count[number] == len(mine)
            assert (np.abs(moments.total[number] - mine.sum(axis=0)) <= 1e-12 * np.abs(mine).sum(axis=0)).all()
            if len(mine) > 1:
                assert np.allclose(moments.variance[number], mine.var(axis=0, ddof=1), rtol=1e-12, atol=1e-12)


# --- folding -----------------------------------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32), keeps_rows=st.booleans(), data=st.data())
def test_shards_written_in_any_order_fold_to_the_same_bytes_and_to_the_whole_data(tmp_path_factory, seed, keeps_rows, data):
    tmp_path, everything = tmp_path_factory.mktemp("runs"), texts(17, seed)
    shards = deal(everything, 4, seed)
    order = data.draw(st.permutations(range(4)))
    first = write_means(write_run(tmp_path / "a", shards, keeps_rows=keeps_rows))
    assert write_means(write_run(tmp_path / "b", shards, keeps_rows=keeps_rows, order=order)) == first
    found = read_means(tmp_path / "b")
    assert found.n_samples == 17 and found.groups == sorted({text.label for text in everything})
    check_against_whole_data(found.sums, found.groups, everything)


def test_neither_the_folders_name_nor_dates_nor_versions_are_in_the_bytes(tmp_path):
    shards = deal(texts(9), 2)
    first = write_means(write_run(tmp_path / "a", shards))
    again = write_run(tmp_path / "elsewhere" / "b", shards, when="2031-12-31", about={"versions": {"numpy": "9"}})
    assert write_means(again) == first
    assert write_means(again) == first, "folding a second time changes nothing"
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert write_means(RunFolder(tmp_path / "copy")) == first
    assert str(tmp_path).encode() not in first


def test_what_is_written_is_read(tmp_path):
    result = fold(write_run(tmp_path / "a", deal(texts(9), 2)))
    result.write(tmp_path / "means.safetensors")
    found = read_means(tmp_path / "means.safetensors")
    assert bits(found.sums) == bits(result.sums)
    for name in ("identity", "about", "options", "groups", "parts"):
        assert getattr(found, name) == getattr(result, name)
    for name in ("token_hash", "sample_index", "part"):
        ours, other = getattr(result, name), getattr(found, name)
        assert ours.dtype == other.dtype and np.array_equal(ours, other)


def test_a_result_lists_its_samples_in_dataset_order_with_the_hash_of_their_tokens(tmp_path):
    everything = texts(9, first_index=5)
    found = fold(write_run(tmp_path / "a", deal(everything, 3)))
    assert found.sample_index.tolist() == list(range(5, 14))
    assert [bytes(key).hex() for key in found.token_hash] == [text.token_hash for text in everything]
    assert found.part.tolist() == [0] * 9
    (part,) = found.parts
    assert (part.n_samples, part.n_tokens, part.dataset) == (9, sum(len(text.ids) for text in everything), "d")
    assert part.verified
    assert "dataset" not in found.identity and "torch" not in found.identity and "means" not in found.identity
    assert found.identity["weights"] == "w1"


def test_a_run_that_was_not_verified_or_was_changed_afterwards_says_so_in_its_part(tmp_path):
    assert not fold(write_run(tmp_path / "a", deal(texts(9), 2), verified=False)).parts[0].verified
    ungrouped = replace(OPTIONS, group_column=None)
    changed = write_run(tmp_path / "b", deal(texts(9), 2), ungrouped)
    other = write_run(tmp_path / "c", deal(texts(9, seed=1), 2), ungrouped)
    assert changed.read_info().fingerprint == other.read_info().fingerprint
    shutil.copy(other.shard_path(1), changed.shard_path(1))
    assert not fold(changed).parts[0].verified


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_of_stored_rows_have_the_bits_of_those_that_were_taken_on_the_way(tmp_path, dtype):
    shards = deal(texts(20, dtype=dtype), 3)
    options = MeanOptions(tuple(vector for vector in VECTORS), "label", 4)
    on_the_way = fold(write_run(tmp_path / "a", shards, options, stored_as=dtype, keeps_rows=False))
    beside_rows = fold(write_run(tmp_path / "b", shards, options, stored_as=dtype))
    from_rows = fold_rows(write_run(tmp_path / "c", shards, None, stored_as=dtype), options)
    from_rows_with_sums = fold_rows(RunFolder(tmp_path / "b"), options)
    for other in (beside_rows, from_rows, from_rows_with_sums):
        assert bits(other.sums) == bits(on_the_way.sums)
        assert (other.identity, other.groups, other.options) == (on_the_way.identity, on_the_way.groups, on_the_way.options)
        assert np.array_equal(other.token_hash, on_the_way.token_hash)
        assert other.parts[0].verified


def test_means_of_rows_need_rows_what_the_vectors_need_and_the_column(tmp_path):
    rows = write_run(tmp_path / "a", deal(texts(9), 2), None)
    with pytest.raises(InvalidInputError, match=r"the means need resid_post\.9/mean, extracted are resid_post\.0/last"):
        fold_rows(rows, MeanOptions((Vector(("resid_post.9",), "mean"),)))
    with pytest.raises(InvalidInputError, match=r"has no column 'kind' to group by; it has sample_index, .*, label$"):
        fold_rows(rows, MeanOptions(VECTORS, "kind"))
    with pytest.raises(StoreError, match="keeps means only, and not the rows"):
        fold_rows(write_run(tmp_path / "b", deal(texts(9), 2), keeps_rows=False), OPTIONS)


def fold_any(folder):
    return fold(folder)


def fold_stored_rows(folder):
    return fold_rows(folder, MeanOptions(VECTORS, "label", 6))


def add_to_another(folder):
    other = write_run(folder.path.with_name("before"), deal(texts(7, seed=99), 2))
    return add(fold(other), folder)


WAYS = [fold_any, fold_stored_rows, add_to_another]


@pytest.mark.parametrize("way", WAYS)
def test_a_run_of_which_a_shard_is_missing_is_refused(tmp_path, way):
    with pytest.raises(IncompleteStoreError, match=r"run is not complete: 1 of 3 shards are missing"):
        way(write_run(tmp_path / "run", deal(texts(9), 3), leave_out=(1,)))


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_failed_its_verification_is_refused(tmp_path, way):
    folder = write_run(tmp_path / "run", deal(texts(9), 3))
    fingerprint = folder.read_info().fingerprint
    write_verification(folder, verdict(fingerprint, False, failures=["sample 5: resid_post.0/mean is wrong"], n_failures=1))
    with pytest.raises(VerificationError, match=r"sample 5: resid_post\.0/mean is wrong"):
        way(folder)


@pytest.mark.parametrize(
    ("way", "name"),
    [
        (fold_any, "sums/resid_post.0/mean/total"),
        (add_to_another, "sums/resid_post.0/mean/total"),
        (fold_stored_rows, "resid_post.0/mean"),
    ],
)
def test_a_shard_with_one_flipped_bit_is_refused_and_not_folded_into_other_means(tmp_path, way, name):
    """In a verified run: its verdict looks at the checksums in the headers, which a flipped bit of the content leaves alone."""
    folder = write_run(tmp_path / "run", deal(texts(9), 3))
    path = folder.shard_path(1)
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    _, end = json.loads(content[8 : 8 + size])[name]["data_offsets"]
    content[8 + size + end - 2] ^= 0x08  # a bit of the last number
    path.write_bytes(content)
    with pytest.raises(ExactivationsError, match=r"00001\.safetensors is damaged"):
        way(folder)


# --- adding ------------------------------------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32), cuts=st.tuples(st.integers(1, 4), st.integers(1, 4)), keeps_rows=st.booleans())
def test_a_run_added_to_another_gives_the_bits_of_one_run_of_the_shards_of_both(tmp_path_factory, seed, cuts, keeps_rows):
    """Groups that only one of them has, in between and at either end of the sorted names, included."""
    tmp_path = tmp_path_factory.mktemp("runs")
    ours, other = texts(11, seed, ("b", "c", "x")), texts(13, seed + 1, ("a", "c", "y"), first_index=11)
    first, second = deal(ours, cuts[0], seed), deal(other, cuts[1], seed)
    start = fold(write_run(tmp_path / "a", first, keeps_rows=keeps_rows))
    before = bits(start.sums)
    added = add(start, write_run(tmp_path / "b", second, keeps_rows=keeps_rows))
    one = fold(write_run(tmp_path / "ab", [*first, *second], keeps_rows=keeps_rows))
    assert bits(added.sums) == bits(one.sums)
    assert added.groups == one.groups
    assert np.array_equal(added.token_hash, one.token_hash) and np.array_equal(added.sample_index, one.sample_index)
    assert added.part.tolist() == [0] * 11 + [1] * 13 and [part.n_samples for part in added.parts] == [11, 13]
    assert bits(start.sums) == before and len(start.parts) == 1, "what was added to stays as it was"


def test_three_runs_added_one_after_the_other_give_the_bits_of_one_also_through_files(tmp_path):
    parts = [deal(texts(8, i, ("a", "b", f"only {i}"), first_index=8 * i), 2, i) for i in range(3)]
    write_means(write_run(tmp_path / "0", parts[0]))
    for i in (1, 2):
        add(read_means(tmp_path / "0"), write_run(tmp_path / str(i), parts[i])).write(tmp_path / "0" / MEANS_FILE)
    found = read_means(tmp_path / "0")
    one = fold(write_run(tmp_path / "all", [shard for part in parts for shard in part]))
    assert bits(found.sums) == bits(one.sums)
    assert found.groups == one.groups and found.n_samples == one.n_samples == 24
    assert found.part.tolist() == [0] * 8 + [1] * 8 + [2] * 8


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32), n_parts=st.integers(2, 4))
def test_merged_results_are_the_whole_data(tmp_path_factory, seed, n_parts):
    tmp_path = tmp_path_factory.mktemp("runs")
    parts = [texts(7 + i, seed + i, ("b", f"g{i}"), first_index=20 * i) for i in range(n_parts)]
    results = [fold(write_run(tmp_path / str(i), deal(part, 2, seed))) for i, part in enumerate(parts)]
    merged = merge(results)
    everything = [text for part in parts for text in part]
    assert merged.groups == sorted({text.label for text in everything})
    check_against_whole_data(merged.sums, merged.groups, everything)
    assert merged.part.tolist() == [i for i, part in enumerate(parts) for _ in part]
    positions = merged.sums["resid_post.0@positions"]
    counts = [sum(int(text.mask.sum()) > position for text in everything) for position in range(6)]
    assert positions.count.tolist() == counts
    if n_parts > 2:
        in_two_steps = merge([merge(results[:2]), *results[2:]])
        assert bits(in_two_steps.sums) == bits(merged.sums)
        assert in_two_steps.parts == merged.parts and np.array_equal(in_two_steps.part, merged.part)


def test_one_result_merged_alone_stays_as_it_is(tmp_path):
    result = fold(write_run(tmp_path / "a", deal(texts(9), 2)))
    assert bits(merge([result]).sums) == bits(result.sums) and merge([result]).parts == result.parts


# --- what is refused ---------------------------------------------------------------------------------------------------


def both_ways(ours, folder, **options):
    """Adding the run's shards, and merging its result."""
    return [lambda: add(ours, folder, **options), lambda: merge([ours, fold(folder)], **options)]


def test_a_sample_that_is_there_already_is_refused_by_its_tokens_and_both_are_named(tmp_path):
    ours, other = texts(9, first_index=100), texts(9, seed=1, first_index=500)
    other[4].ids = list(ours[7].ids)
    other[4].mask, other[4].states = ours[7].mask, ours[7].states
    start = fold(write_run(tmp_path / "a", deal(ours, 2), about={"dataset": "first.jsonl"}))
    folder = write_run(tmp_path / "b", deal(other, 2), about={"dataset": "second.jsonl"})
    for way in both_ways(start, folder):
        with pytest.raises(
            InvalidInputError, match=r"1 of 9 samples are in the means already.*: sample 504 is sample 107 of first"
        ):
            way()
    for way in both_ways(start, folder, allow_duplicates=True):
        found = way()
        assert found.n_samples == 18
        check_against_whole_data(found.sums, found.groups, [*ours, *other])


def test_a_sample_of_a_later_part_is_named_with_that_part(tmp_path):
    start = fold(write_run(tmp_path / "a", deal(texts(5, 0), 1), about={"dataset": "first"}))
    second = texts(5, 1)
    both = add(start, write_run(tmp_path / "b", deal(second, 1), about={"dataset": "second", "config": "en", "split": "train"}))
    third = [*texts(4, 2), replace(second[3], index=77)]
    with pytest.raises(InvalidInputError, match=r"sample 77 is sample 3 of second en train\. Leave them out"):
        add(both, write_run(tmp_path / "c", deal(third, 1)))


def test_the_same_run_twice_is_always_refused(tmp_path):
    """Also where duplicates are allowed: a command that is started again must not count its samples again."""
    folder = write_run(tmp_path / "a", deal(texts(9), 2))
    start = fold(folder)
    for way in (*both_ways(start, folder), *both_ways(start, folder, allow_duplicates=True)):
        with pytest.raises(InvalidInputError, match=r"the 9 samples of d are in the means already, of this very run"):
            way()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 12), m=st.integers(1, 12))
def test_duplicates_are_found_by_all_sixteen_bytes(data, n, m):
    """Of few values, NUL among them, so that nearly equal keys are common."""
    few = st.lists(st.sampled_from([0, 0, 0, 1, 255]), min_size=16, max_size=16)
    there, now = [np.array(data.draw(st.lists(few, min_size=k, max_size=k)), dtype=np.uint8) for k in (n, m)]
    result = type("Result", (), {"token_hash": there})
    keys = {bytes(key) for key in there}
    assert duplicates(result, now).tolist() == [i for i, key in enumerate(now) if bytes(key) in keys]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "another"), ("weights", "w2"), ("tokenizer", "t2"), ("dtype", "bfloat16"), ("max_length", 256),
        ("token_mask", "all"), ("padding_side", "left"),
    ],
)  # fmt: skip
def test_another_model_dtype_or_text_option_is_refused_with_both_values(tmp_path, field, value):
    start = fold(write_run(tmp_path / "a", deal(texts(5), 1)))
    folder = write_run(tmp_path / "b", deal(texts(5, 1), 1), **{field: value})
    for way in both_ways(start, folder):
        with pytest.raises(IdentityError) as error:
            way()
        (line,) = [line for line in str(error.value).splitlines() if line.startswith("  ")]
        assert line.strip().startswith(f"{field}: {IDENTITY.get(field)!r} in the means, {value!r} in ")


def test_every_field_that_differs_is_named(tmp_path):
    start = fold(write_run(tmp_path / "a", deal(texts(5), 1)))
    folder = write_run(tmp_path / "b", deal(texts(5, 1), 1), stored_as=torch.bfloat16, weights="w2", max_length=1)
    for way in both_ways(start, folder):
        with pytest.raises(IdentityError) as error:
            way()
        fields = [line.strip().partition(":")[0] for line in str(error.value).splitlines() if line.startswith("  ")]
        assert fields == ["max_length", "store_dtype", "weights"]


def test_another_dataset_plan_or_machine_is_no_reason_to_refuse(tmp_path):
    start = fold(write_run(tmp_path / "a", deal(texts(5), 1)))
    folder = write_run(
        tmp_path / "b", deal(texts(5, 1), 1), dataset="e", token_budget=7, torch="2.9", device_type="cuda", cpu_threads=8,
        hook_points=["resid_post.0", "resid_post.1", "embed"],
    )  # fmt: skip
    for way in both_ways(start, folder):
        assert way().n_samples == 10


@pytest.mark.parametrize(
    "options",
    [
        MeanOptions(VECTORS[:-1], "label", 6),
        MeanOptions(VECTORS[::-1], "label", 6),
        MeanOptions(VECTORS, None, 6),
        MeanOptions(VECTORS, "label", 5),
        MeanOptions(VECTORS, "label", 0),
    ],
    ids=["fewer vectors", "another order", "no groups", "fewer positions", "no positions"],
)
def test_other_vectors_groups_or_positions_are_refused_and_both_are_told(tmp_path, options):
    start = fold(write_run(tmp_path / "a", deal(texts(5), 1)))
    folder = write_run(tmp_path / "b", deal(texts(5, 1), 1), options)
    for way in both_ways(start, folder):
        with pytest.raises(IdentityError, match="not of the same vectors") as error:
            way()
        one, other = str(error.value).splitlines()[1:]
        told = ", ".join(vector.name for vector in options.vectors)
        assert other.strip().startswith(f"{told}{' by label' if options.group_column else ''}, {options.n_positions} positions")
        assert one.strip().startswith(", ".join(vector.name for vector in VECTORS) + " by label, 6 positions")


def test_a_result_that_was_refused_is_left_as_it_was(tmp_path):
    before = write_means(write_run(tmp_path / "a", deal(texts(5), 1)))
    for number, changes in enumerate(({"weights": "w2"}, {"leave_out": (0,)}, {"options": MeanOptions(VECTORS)})):
        folder = write_run(tmp_path / f"b{number}", deal(texts(5, 1), 2), **changes)
        with pytest.raises(ExactivationsError):
            add(read_means(tmp_path / "a"), folder)
    assert (tmp_path / "a" / MEANS_FILE).read_bytes() == before
