"""`exactivations means …`: from texts to means, and what is done with them; what cannot be done is said and not done."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXModel

from exactivations.datamodules.embedded import resolve_model
from exactivations.scripts.main import CONFIGS, main, to_parser_spelling
from exactivations.store import ActivationStore, MeanActivations
from tests.scripts.test_main import error_of

SAMPLES = [{"text": f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 3), "label": i % 2 == 0} for i in range(24)]
FEW = ["--accelerator", "cpu", "--cpu-threads", "1", "--verify-samples", "2"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "means-cache")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(dataset, out, *more, model="demo"):
    main(["means", str(model), "--dataset", str(dataset), "--out", str(out), *FEW, *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Texts, their means, and a store of the same texts."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "means-cache")
        write(folder / "texts.jsonl", SAMPLES)
        run(
            folder / "texts.jsonl",
            folder / "means",
            "--layers",
            "1",
            "3",
            "--mode",
            "both",
            "--group",
            "label",
            "--positions",
            "64",
        )
        main(
            ["extract", "demo", "--dataset", str(folder / "texts.jsonl"), "--out", str(folder / "store"), "--layers", "1", "3",
             "--pooling", "exp_decay:0.067", "last", "exp_decay:0.023", "exp_decay:0.159", *FEW]
        )  # fmt: skip
    return folder


def test_short_and_long_are_what_the_rows_of_a_store_give(made):
    means, store = MeanActivations.load(made / "means"), ActivationStore(made / "store")
    short = store.pooled("resid_post.3", "exp_decay:0.067").double()
    parts = [store.pooled("resid_post.3", p).double() for p in ("last", "exp_decay:0.023", "exp_decay:0.067", "exp_decay:0.159")]
    torch.testing.assert_close(means.mean("resid_post.3/short"), short.mean(0).float())
    torch.testing.assert_close(means.mean("resid_post.3/long"), torch.cat(parts, dim=1).mean(0).float())
    label = torch.tensor(store.samples.column("label").to_pylist())
    difference = short[label].mean(0) - short[~label].mean(0)
    torch.testing.assert_close(means.difference("resid_post.3/short", "True", "False"), difference.float(), atol=1e-4, rtol=1e-5)


def test_from_store_takes_the_same_means_without_the_model(made, capsys, tmp_path):
    main(
        ["means", "from-store", str(made / "store"), "--pooling", "short", "long", "--group", "label", "--out", str(tmp_path / "m")]
    )
    one, two = MeanActivations.load(made / "means"), MeanActivations.load(tmp_path / "m")
    assert one.names == two.names and one.groups == two.groups == ["False", "True"]
    for name in one.names:
        assert torch.equal(one.mean(name), two.mean(name)) and torch.equal(one.variance(name), two.variance(name))
        assert torch.equal(one.mean(name, "True"), two.mean(name, "True"))
    assert "means of 24 samples" in capsys.readouterr().out


def test_show_tells_what_is_there(made, capsys):
    main(["means", "show", str(made / "means")])
    told = capsys.readouterr().out
    assert re.search(r"resid_post.3/long +640 ", told) and "groups by label: False (12), True (12)" in told
    assert "24 samples of" in told and "positions" in told and "NOT VERIFIED" not in told
    main(["show", str(made / "means")])
    told = capsys.readouterr().out
    assert "samples   24 of 24" in told and re.search(r"means +of 4 vectors, and the rows of \d+ samples as witnesses", told)


@pytest.mark.parametrize("what", [["--texts", SAMPLES[3]["text"], SAMPLES[4]["text"]], "dataset", "store"])
def test_compare_tells_cosines_to_the_mean_and_between_samples(made, tmp_path, capsys, what):
    plot = tmp_path / "plot.png"
    given = what if isinstance(what, list) else [f"--{what}", str(made / ("texts.jsonl" if what == "dataset" else "store"))]
    common = ["means", "compare", str(made / "means"), "--vector", "resid_post.3/short", "--device", "cpu"]
    main([*common, *given, "--plot", str(plot)])
    told = capsys.readouterr().out
    store, means = ActivationStore(made / "store"), MeanActivations.load(made / "means")
    rows = store.pooled("resid_post.3", "exp_decay:0.067").double().numpy()
    rows = rows[[3, 4]] if isinstance(what, list) else rows
    mean = means.mean("resid_post.3/short").double().numpy()
    cosines = rows @ mean / np.linalg.norm(rows, axis=1) / np.linalg.norm(mean)
    assert float(re.search(r" mean +([0-9.-]+)", told).group(1)) == pytest.approx(cosines.mean(), abs=6e-4)

    def between(values):
        unit = values / np.linalg.norm(values, axis=1, keepdims=True)
        return ((unit @ unit.T).sum() - len(unit)) / (len(unit) * (len(unit) - 1))

    before, after = (float(x) for x in re.search(r"on average: ([0-9.-]+) before, ([0-9.-]+) after", told).groups())
    assert (before, after) == (pytest.approx(between(rows), abs=6e-4), pytest.approx(between(rows - mean), abs=6e-4))
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_compare_by_position_subtracts_what_the_pooling_makes_of_the_means_by_position(made, capsys):
    text = SAMPLES[1]["text"]
    main(
        [
            "means",
            "compare",
            str(made / "means"),
            "--vector",
            "resid_post.1/short",
            "--texts",
            text,
            "--by-position",
            "--min-count",
            "1",
        ]
    )
    assert "centred by: means by position" in capsys.readouterr().out


def test_compare_refuses_what_it_cannot_compare(made, tmp_path, capsys):
    compare = ["means", "compare", str(made / "means")]
    assert "name what is to be compared" in error_of(capsys, *compare, "--vector", "resid_post.3/short")
    assert "choose one with --vector (resid_post.1/short, resid_post.1/long" in error_of(capsys, *compare, "--texts", "x = 1")
    few = ["--vector", "resid_post.3/short", "--texts", "x = 1", "--by-position"]
    assert re.search(r"position \d+ from the end of resid_post.3 has a mean of \d+ tokens, at least 1000", error_of(
        capsys, *compare, *few, "--min-count", "1000"
    ))  # fmt: skip
    other = tmp_path / "other"
    main(
        ["extract", "demo", "--dataset", str(made / "texts.jsonl"), "--out", str(other), "--layers", "3", "--max-length", "9", *FEW]
    )
    capsys.readouterr()
    message = error_of(capsys, *compare, "--vector", "resid_post.3/short", "--store", str(other))
    assert "max_length: None in the means, 9 in" in message


def test_a_mean_of_another_model_is_refused_with_both_named(made, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("demo"))
    tokenizer.save_pretrained(tmp_path / "tiny")
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32
    )
    GPTNeoXModel(config).save_pretrained(tmp_path / "tiny")
    compare = ["means", "compare", str(made / "means"), "--vector", "resid_post.3/short", "--texts", "x = 1"]
    message = error_of(capsys, *compare, "--model", tmp_path / "tiny")
    assert re.search(r"model: '[0-9a-f]{32}' in the means, '[0-9a-f]{32}' in what is there now", message)
    run(made / "texts.jsonl", tmp_path / "tiny-means", "--layers", "1", "3", "--mode", "both", model=tmp_path / "tiny")
    capsys.readouterr()
    message = error_of(capsys, "means", "merge", made / "means", tmp_path / "tiny-means", "--out", tmp_path / "m.safetensors")
    assert "model:" in message and not (tmp_path / "m.safetensors").exists()


def test_merge_joins_runs_and_refuses_the_same_samples_twice(made, tmp_path, capsys):
    halves = [write(tmp_path / f"{i}.jsonl", SAMPLES[i::2]) for i in range(2)]
    for i, half in enumerate(halves):
        run(half, tmp_path / f"run{i}", "--layers", "1", "3", "--mode", "both", "--group", "label", "--positions", "64")
    merged = tmp_path / "merged.safetensors"
    main(["means", "merge", str(tmp_path / "run0"), str(tmp_path / "run1"), "--out", str(merged)])
    one, two = MeanActivations.load(made / "means"), MeanActivations.load(merged)
    assert two.groups == ["False", "True"] and two.n_samples == 24
    for name in one.names:
        torch.testing.assert_close(one.mean(name), two.mean(name), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(one.variance(name), two.variance(name), rtol=1e-4, atol=1e-3)
        assert [two.count(name, group) for group in two.groups] == [12, 12]
    capsys.readouterr()
    message = error_of(capsys, "means", "merge", merged, tmp_path / "run1", "--out", tmp_path / "twice.safetensors")
    assert "in the means already" in message
    assert "is there already" in error_of(capsys, "means", "merge", merged, tmp_path / "run1", "--out", merged)


def test_export_writes_what_others_read(made, tmp_path, capsys):
    means = MeanActivations.load(made / "means")
    main(["means", "export", str(made / "means"), "--out", str(tmp_path / "all.safetensors"), "--what", "normalised"])
    tensors = load_file(tmp_path / "all.safetensors")
    assert sorted(tensors) == sorted(means.names)
    assert torch.equal(tensors["resid_post.3/long"], means.normalised("resid_post.3/long"))
    main(
        ["means", "export", str(made / "means"), "--out", str(tmp_path / "steer.gguf"), "--vector", "resid_post.1/short",
         "resid_post.3/short", "--what", "difference", "--groups", "True", "False"]
    )  # fmt: skip
    assert (tmp_path / "steer.gguf").read_bytes()[:4] == b"GGUF"
    capsys.readouterr()
    again = ["--out", tmp_path / "steer.gguf", "--vector", "resid_post.3/short"]
    assert "steer.gguf" in error_of(capsys, "means", "export", made / "means", *again)


def test_a_changed_document_set_zero_samples_and_an_unfinished_result_are_refused(made, tmp_path, capsys):
    texts = write(tmp_path / "texts.jsonl", SAMPLES)
    run(texts, tmp_path / "run", "--layers", "1")
    capsys.readouterr()
    write(texts, [{**SAMPLES[0], "text": "x = 2"}, *SAMPLES[1:]])
    again = ["means", "demo", "--dataset", texts, "--out", tmp_path / "run", "--layers", "1", *FEW]
    assert re.search(r"dataset: '[0-9a-f]+' there, '[0-9a-f]+' now", error_of(capsys, *again))
    nothing = write(tmp_path / "nothing.jsonl", [])
    message = error_of(capsys, "means", "demo", "--dataset", nothing, "--out", tmp_path / "none", "--layers", "1", *FEW)
    assert "no samples" in message or "empty" in message
    shard = next((tmp_path / "run" / "shards").iterdir())
    shard.unlink()
    (tmp_path / "run" / "means.safetensors").unlink()
    assert "are not finished: 1 of 1 shards are missing" in error_of(capsys, "means", "show", tmp_path / "run")


def test_means_model_is_short_for_means_run_and_a_shipped_configuration_goes_by_its_name():
    assert to_parser_spelling(["means", "demo", "--dataset", "d"]) == ["means", "run", "demo", "--dataset", "d"]
    assert to_parser_spelling(["means", "--dataset", "d"]) == ["means", "run", "--dataset", "d"]
    assert to_parser_spelling(["means", "--help"]) == ["means", "--help"]
    assert to_parser_spelling(["means", "show", "r"]) == ["means", "show", "r"]
    config = f"--config={CONFIGS / 'pythia-12b.yaml'}"
    assert to_parser_spelling(["means", "run", "m", "--layers", "1", "--config", "pythia-12b"]) == [
        "means", "run", config, "m", "--layers=[1]",  # first, so that the others win
    ]  # fmt: skip


def test_the_shipped_configuration_gives_5120_and_20480_values(tmp_path, capsys):
    """With a model of Pythia-12B's width; its blocks 0 to 2, and a narrow MLP, since 12 billion weights do not fit here."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("demo"))
    tokenizer.save_pretrained(tmp_path / "wide")
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=5120, num_hidden_layers=3, num_attention_heads=40, intermediate_size=64
    )
    with torch.device("meta"):
        model = GPTNeoXModel(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # random enough, and filled in a moment
            parameter.copy_(torch.linspace(-0.02, 0.02, parameter.shape[-1]))
    model.save_pretrained(tmp_path / "wide")
    texts = write(tmp_path / "texts.jsonl", SAMPLES[:4])
    main(
        ["means", "run", str(tmp_path / "wide"), "--config", "pythia-12b", "--layers", "0", "1", "2", "--dataset", str(texts),
         "--out", str(tmp_path / "run"), "--dtype", "bfloat16", *FEW[:4], "--verify-samples", "0"]
    )  # fmt: skip
    means = MeanActivations.load(tmp_path / "run", allow_unverified=True)
    assert {name: len(means.mean(name)) for name in means.names} == {
        "resid_post.0+1+2/short": 5120,
        "resid_post.0+1+2/long": 20480,
    }
    shipped = yaml.safe_load((CONFIGS / "pythia-12b.yaml").read_text())
    assert (shipped["model"], shipped["layers"], shipped["mode"]) == ("EleutherAI/pythia-12b", [25, 26, 27], "both")


def test_what_was_added_stays_when_the_first_command_is_started_again_or_its_run_verified(tmp_path, capsys):
    first, more = write(tmp_path / "first.jsonl", SAMPLES[:16]), write(tmp_path / "more.jsonl", SAMPLES[16:])
    run(first, tmp_path / "run", "--layers", "1")
    main(["means", "add", str(tmp_path / "run"), "--dataset", str(more), *FEW])
    added = (tmp_path / "run" / "means.safetensors").read_bytes()
    run(first, tmp_path / "run", "--layers", "1")
    main(["verify", str(tmp_path / "run"), "--samples", "3"])
    assert (tmp_path / "run" / "means.safetensors").read_bytes() == added
    assert MeanActivations.load(tmp_path / "run").n_samples == 24
    capsys.readouterr()
    assert "at least 1" in error_of(capsys, "means", "add", tmp_path / "run", "--dataset", more, *FEW[:-1], "0")
    run(first, tmp_path / "run", "--layers", "1", "--overwrite")
    assert MeanActivations.load(tmp_path / "run").n_samples == 16


def test_an_existing_result_is_not_replaced_by_one_of_a_stores_rows(made, tmp_path, capsys):
    main(["means", "from-store", str(made / "store"), "--pooling", "last", "--out", str(tmp_path / "m")])
    capsys.readouterr()
    again = ["means", "from-store", made / "store", "--pooling", "short", "--out", tmp_path / "m"]
    assert "is there already: name another file with --out, or replace it with --overwrite" in error_of(capsys, *again)
    main([*map(str, again), "--overwrite"])
    assert MeanActivations.load(tmp_path / "m").names == ["resid_post.1/short", "resid_post.3/short"]


def test_texts_and_results_are_taken_as_they_are_typed():
    assert to_parser_spelling(["means", "compare", "r", "--texts", "[x for x in y]"])[3:] == ['--texts=["[x for x in y]"]']
    assert to_parser_spelling(["means", "compare", "r", "--texts", "[1, 2]", "b"])[3:] == ['--texts=["[1, 2]", "b"]']
    for words in (["a", "b", "--out", "o"], ["--out", "o", "a", "b"], ["a", "--out", "o", "b"]):
        assert to_parser_spelling(["means", "merge", *words]) == ["means", "merge", '["a", "b"]', "--out", "o"]


@pytest.mark.parametrize(
    ("n", "said"), [("0", "0 samples were asked for"), ("25", "25 samples were asked for, .* has 24"), ("-3", "-3")]
)
def test_as_many_samples_of_a_store_as_were_asked_for_or_none(made, capsys, n, said):
    common = ["means", "compare", made / "means", "--vector", "resid_post.3/short", "--store", made / "store"]
    assert re.search(said, error_of(capsys, *common, "--num-samples", n))
    assert "has no column 'nope'; it has sample_index" in error_of(capsys, *common, "--labels", "nope")


def test_what_is_no_result_is_said_to_be_none_and_nobody_is_told_to_delete_it(made, tmp_path, capsys):
    main(["means", "export", str(made / "means"), "--out", str(tmp_path / "x.safetensors")])
    (tmp_path / "readme").write_text("x" * 100)
    capsys.readouterr()
    for name in ("x.safetensors", "readme"):
        message = error_of(capsys, "means", "show", tmp_path / name)
        assert "no means file" in message and "elete" not in message
    assert "there is no such file or folder" in error_of(capsys, "means", "show", tmp_path / "nowhere")


def test_a_run_that_fails_its_verification_later_takes_its_result_with_it(made, tmp_path, capsys):
    import shutil

    from exactivations.store.run_folder import RunFolder
    from exactivations.store.shard import open_shard, write_shard

    shutil.copytree(made / "means", tmp_path / "run")
    path = RunFolder(tmp_path / "run").shard_path(0)
    tensors, metadata = open_shard(path)
    tensors = {name: values.clone() for name, values in tensors.items()}
    tensors["resid_post.3/last"] += 1
    del metadata["checksum"]
    write_shard(path, tensors, metadata)
    capsys.readouterr()
    assert "failed its verification" in error_of(capsys, "verify", tmp_path / "run")
    assert not (tmp_path / "run" / "means.safetensors").exists()
    error_of(capsys, "means", "show", tmp_path / "run")
