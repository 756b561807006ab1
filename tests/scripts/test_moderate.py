"""`exactivations moderate …`: from stores to moderators and what they say, live as stored; what does not belong is refused."""

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from exactivations.lit_modules.moderation.moderator_file import load_moderator
from exactivations.scripts.main import main
from exactivations.scripts.moderate_apply import Application, apply_to_runs
from exactivations.scripts.moderate_run import Machine, opened
from tests.scripts.test_main import error_of

CALM, HARSH = "def f{i}(x):\n    return x + {i}\n", "def f{i}(x):\n    eval(x)\n    return {i}\n"
SAMPLES = [
    {
        "text": (HARSH if at % 3 == 0 else CALM).format(i=at) * (1 + at % 3),
        "label": "bad" if at % 3 == 0 else "good",
        "module": at % 31,
    }
    for at in range(150)
]
OTHERS = [
    {**row, "text": "# new\n" + row["text"], "module": row["module"] + (100 if at < 30 else 0), "site": at if at != 7 else None}
    for at, row in enumerate(SAMPLES[:60])
]  # other texts, of which the second half is of modules that there were before
TEMPLATE = "{text}\n# It is"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs with and without a template, a run of other samples, and a moderator of the first two."""
    folder = tmp_path_factory.mktemp("moderate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        for name, rows in (("texts", SAMPLES), ("others", OTHERS)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        few = ["--layers", "1", "3", "--accelerator", "cpu", "--cpu-threads", "1", "--verify-samples", "2"]
        for name, data, *more in (
            ("plain", "texts", "--pooling", "mean", "last"),
            ("prompted", "texts", "--pooling", "last", "--template", TEMPLATE),
            ("other", "others", "--pooling", "mean", "last"),
        ):
            main(["extract", "demo", "--dataset", str(folder / f"{data}.jsonl"), "--out", str(folder / name), *few, *more])
        options = ["--label", "label", "--group", "module", "--accelerator", "cpu", "--resamples", "100"]
        main(["moderate", "fit", str(folder / "plain"), str(folder / "prompted"), *options, "--out", str(folder / "made")])
        torch.set_num_threads(1)
        yield folder


def test_a_fit_writes_the_moderator_its_predictions_and_the_comparison(made):
    out = made / "made"
    for name in ("moderator.safetensors", "moderator.json", "metrics.json", "predictions.parquet", "report.md", "split.json"):
        assert (out / name).stat().st_size
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("layers.png", "confusion.png"))
    content, metrics = (json.loads((out / name).read_text()) for name in ("moderator.json", "metrics.json"))
    assert len(content["moderators"]) == 6 * 3 + 3 * 3  # vectors x metrics, and a mixture of each aggregation by each metric
    assert content["vectors"]["resid_post.3/last+prompt"]["template"] == TEMPLATE
    assert content["vectors"]["resid_post.3/last"]["template"] is None
    assert re.fullmatch(r"label-[0-9a-f]{16}", content["name"]) and "202" not in content["about"]
    kinds = {vector["role"] for vector in metrics["vectors"]}
    assert kinds == {"probe", "ensemble", "baseline"}
    names = set(metrics["metrics"])
    assert {"baseline: length", "baseline: bag of tokens", "MLPM/last+prompt euclidean"} <= names
    assert any(name.endswith(" logistic") for name in names) and any(name.endswith(" mlp") for name in names)
    rows = pq.read_table(out / "predictions.parquet").to_pylist()
    split = json.loads((out / "split.json").read_text())
    best = [row for row in rows if row["moderator"] == content["best"]]
    assert [row["sample_index"] for row in best] == sorted(split["test"])
    assert all(row["label"] == SAMPLES[row["sample_index"]]["label"] for row in rows)
    assert all(row["probability bad"] + row["probability good"] == pytest.approx(1) for row in rows)
    counts = np.zeros((2, 2), int)
    for row in best:
        counts[content["classes"].index(row["label"]), content["classes"].index(row["predicted"])] += 1
    assert metrics["confusion"][content["best"]] == counts.tolist()
    for row in rows:
        assert row["above_threshold"] == (row["log_odds"] > content["moderators"][row["moderator"]]["threshold"])
        assert 1 / (1 + np.exp(-row["log_odds"])) == pytest.approx(row["probability good"])
    report = (out / "report.md").read_text()
    assert "text alone" in report and "intervals on test are not corrected" in report and "looks at the same test part" in report
    assert any("negatives, too few for a rate of 1%" in warning for warning in metrics["warnings"])


@pytest.mark.parametrize("name", ["resid_post.1/mean mahalanobis:ridge", "MLPM/last+prompt mahalanobis:ledoit-wolf"])
def test_live_is_as_stored_and_as_deep_as_needed(made, tmp_path, name, monkeypatch):
    from exactivations.lit_modules.moderation.live_moderation import LiveModerator

    depths, load = [], LiveModerator.data_of
    monkeypatch.setattr(
        LiveModerator,
        "data_of",
        lambda self, *args: (load(self, *args), depths.append(len(self.extractor.load("cpu").model.layers)))[0],
    )
    out = tmp_path / "scores.parquet"
    main(
        [
            "moderate",
            "score",
            str(made / "made"),
            "--dataset",
            str(made / "texts.jsonl"),
            "--name",
            name,
            "--out",
            str(out),
            "--device",
            "cpu",
        ]
    )
    live = {row["sample_index"]: row for row in pq.read_table(out).to_pylist()}
    stored = [row for row in pq.read_table(made / "made" / "predictions.parquet").to_pylist() if row["moderator"] == name]
    assert len(live) == len(SAMPLES) and stored
    for row in stored:
        assert live[row["sample_index"]]["predicted"] == row["predicted"]
        assert live[row["sample_index"]]["probability bad"] == pytest.approx(row["probability bad"], abs=1e-4)
    assert depths == [2 if "resid_post.1" in name else 4]


def test_other_samples_are_tested_and_seen_ones_are_not(made, tmp_path, capsys):
    command = ["moderate", "test", str(made / "made")]
    options = ["--group", "module", "--accelerator", "cpu", "--resamples", "100"]
    other = [*command, str(made / "other"), "--name", "resid_post.3/mean euclidean", *options]
    message = error_of(capsys, *other, "--out", str(tmp_path / "t"))
    assert "or another of its group (0 of 60 samples are known by token hash" in message
    main([*other, "--out", str(tmp_path / "t"), "--unseen-only"])
    metrics = json.loads((tmp_path / "t" / "metrics.json").read_text())
    split = json.loads((made / "made" / "split.json").read_text())
    tested = {SAMPLES[at]["module"] for at in split["test"]}
    left = [at for at, row in enumerate(OTHERS) if row["module"] >= 100 or row["module"] in tested]
    assert metrics["n_samples"] == len(left) < 60 and metrics["n_left_out_as_seen"] == 60 - len(left)
    assert set(metrics["metrics"]) == {"auroc", "f1", "recall_at_1%_fpr", "fpr_at_that_threshold"}
    message = error_of(capsys, *other, "--out", str(tmp_path / "n"), "--unseen-only", "--group", "site")
    assert "sample 7 has nothing in column 'site'" in message
    saved = load_moderator(made / "made")
    unknown = replace(saved, content={**saved.content, "split": {"group_column": "author"}})
    application = Application(unknown, "resid_post.3/mean euclidean", "label", None, None, unseen_only=False)
    apply_to_runs(application, opened([str(made / "other")]), tmp_path / "c", Machine(1, "cpu"), 100, 0)
    warned = " ".join(json.loads((tmp_path / "c" / "metrics.json").read_text())["warnings"])
    assert "has no column 'author'" in warned and "no --group was given" in warned
    benign = tmp_path / "benign.jsonl"
    benign.write_text("".join(json.dumps({"sample_index": at, "label": "bad"}) + "\n" for at in range(60)))
    main([*other, "--out", str(tmp_path / "b"), "--unseen-only", "--label-file", str(benign)])
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert metrics["metrics"].keys() == {"fpr_at_that_threshold"} and "one class" in " ".join(metrics["warnings"])
    message = error_of(capsys, *command, str(made / "plain"), "--out", str(tmp_path / "u"))
    assert "was made of or chosen on sample" in message and "of 150 samples are known by token hash" in message
    name = ["--name", "resid_post.3/mean euclidean"]
    main([*command, str(made / "plain"), "--out", str(tmp_path / "u"), "--unseen-only", *name, *options])
    rows = pq.read_table(tmp_path / "u" / "predictions.parquet").to_pylist()
    fitted = [row for row in pq.read_table(made / "made" / "predictions.parquet").to_pylist() if row["moderator"] == name[1]]
    assert rows == fitted  # the test part of the fit, to the last bit


def test_what_does_not_belong_is_refused(made, tmp_path, capsys):
    moderator, out = str(made / "made"), ["--out", str(tmp_path / "x")]
    message = error_of(capsys, "moderate", "test", moderator, str(made / "prompted"), *out, "--name", "resid_post.3/last euclidean")
    assert "has no resid_post.3/last" in message and "resid_post.3/last+prompt" in message
    few = ["--layers", "1", "3", "--accelerator", "cpu", "--cpu-threads", "1", "--verify-samples", "2", "--pooling", "mean", "last"]
    main(
        [
            "extract",
            "demo",
            "--dataset",
            str(made / "others.jsonl"),
            "--random-weights",
            "0",
            "--out",
            str(tmp_path / "random"),
            *few,
        ]
    )
    message = error_of(
        capsys, "moderate", "test", moderator, str(tmp_path / "random"), *out, "--name", "resid_post.3/mean euclidean"
    )
    assert "it was computed otherwise" in message and "model:" in message
    message = error_of(capsys, "moderate", "fit", str(made / "plain"), str(made / "other"), "--label", "label")
    assert "are of different samples: sample 60 is in one only (90 are)" in message
    message = error_of(capsys, "moderate", "fit", str(made / "plain"), "--label", "label", "--masks", "m.parquet")
    assert "--masks belong to one run that keeps the rows of its tokens" in message
    message = error_of(capsys, "moderate", "fit", str(made / "plain"), "--label", "label", "--out", moderator)
    assert "holds a moderator already" in message and "--overwrite" in message
    message = error_of(capsys, "moderate", "fit", str(made / "plain"), "--label", "label", "--batch-size", "50")
    assert "--compare false" in message
    message = error_of(
        capsys, "moderate", "fit", str(made / "plain"), "--label", "label", "--group", "module", "--shares", "0.7", "0.2", "0.1"
    )
    assert "groups (module), intervals need 5 at least" in message
    fit = ["moderate", "fit", str(made / "plain"), "--label", "label", "--accelerator", "cpu", "--out", str(tmp_path / "y")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exactivations.scripts.moderate_run.Machine.fitted", lambda *_: pytest.fail("it was fitted before"))
        assert "could not be lo" in error_of(capsys, *fit, "--tokenizer", str(tmp_path / "none"))
    main(["moderate", "score", moderator, "--texts", "eval(x)", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "log-odds of good" in out and "the threshold for 1% false positives" in out
    message = error_of(capsys, "moderate", "score", moderator, "--texts", "a", "--name", "resid_post.2/mean euclidean")
    assert "there is no moderator 'resid_post.2/mean euclidean'" in message
    cut = [
        "--template",
        TEMPLATE,
        "--max-length",
        "12",
        "--pooling",
        "last",
        "--layers",
        "1",
        "--accelerator",
        "cpu",
        "--cpu-threads",
        "1",
    ]
    main(["extract", "demo", "--dataset", str(made / "texts.jsonl"), "--out", str(tmp_path / "cut"), *cut, "--verify-samples", "2"])
    message = error_of(capsys, "moderate", "fit", str(tmp_path / "cut"), "--label", "label")
    assert "was cut on the right, and the template with it" in message


def test_the_curve_has_a_point_for_each_size_and_all(made, tmp_path, capsys):
    plot = tmp_path / "curve.png"
    options = [
        "--label",
        "label",
        "--group",
        "module",
        "--accelerator",
        "cpu",
        "--draws",
        "5",
        "--metrics",
        "euclidean",
        "mahalanobis:ridge",
    ]
    main(["moderate", "curve", str(made / "plain"), *options, "--sizes", "5", "20", "--plot", str(plot)])
    assert plot.read_bytes().startswith(b"\x89PNG")
    points = json.loads(plot.with_suffix(".json").read_text())["points"]
    assert [point["n_per_class"] for point in points] == [5, 20, None] * 2
    assert [point["counts"] for point in points[:2]] == [[5, 5], [20, 20]] and points[2]["n_draws"] == 1
    assert all(point["auroc"][1] <= point["auroc"][0] <= point["auroc"][2] for point in points)
    command = ["moderate", "curve", str(made / "plain"), *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exactivations.scripts.moderate_run.Machine.trainer", lambda *_: pytest.fail("it was fitted before"))
        for wrong, what in (
            (["--sizes", "1000", "--plot", str(tmp_path / "n.png")], "1,000 samples per class are none, or all there are"),
            (["--sizes", "5", "--draws", "1", "--plot", str(tmp_path / "n.png")], "at least 2 draws"),
            (["--sizes", "5", "--plot", str(tmp_path / "curve.jpg")], "must end in .png"),
            (["--sizes", "5", "--plot", str(plot)], "would be replaced: name another picture, or pass --overwrite"),
        ):
            assert what in error_of(capsys, *command, *wrong)
