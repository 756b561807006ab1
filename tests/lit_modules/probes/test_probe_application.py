"""Saved probes on another store: figures are scikit-learn's of the same scores, and what was seen or does not belong is refused."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, r2_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.lit_modules.extraction.run_description import Elsewhere
from exactivations.lit_modules.probes.exact_probes import ExactProbeSweep
from exactivations.lit_modules.probes.layer_ensembles import AVERAGE, ensembles
from exactivations.lit_modules.probes.probe_application import FALSE_POSITIVES, RECALL
from exactivations.lit_modules.probes.probe_evaluation import Bootstrap, evaluate, probe_names
from exactivations.lit_modules.probes.probe_file import load_probes, save_probes
from exactivations.lit_modules.probes.probe_results import LENGTH
from exactivations.scripts.probe_apply import Application, apply_to_run
from exactivations.store.errors import IdentityError, InvalidInputError
from tests.lit_modules.probe_stores import N, demo_like, run, write_rows

BEST = "resid_post.2/mean"


def hashes(first):
    return [f"{first + place:032x}" for place in range(N)]


def made(path, label, kind, **options):
    """Probes of two vectors and the store that they are of."""
    rows, columns = demo_like()
    store = write_rows(path / "train", rows, token_hash=hashes(0), **columns)
    data = ActivationDataModule(store, label, group="module", names=["resid_post.1/mean", BEST], seed=2, **options)
    sweep = run(data, ExactProbeSweep(kind, (0.1,)))
    further, stacking = ensembles(sweep, data, probe_names(data))
    results = evaluate(sweep, data, further=further, bootstrap=Bootstrap(50))
    save_probes(path / "probes", sweep, data, results, store.info, stacking)
    return load_probes(path / "probes"), store, data


def other(path, *, of=None, seed=1, first=1000, **changes):
    """A store of other samples: the vectors of the first ones, shifted, with groups of their own."""
    rows, columns = demo_like()
    order = np.random.default_rng(seed).permutation(N)
    noise = np.random.default_rng(seed + 1)
    rows = {
        name: (values[order] + noise.normal(size=values.shape) * values.std(0) + 0.1).astype(np.float32)
        for name, values in rows.items()
    }
    columns = {name: [values[place] for place in order] for name, values in columns.items()}
    columns["module"] = [f"other {name}" for name in columns["module"]]
    columns |= changes
    rows = {name: rows[name] for name in of or rows}
    return write_rows(
        path, rows, token_hash=hashes(first), **{name: values for name, values in columns.items() if values is not None}
    )


def applied(saved, store, names=(BEST,), **changes):
    given = {"label": saved.content["label"], "label_file": None, "group": "module", "unseen_only": False, "baseline": True}
    return apply_to_run(Application(saved, list(names), **given | changes, elsewhere=Elsewhere()), store, Bootstrap(50))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    path = tmp_path_factory.mktemp("two")
    return *made(path, "label", "logistic"), other(path / "other")


def test_figures_are_those_of_scikit_learn_and_its_probe_on_the_same_rows(two):
    saved, train, data, store = two
    found = applied(saved, store, [BEST, AVERAGE])
    part, truth = data.numbers("train"), np.array(store.samples.column("label").to_pylist()) == "yes"
    scaler = StandardScaler().fit(train.pooled("resid_post.2", "mean").double().numpy()[part])
    oracle = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000).fit(
        scaler.transform(train.pooled("resid_post.2", "mean").double().numpy()[part]), data.targets("train")[0].numpy()
    )
    odds = oracle.decision_function(scaler.transform(store.pooled("resid_post.2", "mean").double().numpy()))
    probability = 1 / (1 + np.exp(-odds))
    metrics = {name: interval.estimate for name, interval in found.metrics[BEST].items()}
    assert metrics["auroc"] == pytest.approx(roc_auc_score(truth, odds), abs=1e-6)
    assert metrics["average_precision"] == pytest.approx(average_precision_score(truth, odds), abs=1e-5)
    assert metrics["f1"] == pytest.approx(f1_score(truth, odds > 0), abs=1e-5)
    assert metrics["brier"] == pytest.approx(brier_score_loss(truth, probability), abs=1e-5)
    threshold = saved.content["vectors"][BEST]["threshold"]
    assert found.threshold[BEST] == threshold
    assert metrics[RECALL] == pytest.approx((odds[truth] > threshold).mean())
    assert metrics[FALSE_POSITIVES] == pytest.approx((odds[~truth] > threshold).mean())
    assert found.metrics[BEST]["auroc"].low < metrics["auroc"] < found.metrics[BEST]["auroc"].high
    assert (found.n_samples, found.n_groups, found.n_left_out_as_seen) == (N, 40, 0)
    assert found.n_of_class == {"no": int((~truth).sum()), "yes": int(truth.sum())}
    rows = {name: store.pooled(*name.rsplit("/", 1)) for name in saved.vectors_of(AVERAGE)}
    assert found.metrics[AVERAGE]["auroc"].estimate == pytest.approx(
        roc_auc_score(truth, saved.scores(AVERAGE, rows)[:, 0]), abs=1e-12
    )
    assert RECALL not in found.metrics[AVERAGE] and LENGTH not in found.metrics
    assert any("no length baseline" in warning for warning in found.warnings)


def test_on_its_own_run_unseen_samples_are_those_of_the_test_part(two):
    saved, train, data, _ = two
    with pytest.raises(InvalidInputError, match=r"was made of or chosen on sample .*\(\d+ of 240 samples are known by token hash"):
        applied(saved, train)
    found = applied(saved, train, unseen_only=True)
    test = data.numbers("test")
    assert (found.n_samples, found.n_left_out_as_seen) == (len(test), N - len(test))
    scores = saved.scores(BEST, {BEST: train.rows(BEST, test)})[:, 0]
    assert found.metrics[BEST]["auroc"].estimate == pytest.approx(roc_auc_score(data.targets("test")[0], scores), abs=1e-12)
    assert found.metrics[BEST]["auroc"].n_groups == len(set(data.groups_of("test")))


def test_samples_of_seen_groups_are_refused_or_left_out_and_counted(two, tmp_path):
    saved, _, data, _ = two
    module = next(iter(data.groups_of("validation")))
    mixed = other(tmp_path / "mixed", module=[module] * 6 + [f"new {place // 4}" for place in range(N - 6)])
    with pytest.raises(InvalidInputError, match=r"sample 0 .*\(0 of 240 samples are known by token hash, 6 by module group"):
        applied(saved, mixed)
    assert applied(saved, mixed, unseen_only=True).n_left_out_as_seen == 6
    without = other(tmp_path / "without", module=None)
    assert any("has no column 'module'" in warning for warning in applied(saved, without, group=None).warnings)


def test_one_class_alone_gives_the_rate_of_false_positives(two, tmp_path):
    saved, *_ = two
    benign = other(tmp_path / "benign", label=["no"] * N)
    found = applied(saved, benign)
    scores = saved.scores(BEST, {BEST: benign.pooled("resid_post.2", "mean")})[:, 0]
    rate = (scores > saved.threshold_of(BEST)).double().mean()
    assert found.metrics[BEST][FALSE_POSITIVES].estimate == pytest.approx(float(rate))
    assert "auroc" not in found.metrics[BEST] and RECALL not in found.metrics[BEST]
    assert found.n_of_class == {"no": N, "yes": 0} and any("no sample is of class 'yes'" in text for text in found.warnings)


def test_other_classes_vectors_and_models_are_refused_by_name(two, tmp_path):
    saved, _, _, store = two
    with pytest.raises(InvalidInputError, match=r"has the class 'a' \(of 'a', 'b', 'c'\), and .*probes.* knows 'no', 'yes' only"):
        applied(saved, store, label="kind")
    few = other(tmp_path / "few", of=["resid_post.1/mean"])
    with pytest.raises(
        InvalidInputError, match=r"few has no resid_post.2/mean, which resid_post.2/mean of .* it has resid_post.1/mean"
    ):
        applied(saved, few)
    info = json.loads((tmp_path / "few" / "run.json").read_text())
    assert info["identity"]["model"] == "m"
    saved.content["identity"]["model"] = "another"
    try:
        with pytest.raises(IdentityError, match=r"model: 'another' in .*, 'm' in "):
            applied(saved, store)
    finally:
        saved.content["identity"]["model"] = "m"
    with pytest.raises(InvalidInputError, match=r"has no probe 'resid_post\.9/mean'"):
        applied(saved, store, ["resid_post.9/mean"])


def test_real_values_are_held_against_scikit_learn(tmp_path):
    saved, _, _ = made(tmp_path, "value", "ridge", label_kind="values")
    store = other(tmp_path / "other")
    found = applied(saved, store)
    predicted = saved.scores(BEST, {BEST: store.pooled("resid_post.2", "mean")})[:, 0].double()
    truth = np.array(store.samples.column("value").to_pylist())
    assert found.metrics[BEST]["r2"].estimate == pytest.approx(r2_score(truth, predicted), abs=1e-9)
    assert found.metrics[BEST]["pearson"].estimate == pytest.approx(np.corrcoef(truth, predicted)[0, 1], abs=1e-6)
    assert found.threshold == {BEST: None} and found.classes == []


def test_three_classes_are_held_against_scikit_learn(tmp_path):
    saved, _, _ = made(tmp_path, "kind", "logistic")
    store = other(tmp_path / "other")
    probabilities = saved.probabilities(BEST, {BEST: store.pooled("resid_post.2", "mean")})
    truth = store.samples.column("kind").to_pylist()
    area = roc_auc_score(truth, probabilities, multi_class="ovr", average="macro")
    assert applied(saved, store).metrics[BEST]["auroc"].estimate == pytest.approx(area, abs=1e-9)


def test_negatives_that_fixed_the_threshold_count_as_seen(tmp_path):
    saved, store, data = made(tmp_path, "label", "logistic")
    benign = other(tmp_path / "benign", first=5000)
    sweep = run(data, ExactProbeSweep("logistic", (0.1,)))
    results = evaluate(sweep, data, bootstrap=Bootstrap(50))
    save_probes(tmp_path / "with", sweep, data, results, store.info, None, benign)
    again = load_probes(tmp_path / "with")
    assert not saved.seen.by_tokens(benign).any() and again.seen.by_tokens(benign).all()
    assert torch.equal(again.tensors[BEST]["weight"], saved.tensors[BEST]["weight"])
