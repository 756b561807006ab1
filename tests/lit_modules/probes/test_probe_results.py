"""Every number of the results is what its function gives when called directly, and warnings come when they should only."""

import json
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.lit_modules.probes import probe_metrics as pm
from exactivations.lit_modules.probes.exact_probes import ExactProbeSweep
from exactivations.lit_modules.probes.group_bootstrap import interval_of_difference, intervals
from exactivations.lit_modules.probes.layer_ensembles import AVERAGE, STACKED, ensembles
from exactivations.lit_modules.probes.linear_probes import logistic_probes, ridge_probes
from exactivations.lit_modules.probes.probe_evaluation import Benign, Bootstrap, chosen_vector, evaluate, probe_names, role_of
from exactivations.lit_modules.probes.probe_results import CONTROL_TASK
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.probe_stores import STRENGTHS, demo_like, run, write_rows

OPTIONS = {"n_resamples": 60, "seed": 3}
BOOTSTRAP = Bootstrap(**OPTIONS)
BAG = "baseline: bag"
KINDS = {"label": "logistic", "kind": "logistic", "value": "ridge"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A store, and the same samples in a model that knows nothing."""
    rows, columns = demo_like()
    path = tmp_path_factory.mktemp("runs")
    write_rows(path / "demo", rows, **columns)
    write_rows(path / "untrained", demo_like(signal=0)[0], seed=5, **columns)
    return path


@pytest.fixture(scope="module", params=KINDS)
def found(paths, request):
    """A sweep with baselines, a control and ensembles, its data, what was added, and the results."""
    label, store = request.param, ActivationStore(paths / "demo")
    data = ActivationDataModule(
        store, label, group="module", n_shuffles=2, others={"untrained": ActivationStore(paths / "untrained")}
    )
    data.add(BAG, store.pooled("resid_post.1", "mean")[:, :5])
    if data.classes:
        data.add_control(CONTROL_TASK, np.random.default_rng(0).integers(0, len(data.classes), len(store)))
    sweep = run(data, ExactProbeSweep(KINDS[label], STRENGTHS))
    further, stacking = ensembles(sweep, data, probe_names(data))
    erased = torch.randn(sweep.tested["resid_post.1/mean"][0].shape, generator=torch.Generator().manual_seed(0))
    return sweep, data, further, stacking, erased, evaluate(sweep, data, further=further, erased=erased, bootstrap=BOOTSTRAP)


def said(scores, data):
    """What metrics take."""
    scores = scores.double()
    return scores.softmax(1) if len(data.classes) > 2 else scores[:, 0].sigmoid() if data.classes else scores[:, 0]


def main_metric(scores, data):
    """The metric that vectors are chosen by, and what it takes: of two classes the scores themselves, which never tie at 1."""
    if not data.classes:
        return pm.r2, scores[:, 0].double()
    return pm.auroc, scores[:, 0] if len(data.classes) == 2 else said(scores, data)


def direct(scores, labels, data):
    metric, values = main_metric(scores, data)
    return intervals(metric, values, labels, data.groups_of("test"), **OPTIONS)


def test_every_interval_is_that_of_intervals_called_directly(found):
    sweep, data, further, _, erased, results = found
    labels, groups = data.targets("test"), data.groups_of("test")
    assert [vector.name for vector in results.vectors] == [*data.names, AVERAGE, STACKED]
    n_shuffled = 0
    for vector in results.vectors:
        if vector.name in further:
            assert vector.role == "ensemble" and vector.strength is None and not vector.shuffled
            assert vector.test == direct(further[vector.name].test, labels[0], data)
            continue
        scores, valid = sweep.tested[vector.name], sweep.validated[vector.name]
        assert vector.test == direct(scores[0], labels[0], data)
        assert vector.shuffled == [direct(scores[variant], labels[variant], data) for variant in (1, 2)]
        n_shuffled += len(vector.shuffled)
        metric, values = main_metric(valid.scores[0], data)
        assert vector.validation == pytest.approx(metric(values, data.targets("validation")[0]), abs=1e-12)
        assert vector.validation == pytest.approx(float(valid.values[0].max()), abs=1e-12)
        assert vector.strength == STRENGTHS[int(valid.values[0].argmax())]
    assert n_shuffled == 2 * len(data.names)
    assert results.erased == direct(erased, labels[0], data)
    table = pm.CLASSIFICATION if data.classes else pm.REGRESSION
    assert results.metrics.keys() == {results.best, BAG}
    for name, metrics in results.metrics.items():
        expected = {
            what: intervals(m, said(sweep.tested[name][0], data), labels[0], groups, **OPTIONS) for what, m in table.items()
        }
        assert metrics == expected


def test_the_best_vector_is_the_sources_own_and_chosen_on_validation(found):
    sweep, data, _, _, _, results = found
    own = [f"resid_post.{layer}/mean" for layer in range(4)]
    assert probe_names(data) == own
    assert {role: [name for name in data.names if role_of(name, data) == role] for role in ("probe", "control", "baseline")} == {
        "probe": own, "control": [f"untrained: {name}" for name in own], "baseline": [BAG]
    }  # fmt: skip
    values = {name: float(sweep.validated[name].values[0].max()) for name in own}
    assert results.best == chosen_vector(sweep, data) == max(values, key=values.get)
    assert results.best_baseline == BAG and [vector.name for vector in results.of_role("baseline")] == [BAG]
    metric, ours = main_metric(sweep.tested[results.best][0], data)
    _, theirs = main_metric(sweep.tested[BAG][0], data)
    groups = data.groups_of("test")
    assert results.over_baseline == interval_of_difference(metric, ours, theirs, data.targets("test")[0], groups, **OPTIONS)
    if data.classes:
        of_control = sweep.tested[results.best][3]
        control = pm.accuracy(said(of_control, data), data.targets("test")[3])
        assert results.selectivity == pm.accuracy(said(sweep.tested[results.best][0], data), data.targets("test")[0]) - control
    else:
        assert results.selectivity is None
    counts = {part: results.parts[part] for part in ("train", "validation", "test")}
    assert sum(part["examples"] for part in counts.values()) == len(data.source)
    assert sum(part["groups"] for part in counts.values()) == 40
    for part, content in counts.items():
        labels = data.targets(part)[0].tolist()
        assert content["classes"] == {name: labels.count(number) for number, name in enumerate(data.classes)}


def test_ensembles_are_the_mean_of_scores_and_a_probe_of_them_fitted_on_validation(found):
    sweep, data, further, stacking, _, _ = found
    names = probe_names(data)
    mean = torch.stack([sweep.tested[name][0] for name in names]).mean(dim=0)
    torch.testing.assert_close(further[AVERAGE].test, mean)
    torch.testing.assert_close(further[AVERAGE].validation, torch.stack([sweep.validated[n].scores[0] for n in names]).mean(dim=0))
    fit = logistic_probes if data.classes else ridge_probes
    side_by_side = torch.cat([sweep.validated[name].scores[0] for name in names], dim=1)
    expected = fit(side_by_side, data.targets("validation")[:1], len(data.classes), [1.0])
    assert torch.equal(stacking.weight, expected.weight)
    assert torch.equal(further[STACKED].test, expected.scores(torch.cat([sweep.tested[n][0] for n in names], dim=1))[0, 0])
    assert further[STACKED].validation is None


def test_the_threshold_is_fixed_on_validation_or_benign_samples_and_never_on_test(found):
    sweep, data, further, _, _, results = found
    if len(data.classes) != 2:
        assert results.threshold is None
        return
    validation, labels = sweep.validated[results.best].scores[0, :, 0], data.targets("validation")[0]
    test, of_test, groups = sweep.tested[results.best][0, :, 0], data.targets("test")[0], data.groups_of("test")
    negatives = np.sort(validation[labels == 0].numpy())
    assert results.threshold.value == negatives[-1]  # of fewer than 100, none may lie above
    assert (results.threshold.fixed_on, results.threshold.n_negatives, results.threshold.max_fpr) == (
        "validation",
        len(negatives),
        0.01,
    )
    for metric, name in ((pm.recall_above, "recall"), (pm.false_positive_rate_above, "false_positive_rate")):
        expected = intervals(partial(metric, threshold=results.threshold.value), test, of_test, groups, **OPTIONS)
        assert getattr(results.threshold, name) == expected
    numbers = np.linspace(0, 0.9, 200)
    benign = evaluate(sweep, data, benign=Benign("elsewhere", torch.from_numpy(numbers)), bootstrap=BOOTSTRAP).threshold
    assert (benign.value, benign.fixed_on, benign.n_negatives) == (numbers[-3], "elsewhere", 200)  # 2 of 200 lie above
    before = data._targets["test"]
    try:
        data._targets["test"] = [1 - variant for variant in before]
        turned = evaluate(sweep, data, further=further, bootstrap=BOOTSTRAP)
    finally:
        data._targets["test"] = before
    assert (turned.best, turned.threshold.value) == (results.best, results.threshold.value)
    assert [vector.strength for vector in turned.vectors] == [vector.strength for vector in results.vectors]
    assert turned.threshold.recall != results.threshold.recall
    assert any("is worse than chance on test" in warning for warning in turned.warnings)


def test_results_are_json_that_any_reader_takes(found):
    *_, results = found
    text = json.dumps(results.to_json(), allow_nan=False)  # neither NaN nor infinity, which JSON does not know
    assert json.loads(text) == json.loads(json.dumps(asdict(results)))
    assert json.loads(text)["vectors"][0]["test"].keys() == {"estimate", "low", "high", "n_groups", "n_resamples", "n_undefined"}


def test_too_few_groups_in_test_leave_no_interval(tmp_path):
    rows, columns = demo_like(groups=12)
    data = ActivationDataModule(write_rows(tmp_path / "run", rows, **columns), "label", group="module", names=["resid_post.0/mean"])
    with pytest.raises(InvalidInputError, match=r"needs at least 5 groups, found [234]"):
        evaluate(run(data), data, bootstrap=BOOTSTRAP)


# --- warnings


N = 1200  # validation has more than a hundred negatives
NONE = "no --group was given"
FEW = "too few for a rate of 1%"
DOUBLED = "have the same tokens as a sample of train"
AS_GOOD = "the text alone may be as good"
ERASED = "still tells the label after erasure"
SHUFFLED = "shuffled labels should give 0.5"


@pytest.fixture(scope="module")
def large():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, N)
    rows = rng.normal(size=(N, 4)).astype(np.float32)
    rows[:, 0] += 2 * labels
    return {"a/mean": rows}, {"label": labels.tolist(), "module": [f"m{group}" for group in rng.integers(0, 150, N)]}


def warnings_of(path, large, baseline=None, erased=None, n=N, group="module", leak=False, **columns):
    rows, of_store = large
    rows, of_store = {name: values[:n] for name, values in rows.items()}, {name: values[:n] for name, values in of_store.items()}
    store = write_rows(path, rows, **of_store, **columns)
    data = ActivationDataModule(store, "label", group=group, n_shuffles=2)
    if baseline is not None:
        data.add(BAG, baseline)
    if leak:
        data._targets.update({part: [variants[0]] * 3 for part, variants in data._targets.items()})
    found = evaluate(run(data), data, erased=None if erased is None else erased(data), bootstrap=BOOTSTRAP)
    return found.warnings, data


def test_nothing_is_warned_of_where_all_is_well(tmp_path, large):
    noise = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
    found, _ = warnings_of(tmp_path / "run", large, noise, lambda data: torch.zeros(len(data.numbers("test")), 1))
    assert found == []


def test_each_warning_comes_alone_where_its_reason_is_given(tmp_path, large):
    rows = torch.from_numpy(large[0]["a/mean"])

    def of_labels(data):
        return data.targets("test")[0][:, None].float()

    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(2))
    cases = [
        (AS_GOOD, {"baseline": rows.clone()}),
        (
            f"{AS_GOOD}: a/mean has +0.007 [-0.006",
            {"baseline": torch.cat([rows[:, :1] + 0.3 * noise[:, :1], noise[:, 1:]], dim=1)},
        ),  # better, but not surely
        (ERASED, {"erased": of_labels}),
        (FEW, {"n": 300}),
        (NONE, {"group": None}),
        (SHUFFLED, {"leak": True}),
    ]
    for at, (message, options) in enumerate(cases):
        found, _ = warnings_of(tmp_path / str(at), large, **options)
        assert len(found) == 1 and message in found[0], (message, found)


def test_samples_of_other_parts_with_the_tokens_of_a_training_sample_are_counted(tmp_path, large):
    hashes = [f"{place % 1000:032x}" for place in range(N)]
    found, data = warnings_of(tmp_path / "run", large, token_hash=hashes)
    train = {hashes[place] for place in data.numbers("train")}
    n = sum(hashes[place] in train for part in ("validation", "test") for place in data.numbers(part))
    assert n > 20 and len(found) == 1 and found[0].startswith(f"{n} samples of test or validation {DOUBLED}")
    within, _ = warnings_of(tmp_path / "within", large, token_hash=large[1]["module"])  # the same, but within groups only
    assert within == []
