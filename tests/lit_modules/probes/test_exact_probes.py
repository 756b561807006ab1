"""One fit gives for every vector, strength and variant what a loop over scikit-learn gives, chosen as it chooses, on any ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.lit_modules.probes.exact_probes import ExactProbeSweep
from exactivations.lit_modules.probes.layer_ensembles import ensembles
from exactivations.lit_modules.probes.probe_evaluation import Bootstrap, evaluate, probe_names
from exactivations.lit_modules.probes.probe_file import save_probes
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError
from tests.callbacks.conftest import SERVER, free_port
from tests.lit_modules.probe_stores import STRENGTHS, demo_like, run, trainer, write_rows

LABELS = {"label": "logistic", "kind": "logistic", "value": "ridge"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    rows, columns = demo_like()
    path = tmp_path_factory.mktemp("runs") / "demo"
    write_rows(path, rows, **columns)
    return path


@pytest.fixture(scope="module")
def rows(path):
    return {name: ActivationStore(path).pooled(*name.split("/")).double().numpy() for name in ActivationStore(path).names}


def data_of(path, label, **options):
    return ActivationDataModule(ActivationStore(path), label, group="module", n_shuffles=1, **options)


def oracle_of(kind, strength, balanced=False):
    model = (
        Ridge(alpha=1 / strength)
        if kind == "ridge"
        else LogisticRegression(
            C=strength, tol=1e-9, max_iter=100_000, solver="newton-cg", class_weight="balanced" if balanced else None
        )
    )
    return make_pipeline(StandardScaler(), model)


def scores_of(oracle, kind, rows):
    return oracle.predict(rows)[:, None] if kind == "ridge" else oracle.decision_function(rows).reshape(len(rows), -1)


def worth(kind, scores, labels):
    if kind == "ridge":
        return r2_score(labels, scores[:, 0])
    if scores.shape[1] == 1:
        return roc_auc_score(labels, scores[:, 0])
    probabilities = np.exp(scores - scores.max(axis=1, keepdims=True))
    return roc_auc_score(labels, probabilities / probabilities.sum(axis=1, keepdims=True), multi_class="ovr")


def centred(scores):
    """Of several classes, a constant added to all logits changes nothing."""
    scores = np.asarray(scores, dtype=np.float64)
    return scores - scores.mean(axis=1, keepdims=True) if scores.shape[1] > 1 else scores


def near(found, expected):
    np.testing.assert_allclose(centred(found), centred(expected), atol=3e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("label", "balanced"), [("label", False), ("label", True), ("kind", False), ("value", False)])
def test_a_sweep_is_the_loop_over_scikit_learn_and_chooses_as_the_loop_does(path, rows, label, balanced):
    kind, data = LABELS[label], data_of(path, label)
    sweep = run(data, ExactProbeSweep(kind, STRENGTHS[::-1], balanced=balanced))
    assert [setting.strength for setting in sweep.settings] == list(STRENGTHS)
    place = {part: data.numbers(part) for part in ("train", "validation", "test")}
    labels = {part: data.targets(part).numpy() for part in place}
    for name, values in rows.items():
        for variant in range(2):
            fits = [oracle_of(kind, c, balanced).fit(values[place["train"]], labels["train"][variant]) for c in STRENGTHS]
            scores = {part: [scores_of(fit, kind, values[place[part]]) for fit in fits] for part in ("validation", "test")}
            by_strength = [worth(kind, of_fit, labels["validation"][variant]) for of_fit in scores["validation"]]
            found = sweep.validated[name]
            np.testing.assert_allclose(found.values[variant], by_strength, atol=1e-4)
            best = int(np.argmax(by_strength))
            assert found.chosen[variant] == best
            near(found.scores[variant], scores["validation"][best])
            near(sweep.tested[name][variant], scores["test"][best])
            for at, fit in enumerate(fits):
                weight = sweep.fitted[name].weight[variant, at].numpy()
                expected = np.atleast_2d(fit[-1].coef_)
                np.testing.assert_allclose(weight, expected, atol=1e-3 * np.abs(expected).max())
        test = torch.from_numpy(values[place["test"]])
        assert torch.equal(sweep.probe(name).scores(test)[0, 0], sweep.tested[name][0])


@pytest.mark.parametrize("label", ["label", "kind"])
def test_mass_mean_probes_have_nothing_to_choose_and_find_what_the_means_tell(path, rows, label):
    data = data_of(path, label)
    sweep = run(data, ExactProbeSweep("mass-mean"))
    assert [setting.strength for setting in sweep.settings] == [1.0]
    train, test = data.numbers("train"), data.numbers("test")
    labels = data.targets("train")[0].numpy()
    for name, values in rows.items():
        means = np.stack([values[train][labels == number].mean(axis=0) for number in range(len(data.classes))])
        assert sweep.tested[name].shape[2] == (1 if label == "label" else 3)
        assert sweep.validated[name].values[0] > 0.6 or name == "resid_post.0/mean"  # the one that knows nothing
        if label == "label":
            along = values[test] @ (means[1] - means[0])
            correlation = np.corrcoef(along, sweep.tested[name][0, :, 0])[0, 1]
            assert correlation == pytest.approx(1, abs=1e-6)


def test_a_second_fit_of_a_sweep_remembers_nothing_of_the_first(path):
    sweep = ExactProbeSweep("logistic", STRENGTHS)
    run(data_of(path, "label", seed=1, names=["resid_post.2/mean"]), sweep)
    data = data_of(path, "label", names=["resid_post.0/mean"])
    again, fresh = run(data, sweep), run(data)
    assert again.validated.keys() == again.fitted.keys() == {"resid_post.0/mean"}
    assert torch.equal(again.validated["resid_post.0/mean"].values, fresh.validated["resid_post.0/mean"].values)
    assert torch.equal(again.tested["resid_post.0/mean"], fresh.tested["resid_post.0/mean"])


def test_what_does_not_fit_is_refused(path):
    def refused(message, label="label", sweep=None, **options):
        with pytest.raises(InvalidInputError, match=message):
            trainer().fit(sweep or ExactProbeSweep(), datamodule=data_of(path, label, **options))

    refused("logistic probes cannot be trained on value, which has real values", "value")
    refused("mass-mean probes cannot be trained on value", "value", ExactProbeSweep("mass-mean"))
    refused("ridge probes cannot be trained on kind, which has 3 classes", "kind", ExactProbeSweep("ridge"))
    refused("value has real values, and so no classes to balance", "value", ExactProbeSweep("ridge", balanced=True))
    refused("leave the data module's batch_size None", batch_size=10)
    for message, arguments in (
        ("got 'svm'", ("svm",)),
        (r"above 0, .* got \[\]", ("ridge", ())),
        (r"got \[0.0, 1.0\]", ("ridge", (1.0, 0.0))),
    ):
        with pytest.raises(InvalidInputError, match=message):
            ExactProbeSweep(*arguments)
    with pytest.raises(InvalidInputError, match=r"resid_post.0/mean was not validated: call trainer.fit"):
        trainer().test(ExactProbeSweep(), datamodule=data_of(path, "label"), verbose=False)
    data = data_of(path, "label")
    with pytest.raises(InvalidInputError, match="trained and tested with an ActivationDataModule"):
        trainer().fit(ExactProbeSweep(), train_dataloaders=data.train_dataloader())


# --- ranks


def all_of(path, out, devices):
    """Fits sweeps of several kinds, an odd number of vectors and a single one among them, and writes what they found."""
    found, odd = {}, ActivationStore(path).names[:3]
    for label, kind, names in (("label", "logistic", None), ("kind", "mass-mean", odd), ("value", "ridge", ["resid_post.1/mean"])):
        data = data_of(path, label, names=names)
        sweep = run(data, ExactProbeSweep(kind, STRENGTHS), devices)
        found[label] = {
            name: (*vars(sweep.validated[name]).values(), sweep.tested[name], *vars(sweep.fitted[name]).values())
            for name in data.names
        }
        if sweep.trainer.is_global_zero:
            of_vectors, stacking = ensembles(sweep, data, probe_names(data))
            results = evaluate(sweep, data, further=of_vectors, bootstrap=Bootstrap(50))
            save_probes(out / label, sweep, data, results, data.source.info, stacking)
    torch.save(found, out / f"rank{sweep.trainer.global_rank}.pt")


RANK = """
import os, sys
from pathlib import Path
import torch
os.environ |= {environment!r}
sys.path.insert(0, {root!r})
torch.set_num_threads(1)  # as in the process of the tests: how sums are split up decides the last bits
from tests.lit_modules.probes.test_exact_probes import all_of
all_of(Path({path!r}), Path({out!r}), devices=2)
"""


def start_rank(rank, port, path, out):
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    program = RANK.format(environment=environment, root=str(Path(__file__).parents[3]), path=str(path), out=str(out))
    process = SERVER.Process(target=exec, args=(program, {"__name__": "rank"}), daemon=True)
    process.start()
    return process


def test_two_ranks_find_on_both_what_one_finds_to_the_bit(path, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    port = str(free_port())
    ranks = [start_rank(rank, port, path, two) for rank in range(2)]
    try:
        all_of(path, one, devices=1)
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    expected = torch.load(one / "rank0.pt")
    for rank in range(2):
        found = torch.load(two / f"rank{rank}.pt")
        assert found.keys() == expected.keys()
        for label, of_vectors in expected.items():
            assert found[label].keys() == of_vectors.keys()
            for name, tensors in of_vectors.items():
                assert all(torch.equal(*pair) for pair in zip(found[label][name], tensors, strict=True)), (label, name)
    for file in one.glob("*/*"):
        assert (two / file.relative_to(one)).read_bytes() == file.read_bytes(), file
