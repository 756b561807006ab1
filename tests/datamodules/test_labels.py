"""Labels come to the samples they were made for, whatever the order of a file, or not at all."""

import csv
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import LabelEncoder

from exactivations.datamodules.labels import labels_of, token_labels_of
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError
from tests.store.stores import make_store

INDEX = [3, 4, 7, 10, 11, 25]
LENGTHS = [2, 1, 4, 3, 1, 2]
TEXT = ["b", "a", "01", "a", "1", "é"]
NAMES = {"final_norm/last": 2}
SUFFIXES = [".jsonl", ".csv", ".parquet"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    columns = {
        "text_label": TEXT,
        "flag": [True, False, False, True, False, True],
        "number": [10, 2, -1, 2, 10, 10],
        "score": [0.5, -0.0, 0.0, 2.0, 0.5, 1e-3],
        "mixed": ["a", None, "b", None, "a", "b"],
        "same": [1] * 6,
        "nan": [0.0, math.nan, 1.0, math.inf, 2.0, 3.0],
        "tags": [["x", None], ["y"], ["x", "x", "y", "z"], [None, None, None], ["z"], ["y", "x"]],
        "short": [["x", "y"], ["y"], ["x", "x", "y"], [None, None, None], [], ["y", "x"]],
    }
    path = tmp_path_factory.mktemp("runs") / "store"
    make_store(path, INDEX, LENGTHS, names=NAMES, token_hash=[f"0{i}" for i in INDEX], **columns)
    return ActivationStore(path)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Enough samples for too many classes."""
    n = 1001
    path = tmp_path_factory.mktemp("runs") / "large"
    make_store(path, list(range(n)), [1] * n, names=NAMES, id=[f"id{i}" for i in range(n)], value=[i / 8 for i in range(n)])
    return ActivationStore(path)


def write(path, rows):
    """Rows (dicts with the same keys) as a file."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return path


def rows_of(labels, *keys, index=INDEX):
    own = {"sample_index": list(index), "token_hash": [f"0{i}" for i in index]}
    return [{**{key: own[key][at] for key in keys}, "label": label} for at, label in enumerate(labels)]


def refused(call, *parts):
    with pytest.raises(InvalidInputError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# --- a kept column


def test_classes_of_text_bools_and_numbers_are_sorted_and_numbered_like_scikit_learn_does(store):
    for column, classes in (
        ("text_label", ["01", "1", "a", "b", "é"]),
        ("flag", ["False", "True"]),
        ("number", ["-1", "2", "10"]),
        ("score", ["0.0", "0.001", "0.5", "2.0"]),
    ):
        labels = labels_of(store, column)
        assert (labels.name, labels.kind, labels.classes, labels.values) == (column, "classes", classes, None)
        assert labels.numbers.dtype == np.int64
        oracle = LabelEncoder().fit_transform(store.samples.column(column).to_numpy())
        np.testing.assert_array_equal(labels.numbers, oracle)


def test_floats_with_many_values_are_values_and_few_are_classes_unless_asked(store, large):
    values = labels_of(large, "value")
    assert (values.kind, values.classes, values.numbers) == ("values", [], None)
    assert values.values.dtype == np.float64
    np.testing.assert_array_equal(values.values, np.arange(1001) / 8)
    np.testing.assert_array_equal(labels_of(store, "score", kind="values").values, [0.5, 0, 0, 2, 0.5, 1e-3])
    np.testing.assert_array_equal(labels_of(store, "number", kind="values").values, [10, 2, -1, 2, 10, 10])


@pytest.mark.parametrize("n_values, kind", [(20, "classes"), (21, "values")])
def test_auto_takes_floats_with_more_than_20_values_for_values(tmp_path, large, n_values, kind):
    path = write(tmp_path / "a.jsonl", [{"sample_index": i, "label": (i % n_values) / 4} for i in range(1001)])
    labels = labels_of(large, "label", path)
    assert labels.kind == kind
    as_classes = labels_of(large, "label", path, kind="classes")
    assert as_classes.classes == [str(i / 4) for i in range(n_values)]
    np.testing.assert_array_equal(as_classes.numbers, np.arange(1001) % n_values)


def test_a_kept_column_is_refused_if_it_cannot_be_labels(store, large):
    refused(lambda: labels_of(store, "typo"), "no column 'typo'", "text_label", "sample_index")
    refused(lambda: labels_of(store, "mixed"), "sample 4 has no label", "(2 of 6 samples)")
    refused(lambda: labels_of(store, "same"), "every label is 1", "two different")
    refused(lambda: labels_of(store, "nan"), "sample 4 has nan", "2 are not finite")
    refused(lambda: labels_of(store, "tags"), "sample 3 has ['x', None], of type list", "token_labels_of")
    refused(lambda: labels_of(store, "text_label", kind="values"), "sample 3 has 'b', text", 'kind="classes"')
    refused(lambda: labels_of(store, "flag", kind="values"), "sample 3 has True, a bool")
    refused(lambda: labels_of(store, "flag", kind="floats"), "kind", "'floats'")
    refused(lambda: labels_of(large, "id"), "1,001 different labels", "1,000 at most", "is it an id?")
    refused(lambda: labels_of(large, "value", kind="classes"), "1,001 different labels", 'kind="values"')


# --- a file


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_order_and_the_format_of_a_file_change_nothing(tmp_path_factory, store, data):
    strategy = data.draw(
        st.sampled_from([st.sampled_from(["a", "b", "01", "x,\n\"y'", "NA", "é"]), st.integers(-5, 12), st.booleans()])
    )
    labels = data.draw(st.lists(strategy, min_size=6, max_size=6).filter(lambda found: len(set(found)) > 1))
    keys = data.draw(st.sampled_from([("sample_index",), ("token_hash",), ("token_hash", "sample_index")]))
    rows = data.draw(st.permutations(rows_of(labels, *keys)))
    path = write(tmp_path_factory.mktemp("files") / f"a{data.draw(st.sampled_from(SUFFIXES))}", rows)
    found = labels_of(store, "label", path)
    assert [found.classes[number] for number in found.numbers] == [str(label) for label in labels]
    assert found.classes == [str(label) for label in sorted(set(labels))]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_real_values_come_from_every_format_exactly(tmp_path, store, suffix):
    values = [0.1, 1e-300, -2.5, 3.0, 1 / 3, 7e20]
    path = write(tmp_path / f"a{suffix}", rows_of(values, "token_hash")[::-1])
    np.testing.assert_array_equal(labels_of(store, "label", path, kind="values").values, values)
    assert labels_of(store, "label", path).classes == [str(value) for value in sorted(values)]


def test_whole_numbers_among_floats_are_floats_as_json_writes_them(tmp_path, store):
    path = write(tmp_path / "a.jsonl", rows_of([1, 0.5, 2, 0.5, 1.0, 2.0], "sample_index"))
    assert labels_of(store, "label", path).classes == ["0.5", "1.0", "2.0"]
    path = write(tmp_path / "b.jsonl", rows_of([2**53 + 1, 0.5, 2, 0.5, 1.0, 2.0], "sample_index"))
    refused(lambda: labels_of(store, "label", path), "sample 3 has 9007199254740993", "is it an id?")
    path = write(tmp_path / "c.jsonl", rows_of([2**53 + 1, 2**53, 2, 0, 1, 2], "sample_index"))
    assert len(labels_of(store, "label", path).classes) == 5
    refused(lambda: labels_of(store, "label", path, kind="values"), "sample 3 has 9007199254740993", "1 such")


def test_texts_of_a_csv_stay_apart_where_numbers_would_not(tmp_path, store):
    for texts in (["01", "1", "1", "1", "1", "1"], ["1e5", "1e5", "x", "x", "x", "x"], [f"{'9' * 18}{i}" for i in range(6)]):
        path = write(tmp_path / "a.csv", rows_of(texts, "sample_index"))
        assert labels_of(store, "label", path).classes == sorted(set(texts))


def test_blank_lines_bom_and_line_ends_of_other_systems_do_no_harm(tmp_path, store):
    path = tmp_path / "a.csv"
    lines = ["\ufefflabel,note,token_hash", *(f"{'ab'[i % 2]},,0{i}" for i in INDEX), "", ""]
    path.write_bytes("\r\n".join(lines).encode())
    expected = [i % 2 for i in INDEX]
    assert labels_of(store, "label", path).numbers.tolist() == expected
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        "\r\n\n".join(json.dumps({"sample_index": i, "label": "ab"[i % 2] + "\u2028"}, ensure_ascii=False) for i in INDEX).encode()
    )
    assert labels_of(store, "label", path).numbers.tolist() == expected


def test_parquet_categories_and_folders_named_like_columns_are_read_as_they_are(tmp_path, store):
    folder = tmp_path / "label=9"
    folder.mkdir()
    path = folder / "a.parquet"
    pd.DataFrame({"sample_index": np.array(INDEX, dtype=np.uint16), "label": pd.Categorical(TEXT)}).to_parquet(path)
    labels = labels_of(store, "label", path)
    assert [labels.classes[number] for number in labels.numbers] == TEXT


def test_samples_with_the_same_tokens_share_the_label_of_their_hash(tmp_path):
    make_store(tmp_path / "store", [0, 1, 2], [1, 1, 1], n_shards=1, names=NAMES, token_hash=["x", "y", "x"])
    store = ActivationStore(tmp_path / "store")
    rows = [{"token_hash": "y", "label": "of y"}, {"token_hash": "x", "label": "of x"}]
    assert labels_of(store, "label", write(tmp_path / "a.jsonl", rows)).numbers.tolist() == [0, 1, 0]
    path = write(tmp_path / "b.jsonl", [*rows, rows[1]])
    refused(
        lambda: labels_of(store, "label", path),
        "token_hash x is listed twice",
        "entries 2 and 3",
        "(1 of 2 keys)",
        "sample_index",
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_keys_that_are_not_the_stores_are_refused(tmp_path, store, suffix):
    def file(rows):
        path = write(tmp_path / f"a{suffix}", rows)
        return lambda: labels_of(store, "label", path)

    both = rows_of(TEXT, "sample_index", "token_hash")
    by_index, by_hash = rows_of(TEXT, "sample_index"), rows_of(TEXT, "token_hash")
    refused(file(by_index[:2] + by_index[3:5]), "sample 7 of", "is not in it", "(2 of 6 samples)")
    refused(file(by_hash[:5]), "sample 25 of", "(1 of 6 samples)")
    refused(
        file([*by_index, by_index[1], by_index[1], by_index[2]]), "sample_index 4 is listed", "entries 2 and 7", "(2 of 6 keys)"
    )
    refused(
        file(rows_of(TEXT, "sample_index", index=range(3, 9))), "sample_index 5 is no sample", "(3 of 6 entries)", "another dataset"
    )
    refused(file(rows_of(TEXT, "token_hash", index=range(100, 106))), "token_hash 0100 is no sample", "(6 of 6 entries)")
    both[1]["token_hash"], both[2]["token_hash"] = both[2]["token_hash"], both[1]["token_hash"]
    refused(file(both), "sample 4 has token_hash 07 there, 04 in the store", "(2 of 6 samples)")
    refused(file([{"label": text} for text in TEXT]), "neither a column sample_index nor token_hash", "order proves nothing")
    refused(file([{"sample_index": i, "other": "a"} for i in INDEX]), "no column 'label'", "sample_index, other")
    refused(lambda: labels_of(store, "token_hash", tmp_path / f"a{suffix}"), "says whose")


def test_keys_that_are_no_keys_are_refused(tmp_path, store):
    def jsonl(key, name="sample_index"):
        rows = rows_of(TEXT, name)
        rows[2][name] = key
        path = write(tmp_path / "a.jsonl", rows)
        return lambda: labels_of(store, "label", path)

    for key in (7.0, "7", True, [7]):
        refused(jsonl(key), f"entry 3 has {key!r} as sample_index (1 of 6 entries)", "a whole number")
    refused(jsonl(None), "entry 3 has nothing as sample_index")
    refused(jsonl(7, "token_hash"), "entry 3 has 7 as token_hash", "expected text")
    path = write(tmp_path / "a.csv", [row | {"sample_index": f"0{row['sample_index']}"} for row in rows_of(TEXT, "sample_index")])
    refused(lambda: labels_of(store, "label", path), "entry 1 has '03' as sample_index", "(6 of 6 entries)")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_labels_that_are_missing_or_not_finite_are_refused(tmp_path, store, suffix):
    path = write(tmp_path / f"a{suffix}", rows_of(["a", None, "b", None, "a", "b"], "sample_index")[::-1])
    refused(lambda: labels_of(store, "label", path), "sample 4 has no label", "(2 of 6 samples)")
    if suffix != ".parquet":  # pandas writes NaN as none, and refuses mixtures
        path = write(tmp_path / f"b{suffix}", rows_of([0.5, math.nan, 1.5, math.inf, 0.5, 1.5], "sample_index")[::-1])
        refused(lambda: labels_of(store, "label", path), "sample 4 has nan", "2 are not finite")


def test_mixed_types_are_refused(tmp_path, store):
    for labels, parts in (
        (["a", 1, "a", 1, 1, 1], ["sample 3 has 'a', text", "sample 4 has 1, a whole number"]),
        ([True, False, 1, 0, 1, 0], ["sample 3 has True, a bool", "sample 7 has 1, a whole number"]),
        (["a", {"b": 1}, "a", "b", "b", "b"], ["sample 4 has {'b': 1}, of type dict"]),
    ):
        path = write(tmp_path / "a.jsonl", rows_of(labels, "sample_index"))
        refused(lambda path=path: labels_of(store, "label", path), *parts)


def test_files_that_cannot_be_read_are_refused(tmp_path, store):
    def file(name, content):
        (tmp_path / name).write_bytes(content)
        return lambda: labels_of(store, "label", tmp_path / name)

    refused(file("a.tsv", b"sample_index\tlabel\n"), ".jsonl, .csv, .parquet", "'.tsv'")
    refused(lambda: labels_of(store, "label", tmp_path / "none.csv"), "none.csv cannot be read", "No such file")
    refused(file("a.parquet", b"PAR1 not really"), "a.parquet cannot be read")
    refused(file("a.jsonl", b'{"sample_index": 3, "label": "a"}\n{"sample_index": 4,\n'), "cannot be read", "line 2")
    refused(file("a.jsonl", b'{"sample_index": 3, "label": "a", "label": "b"}\n'), "line 1", "'label' more than once")
    refused(file("a.jsonl", b'[3, "a"]\n'), "line 1 is no object", "list")
    refused(file("a.jsonl", b""), "has no column 'label'")
    refused(file("a.csv", b""), "has no column 'label'")
    refused(file("a.csv", b"sample_index,label\n3,a,b\n"), "line 2 has 3 fields", "header has 2")
    refused(file("a.csv", b"sample_index,label,label\n3,a,b\n"), "'label' more than once")
    refused(file("a.csv", b'sample_index,label\n3,"a\n'), "cannot be read")
    refused(file("a.csv", b"sample_index,label\n3,\xff\n"), "cannot be read", "utf-8")


# --- labels of tokens

TAGS = ["x", None, "y", "x", "x", "y", "z", None, None, None, "z", "y", "x"]


def by_sample(flat, lengths=LENGTHS):
    ends = np.cumsum(lengths)
    return [flat[end - n : end] for end, n in zip(ends, lengths, strict=True)]


def test_labels_of_tokens_follow_the_samples_and_none_is_minus_one(store):
    labels = token_labels_of(store, "tags")
    assert (labels.name, labels.kind, labels.classes) == ("tags", "token classes", ["x", "y", "z"])
    assert labels.start.tolist() == [0, 2, 3, 7, 10, 11, 13]
    assert labels.numbers.tolist() == [-1 if tag is None else "xyz".index(tag) for tag in TAGS]
    assert labels.numbers.dtype == labels.start.dtype == np.int64


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_labels_of_tokens_in_a_file_may_be_in_any_order(tmp_path_factory, store, data):
    entry = data.draw(
        st.sampled_from([st.none() | st.integers(-3, 3), st.none() | st.booleans(), st.none() | st.sampled_from("abc")])
    )
    flat = data.draw(st.lists(entry, min_size=13, max_size=13).filter(lambda found: len({*found} - {None}) > 1))
    keys = data.draw(st.sampled_from([("sample_index",), ("token_hash",)]))
    rows = data.draw(st.permutations(rows_of(by_sample(flat), *keys)))
    path = write(tmp_path_factory.mktemp("files") / f"a{data.draw(st.sampled_from(['.jsonl', '.parquet']))}", rows)
    labels = token_labels_of(store, "label", path)
    assert [None if number < 0 else labels.classes[number] for number in labels.numbers] == [
        x if x is None else str(x) for x in flat
    ]
    assert labels.classes == [str(x) for x in sorted({*flat} - {None})]


def test_labels_of_tokens_that_do_not_fit_are_refused(tmp_path, store):
    def jsonl(lists):
        path = write(tmp_path / "a.jsonl", rows_of(lists, "sample_index"))
        return lambda: token_labels_of(store, "label", path)

    refused(lambda: token_labels_of(store, "short"), "sample 7 has 3 labels, but 4 tokens", "2 of 6 samples", "tokenization")
    refused(lambda: token_labels_of(store, "text_label"), "sample 3 has one label, 'b', expected a list of 2", "6 of 6")
    refused(lambda: token_labels_of(store, "mixed"), "sample 4 has no label")
    refused(jsonl(by_sample([None] * 13)), "not one label")
    refused(jsonl(by_sample([None, *[1] * 12])), "every label is 1")
    refused(
        jsonl(by_sample([*[1] * 4, "a", *[1] * 8])),
        "token 0 of sample 3 has 1, a whole number",
        "token 1 of sample 7 has 'a', text",
    )
    refused(jsonl(by_sample([*[0.5] * 4, math.nan, *[1.0] * 7, math.inf])), "token 1 of sample 7 has nan", "2 are not finite")
    path = write(tmp_path / "a.csv", rows_of(TEXT, "sample_index"))
    refused(lambda: token_labels_of(store, "label", path), ".csv cannot hold a list", ".parquet")
