"""The commands `probe`, `score` and `label-tokens`, from texts to a page: what they write, and what they refuse."""

import json
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from exactivations.lit_modules.probes.probe_file import load_probes
from exactivations.scripts.main import main
from exactivations.store import ActivationStore

N_TEXTS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("probe")


@pytest.fixture(scope="module", autouse=True)
def cache(folder):
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def texts(folder):
    path = folder / "texts.jsonl"
    rows = []
    for i in range(N_TEXTS):
        has_doc = (i * 7) % 3 == 0
        middle = f'    """Adds {i}."""\n' if has_doc else f"    y = x * {i}  # by {i}\n"
        rows.append(
            {
                "text": f"def f{i}(x):\n{middle}    return x + {i}\n",
                "doc": has_doc,
                "module": f"m{i % 30:02d}",
                "n": float(i) / 8,
                "same": 1,
                "pair": i % 2,
                "three": ["a", "b", "c"][i % 3],
            }
        )
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def run(texts, folder):
    return extracted(texts, folder / "run", "tokens", "mean")


@pytest.fixture(scope="module")
def probes(run, folder):
    main(["probe", run, "--label", "doc", "--group", "module", "--out", str(folder / "doc"), "--resamples", "100", "--erase"])
    return folder / "doc"


def extracted(texts, out, *poolings, more=()):
    main(["extract", "demo", "--dataset", str(texts), "--layers", "0", "2", "--pooling", *poolings, "--out", str(out), *more])
    return str(out)


