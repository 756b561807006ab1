"""From a name to a dataset."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exactivations.datamodules.sources import load_source
from exactivations.store.errors import InvalidInputError

TEXTS = ["one", "two, with a comma", 'three "quoted"', "four", "fünf\u2028still five", "six", "seven", "eight", "nine", "ten"]


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def write(folder, suffix, texts=TEXTS):
    path = folder / f"texts{suffix}"
    dataset = datasets.Dataset.from_dict({"text": texts, "label": list(range(len(texts)))})
    if suffix == ".jsonl":
        dataset.to_json(path)
    elif suffix == ".csv":
        dataset.to_csv(path)
    elif suffix == ".parquet":
        dataset.to_parquet(path)
    else:
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".txt"])
def test_a_file_gives_its_texts_in_order(tmp_path, suffix):
    path = write(tmp_path, suffix)
    assert load_source(path)["text"][:] == TEXTS
    assert load_source(str(path), split="train[2:4]")["text"][:] == TEXTS[2:4]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_file_keeps_its_other_columns(tmp_path, suffix):
    assert load_source(write(tmp_path, suffix))["label"][:] == list(range(10))


def test_a_text_file_has_one_sample_a_line_and_form_feeds_and_blank_lines_do_not_shift_them(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("a\x0cb\r\n\nc\u2029d\x85e\nlast".encode())
    assert load_source(path, text_column="body")["body"][:] == ["a\x0cb", "", "c\u2029d\x85e", "last"]


def test_texts_of_a_csv_that_look_like_missing_values_are_texts(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\nNA,1\nnull,2\nNone,3\nnan,4\n"",5\n')
    assert load_source(path)["text"][:] == ["NA", "null", "None", "nan", None]


def test_a_file_name_is_no_pattern(tmp_path):
    (tmp_path / "a1.jsonl").write_text('{"text": "wrong"}\n')
    for name in ("a[1].jsonl", "a*.jsonl", "a?.jsonl"):
        (tmp_path / name).write_text('{"text": "right"}\n')
        assert load_source(tmp_path / name)["text"][:] == ["right"]


def test_the_end_of_a_file_name_may_be_in_capitals(tmp_path):
    path = write(tmp_path, ".jsonl").rename(tmp_path / "TEXTS.JSONL")
    assert len(load_source(path)) == 10


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, ".jsonl")
    assert len(load_source("~/texts.jsonl")) == 10


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "before"}\n')
    assert load_source(path)["text"][:] == ["before"]
    path.write_text('{"text": "after"}\n')
    assert load_source(path)["text"][:] == ["after"]


def test_a_saved_dataset_is_loaded_from_its_folder(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    assert load_source(tmp_path / "saved")["text"][:] == TEXTS
    assert load_source(tmp_path / "saved", split="train[:3]")["text"][:] == TEXTS[:3]


@pytest.fixture
def two_splits(tmp_path):
    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_dict({"text": TEXTS}), "test": datasets.Dataset.from_dict({"text": ["test"]})}
    )
    both.save_to_disk(tmp_path / "both")
    return {"saved": tmp_path / "both", "in memory": both}


@pytest.mark.parametrize("kind", ["saved", "in memory"])
def test_of_several_splits_one_is_named(two_splits, kind):
    source = two_splits[kind]
    assert load_source(source, split="test")["text"][:] == ["test"]
    assert load_source(source, split="train[50%:]")["text"][:] == TEXTS[5:]
    assert load_source(source, split="test+train[:2]")["text"][:] == ["test", *TEXTS[:2]]
    with pytest.raises(InvalidInputError, match="train, test: name one") as error:
        load_source(source)
    one_line(error)
    with pytest.raises(InvalidInputError, match=r"'validation' does not fit the dataset's splits \(train, test\)"):
        load_source(source, split="validation")


def test_a_folder_laid_out_like_a_hub_dataset_is_loaded_by_relative_and_absolute_path(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    (folder / "test.jsonl").write_text('{"text": "b"}\n')
    monkeypatch.chdir(tmp_path)
    for source in ("folder", "./folder", folder):
        assert load_source(source, split="test")["text"][:] == ["b"]
        with pytest.raises(InvalidInputError, match="name one"):
            load_source(source)
    with pytest.raises(InvalidInputError, match="nope"):
        load_source(folder, split="nope")


def test_a_list_of_texts_and_a_dataset_are_taken_as_they_are():
    assert load_source(TEXTS, text_column="body")["body"][:] == TEXTS
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    assert load_source(dataset) is dataset


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:10]", TEXTS),
        ("train[:4]", TEXTS[:4]),
        ("train[50%:]", TEXTS[5:]),
        ("train[-2:]", TEXTS[8:]),
        ("train[:1]+train[9:]", [TEXTS[0], TEXTS[9]]),
        ("train", TEXTS),
    ],
)
def test_a_split_instruction_works_for_what_is_in_memory(split, expected):
    assert load_source(TEXTS, split=split)["text"][:] == expected


@pytest.mark.parametrize("split", ["test", "train[", "train[:x]", ""])
def test_a_split_that_does_not_fit_is_refused(split):
    with pytest.raises(InvalidInputError, match=r"does not fit the dataset's splits \(train\)"):
        load_source(TEXTS, split=split)


@pytest.mark.parametrize("source", ["no.jsonl", "no.CSV", "./no", "../no", "/no/such/folder", "~/no/such"])
def test_a_path_that_does_not_exist_is_refused_without_asking_the_hub(source, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(InvalidInputError, match="there is no such file or folder") as error:
        load_source(source)
    assert source in one_line(error)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.zip").write_text("x")
    with pytest.raises(InvalidInputError, match=r"files may end in \.jsonl.*ends in '.zip'") as error:
        load_source(tmp_path / "a.zip")
    one_line(error)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "a"}\n{oops\n'),
        ("a.jsonl", b""),
        ("a.csv", b""),
        ("a.txt", b""),
        ("a.txt", b"\xff\xfe\x00"),
        ("a.parquet", b"no parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInputError, match=name) as error:
        load_source(tmp_path / name)
    one_line(error)


def test_a_damaged_saved_dataset_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(InvalidInputError, match="saved dataset that cannot be read") as error:
        load_source(tmp_path / "saved")
    one_line(error)


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="is a folder that could not be read") as error:
        load_source(tmp_path)
    one_line(error)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_a_hub_id_without_a_network_is_refused(name, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInputError, match="is no local path, and could not be loaded from the hub") as error:
        load_source(name)
    assert name in one_line(error)


def test_config_and_split_reach_the_hub(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_source("owner/name", "config", "train[:1000]")["text"][:] == ["a"]
    assert asked == [(("owner/name", "config"), {"split": "train[:1000]"})]


def test_a_list_of_mixed_types_is_refused_with_the_index():
    with pytest.raises(InvalidInputError, match="sample 2 is of type int, expected text") as error:
        load_source(["a", None, 3])
    one_line(error)


def test_a_parquet_file_with_one_huge_and_several_small_row_groups_is_in_order(tmp_path):
    texts = [f"text {i}" for i in range(2500)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=700)
    assert load_source(tmp_path / "a.parquet")["text"][:] == texts
