"""label-tokens, called as the command line calls it, on a run of Python texts."""

import json

import datasets
import numpy as np
import pytest

from exactivations.datamodules.labels import token_labels_of
from exactivations.scripts import main as command_line
from exactivations.scripts.label_tokens import label_tokens
from exactivations.store import ActivationStore
from exactivations.store.errors import InvalidInputError

FUNCTION = 'def f(x):\n    """Doc."""\n    return x + %d  # it\'s\n'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A store of functions, some of them cut in the middle of a string."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        write(folder / "texts.jsonl", [FUNCTION % i * (1 + i % 3) for i in range(6)])
        arguments = ["--dataset", str(folder / "texts.jsonl"), "--text-column", "body", "--out", str(folder / "run")]
        options = ["--layers", "0", "--pooling", "tokens", "--max-length", "32", "--num-samples", "4", "--sample-seed", "1"]
        command_line.main(["extract", "demo", *arguments, *options])
    return folder / "run"


def write(path, texts):
    path.write_text("\n".join(json.dumps({"body": text}) for text in texts))


@pytest.fixture(autouse=True)
def added(monkeypatch, tmp_path):
    monkeypatch.setattr(command_line, "COMMANDS", command_line.COMMANDS | {"label-tokens": label_tokens})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_labels_are_those_of_the_stores_tokens_and_their_numbers_are_printed(run, tmp_path, capsys):
    out = tmp_path / "labels.parquet"
    command_line.main(["label-tokens", str(run), "--out", str(out)])
    told = capsys.readouterr().out
    store = ActivationStore(run)
    labels = token_labels_of(store, "syntax", out)
    assert labels.classes == ["code", "comment", "string"] and len(labels.numbers) == store.info.n_tokens
    assert store.samples.column("truncated").to_numpy().any()
    for name, count in zip([*labels.classes, "no label"], np.bincount(labels.numbers % 4, minlength=4), strict=True):
        assert f"{name:<10} {count:>12,}" in told
    pieces = vocabulary(store)
    of_class = {k: "".join(np.array(pieces)[labels.numbers == k]) for k in (-1, 0, 1, 2)}
    assert set(of_class[1].replace(" ", "")) <= set("#it's") and "#" not in of_class[0] + of_class[2]
    assert set(of_class[2].replace(" ", "")) <= set('"Doc.') and "return" in of_class[0] and not of_class[-1].strip()


def vocabulary(store):
    """The text of each token of a store, in the order of its samples."""
    from transformers import AutoTokenizer

    from exactivations.datamodules.embedded import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("demo"))
    return [tokenizer.decode([i]) for sample in store for i in sample.input_ids.tolist()]


def test_what_is_printed_at_the_end_runs(run, tmp_path, capsys):
    label_tokens(str(run), out=str(tmp_path / "labels.parquet"))
    lines = capsys.readouterr().out.partition("read it with\n")[2].splitlines()
    found = {}
    exec("\n".join(line.removeprefix("    ") for line in lines), found)
    assert found["labels"].name == "syntax"


def test_other_texts_a_text_that_is_no_python_and_a_file_that_is_there_are_refused(run, tmp_path):
    out = tmp_path / "labels.parquet"
    write(tmp_path / "other.jsonl", [FUNCTION % i for i in range(7, 13)])
    with pytest.raises(InvalidInputError, match=r"sample \d has token hash .* it is another dataset"):
        label_tokens(str(run), out=str(out), dataset=str(tmp_path / "other.jsonl"))
    write(tmp_path / "broken.jsonl", ["x = '''"] * 6)
    with pytest.raises(InvalidInputError, match=r"sample \d is no Python: EOF in multi-line string, line 1"):
        label_tokens(str(run), out=str(out), dataset=str(tmp_path / "broken.jsonl"))
    with pytest.raises(InvalidInputError, match=r"labels of tokens are written as \.parquet"):
        label_tokens(str(run), out=str(tmp_path / "labels.csv"))
    assert not out.exists()
    label_tokens(str(run), out=str(out))
    with pytest.raises(InvalidInputError, match="is there already: name another file, or pass --overwrite"):
        label_tokens(str(run), out=str(out))
    label_tokens(str(run), out=str(out), overwrite=True)