def error_of(capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 1
    bars, found, message = capsys.readouterr().err.partition("exactivations: error: ")
    assert found, bars
    assert "Traceback" not in message
    return message


def test_what_is_written_fits_together(probes, run):
    metrics = json.loads((probes / "metrics.json").read_text())
    vectors = {vector["name"]: vector for vector in metrics["vectors"]}
    assert {"resid_post.0/mean", "resid_post.2/mean", "baseline: length", "baseline: bag of tokens"} <= vectors.keys()
    assert {"ensemble: average", "ensemble: stacked"} <= vectors.keys()
    saved, split = load_probes(probes), json.loads((probes / "split.json").read_text())
    assert saved.content == {**json.loads((probes / "probes.json").read_text()), "checksum": saved.content["checksum"]}
    store = ActivationStore(run)
    doc = dict(zip(store.sample_index.tolist(), store.samples.column("doc").to_pylist(), strict=True))
    module = store.samples.column("module").to_pylist()
    assert not {module[i] for i in split["train"]} & {module[i] for i in [*split["validation"], *split["test"]]}
    name = metrics["best"]
    rows = store.pooled(*name.rsplit("/", 1))[torch.tensor(split["test"])]
    area = roc_auc_score([doc[i] for i in split["test"]], saved.scores(name, {name: rows})[:, 0])
    assert vectors[name]["test"]["estimate"] == pytest.approx(area, abs=1e-12)
    assert (probes / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert f"`{name}`" in (probes / "report.md").read_text()
    assert "test auroc/resid_post.0/mean" in (probes / "metrics.csv").read_text()


def test_scores_of_texts_are_those_of_the_store(probes, run, texts, tmp_path, capsys):
    out = tmp_path / "scores.jsonl"
    for vector in ("resid_post.0/mean", "ensemble: stacked"):
        out.unlink(missing_ok=True)
        main(["score", str(probes), "--dataset", str(texts), "--vector", vector, "--out", str(out), "--show", "2"])
        printed = capsys.readouterr().out
        assert "120 samples; 2 are shown" in printed
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["sample_index"] for row in found] == list(range(N_TEXTS))
        saved, store = load_probes(probes), ActivationStore(run)
        rows = {name: store.pooled(*name.rsplit("/", 1)) for name in saved.vectors_of(vector)}
        assert [row["probability"] for row in found] == pytest.approx(saved.probabilities(vector, rows).tolist(), abs=1e-5)


def test_probes_of_tokens_colour_a_page(run, texts, tmp_path):
    labels, out, page = tmp_path / "syntax.parquet", tmp_path / "out", tmp_path / "page.html"
    main(["label-tokens", run, "--out", str(labels)])
    main(
        ["probe", run, "--label", "syntax", "--label-file", str(labels), "--unit", "token", "--group", "module", "--out", str(out),
         "--shuffles", "0", "--strengths", "0.1", "--resamples", "50"]
    )  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["classes"] == ["code", "comment", "string"]
    assert metrics["selectivity"] is not None
    assert next(v for v in metrics["vectors"] if v["name"] == metrics["best"])["test"]["estimate"] > 0.9
    main(["score", str(out), "--dataset", str(texts), "--num-samples", "2", "--out", str(page)])

    class Text(HTMLParser):
        inside, found = False, ""

        def handle_starttag(self, tag, attributes):
            self.inside |= tag == "pre"

        def handle_endtag(self, tag):
            self.inside &= tag != "pre"

        def handle_data(self, data):
            self.found += data * self.inside

    parser = Text()
    parser.feed(page.read_text())
    assert parser.found == "".join(json.loads(line)["text"] for line in texts.read_text().splitlines()[:2])
    of_test = ["probe-test", str(out), run, "--label-file", str(labels), "--group", "module", "--unseen-only", "--resamples", "50"]
    main([*of_test, "--out", str(tmp_path / "test")])
    again = json.loads((tmp_path / "test" / "metrics.json").read_text())
    tested = next(v for v in metrics["vectors"] if v["name"] == metrics["best"])["test"]
    assert again["metrics"][metrics["best"]]["auroc"] == tested and again["n_examples"] == metrics["parts"]["test"]["examples"]
    table = tmp_path / "tokens.parquet"
    main(["score", str(out), "--dataset", str(texts), "--num-samples", "2", "--out", str(table)])
    rows = pq.read_table(table).to_pylist()
    assert [len(row["input_ids"]) for row in rows] == [len(row["probability"]) for row in rows]


def test_probes_are_tested_on_another_run(probes, run, folder, tmp_path, capsys):
    others = tmp_path / "others.jsonl"
    rows = [
        {
            "text": f"def g{i}(y):\n" + ('    """Doubles."""\n' if i % 2 else "") + f"    return y * {i}\n",
            "doc": bool(i % 2),
            "module": f"o{i // 2}",
        }
        for i in range(40)
    ]
    others.write_text("\n".join(map(json.dumps, rows)))
    other = extracted(others, folder / "others", "mean")
    out = tmp_path / "out"
    main(["probe-test", str(probes), other, "--group", "module", "--resamples", "50", "--out", str(out)])
    printed = capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    saved, store = load_probes(probes), ActivationStore(other)
    name = saved.content["best"]
    scores = saved.scores(name, {name: store.pooled(*name.rsplit("/", 1))})[:, 0]
    area = roc_auc_score(store.samples.column("doc").to_pylist(), scores)
    assert metrics["metrics"][name]["auroc"]["estimate"] == pytest.approx(area, abs=1e-12)
    assert {"auroc", "brier"} <= metrics["metrics"]["baseline: length"].keys() and name in metrics["over_length"]
    assert name in printed and "baseline: length" in printed and f"`{name}`" in (out / "report.md").read_text()
    given = ["probe-test", probes, run, "--group", "module", "--resamples", "100"]
    assert "Pass --unseen-only" in error_of(capsys, *given, "--out", tmp_path / "seen")
    assert "pass --overwrite" in error_of(capsys, *given, "--out", out)
    main([*map(str, given), "--unseen-only", "--out", str(tmp_path / "seen")])
    again = json.loads((tmp_path / "seen" / "metrics.json").read_text())
    trained = json.loads((probes / "metrics.json").read_text())
    of_best, of_length = (next(v for v in trained["vectors"] if v["name"] == which) for which in (name, "baseline: length"))
    assert again["n_samples"] == trained["parts"]["test"]["samples"]
    assert again["metrics"][name]["auroc"] == of_best["test"]
    assert again["metrics"]["baseline: length"]["auroc"] == of_length["test"]
    assert again["metrics"][name]["recall_above_threshold"] == trained["threshold"]["recall"]
    assert again["metrics"][name]["false_positive_rate_above_threshold"] == trained["threshold"]["false_positive_rate"]


def test_an_untrained_model_and_a_benign_store_stand_beside(run, texts, folder, tmp_path, capsys):
    untrained = extracted(texts, folder / "untrained", "mean", more=["--random-weights", "0"])
    others = tmp_path / "others.jsonl"
    others.write_text("\n".join(json.dumps({"text": f"def g{i}(y):\n    return y * {i}\n"}) for i in range(150)))
    benign = extracted(others, folder / "benign", "tokens", "mean")
    given = ["probe", run, "--label", "doc", "--group", "module", "--shuffles", "0", "--resamples", "50"]
    main([*given, "--untrained", untrained, "--benign", benign, "--out", str(tmp_path / "out")])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["over_untrained"] is not None
    assert metrics["best_untrained"].startswith("untrained: resid_post.")
    assert (metrics["threshold"]["fixed_on"], metrics["threshold"]["n_negatives"]) == (benign, 150)
    assert "untrained: resid_post.0/mean" in {vector["name"] for vector in metrics["vectors"] if vector["role"] == "control"}
    saved = load_probes(tmp_path / "out")
    assert all(not name.startswith(("untrained", "baseline")) for name in saved.content["vectors"])
    assert saved.content["vectors"][saved.content["best"]]["threshold_fixed_on"] == benign
    new = ["--out", tmp_path / "new"]
    assert "model: " in error_of(capsys, *given, *new, "--benign", untrained)
    assert f"sample 0 of {run} is in {run} too" in error_of(capsys, *given, *new, "--benign", run)
    assert "is of a trained model" in error_of(capsys, *given, *new, "--untrained", run)
    assert not (tmp_path / "new").exists()  # refused before anything was trained


@pytest.mark.parametrize("kind", ["mass-mean", "mlp", "attention"])
def test_every_kind_scores_what_it_saved(kind, run, texts, tmp_path):
    out = tmp_path / "out"
    main(
        ["probe", run, "--label", "doc", "--group", "module", "--kind", kind, "--shuffles", "0", "--epochs", "2", "--out", str(out),
         "--resamples", "50", "--strengths", "1"]
    )  # fmt: skip
    split, scores = json.loads((out / "split.json").read_text()), tmp_path / "scores.jsonl"
    main(["score", str(out), "--dataset", str(texts), "--out", str(scores), "--show", "0"])
    found = [json.loads(line)["probability"] for line in scores.read_text().splitlines()]
    doc = [json.loads(line)["doc"] for line in texts.read_text().splitlines()]
    metrics = json.loads((out / "metrics.json").read_text())
    area = roc_auc_score([doc[i] for i in split["test"]], [found[i] for i in split["test"]])
    best = next(vector for vector in metrics["vectors"] if vector["name"] == metrics["best"])
    assert best["test"]["estimate"] == pytest.approx(area, abs=1e-6)
    main(["probe-test", str(out), run, "--group", "module", "--unseen-only", "--resamples", "50", "--out", str(tmp_path / "test")])
    again = json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert again["metrics"][best["name"]]["auroc"]["estimate"] == pytest.approx(best["test"]["estimate"], abs=1e-9)


def test_real_values_and_several_classes(run, tmp_path):
    for label, kind, best in (("n", "ridge", "r2"), ("three", "logistic", "auroc")):
        out = tmp_path / label
        main(["probe", run, "--label", label, "--kind", kind, "--shuffles", "1", "--out", str(out), "--resamples", "50"])
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["headline"] == best
        assert metrics["threshold"] is None
        assert any("no --group" in warning for warning in metrics["warnings"])


def test_what_is_wrong_is_said_in_one_line(run, probes, texts, tmp_path, capsys):
    out = ["--out", tmp_path / "new"]
    assert "every label is 1" in error_of(capsys, "probe", run, "--label", "same", *out)
    assert "at least three" in error_of(capsys, "probe", run, "--label", "doc", "--group", "pair", *out)
    assert "no column 'dock'" in error_of(capsys, "probe", run, "--label", "dock", *out)
    assert "resid_post.1/mean" in error_of(capsys, "probe", run, "--label", "doc", "--vectors", "resid_post.1/mean", *out)
    assert "--overwrite" in error_of(capsys, "probe", run, "--label", "doc", "--out", probes)
    assert "must be numbers" in error_of(capsys, "probe", run, "--label", "doc", "--kind", "ridge", *out)
    foreign = tmp_path / "labels.jsonl"
    foreign.write_text("\n".join(json.dumps({"sample_index": i, "y": i % 2}) for i in range(N_TEXTS + 3)))
    assert f"{N_TEXTS} is no sample" in error_of(capsys, "probe", run, "--label", "y", "--label-file", foreign, *out)
    assert "one of them" in error_of(capsys, "score", probes)
    assert "no probe 'x'" in error_of(capsys, "score", probes, "--texts", "a", "--vector", "x")
    assert "tokens" in error_of(capsys, "score", probes, "--texts", "a", "--out", tmp_path / "x.html")
    assert "does not exist" in error_of(capsys, "score", tmp_path / "nothing", "--texts", "a")


def test_probes_are_refused_to_another_model(probes, tmp_path, capsys):
    from exactivations.datamodules.embedded import resolve_model

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((resolve_path(resolve_model("demo")) / name).read_bytes())
    tensors = load_file(resolve_path(resolve_model("demo")) / "model.safetensors")
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] * 1.5}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = error_of(capsys, "score", probes, "--texts", "a", "--model", tmp_path)
    assert "model: " in message
    assert "in the probes" in message


def test_a_damaged_file_is_refused(probes, tmp_path, capsys):
    content = bytearray((probes / "probes.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "probes.safetensors").write_bytes(content)
    assert "damaged" in error_of(capsys, "score", tmp_path, "--texts", "a")


def resolve_path(name):
    from pathlib import Path

    return Path(name)
