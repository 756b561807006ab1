"""Prototypes through the Trainer: scikit-learn's answers, one rank and two, any way of reading, and what stops a fit."""

import multiprocessing
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.folds import folds_of_train
from exactivations.datamodules.stored_samples import StoredSamples
from exactivations.lit_modules.moderation.aggregations import Aggregations
from exactivations.lit_modules.moderation.masked_rows import MaskedRows
from exactivations.lit_modules.moderation.moderation_results import FALSE_POSITIVES, RECALL, metrics_on, moderation_results
from exactivations.lit_modules.moderation.moderator_file import fingerprint, load_moderator, save_moderator
from exactivations.lit_modules.moderation.prototype_grid import METRICS, scores_of
from exactivations.lit_modules.moderation.prototype_moderator import PrototypeModerator
from exactivations.lit_modules.probes.probe_evaluation import Bootstrap
from exactivations.store.errors import CorruptShardError, InvalidInputError, StoreError
from tests.lit_modules.probe_stores import trainer, write_rows

LAYERS, N, WIDTH = (0, 1, 2), 390, 6


def gaussians(n_classes=2, n=N, seed=0, means=3.0):
    """Rows by vector, each with a covariance of its own and classes apart, labels, and 30 groups."""
    dice = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    rows = {}
    for layer in LAYERS:
        mixing = dice.normal(size=(WIDTH, WIDTH)) + 2 * np.eye(WIDTH)
        centres = dice.normal(size=(n_classes, WIDTH)) * 0.6 * (layer + 1)
        rows[f"resid_post.{layer}/mean"] = ((dice.normal(size=(n, WIDTH)) + centres[labels]) @ mixing + means).astype(np.float32)
    return rows, labels, [f"group {at % 30:02d}" for at in range(n)]


def store_of(path, n_classes=2, order=None, **options):
    rows, labels, groups = gaussians(n_classes)
    order = np.arange(N) if order is None else order
    words = np.array([f"class {number}" for number in labels])
    rows = {name: values[order] for name, values in rows.items()}
    kept = {"label": words[order].tolist(), "group": [groups[at] for at in order], "token_hash": [f"{at:032x}" for at in order]}
    return write_rows(path, rows, **kept, **options)


def data_of(store, batch_size=None, group="group", **options):
    return ActivationDataModule(Aggregations([store]), "label", group=group, batch_size=batch_size, **options)


def fitted(data, moderator=None, devices=1):
    moderator = moderator or PrototypeModerator()
    made = trainer(devices)
    made.fit(moderator, datamodule=data)
    made.test(moderator, datamodule=data, verbose=False)
    return moderator


def by_name(store, data, moderator, part="tested"):
    """Log-probabilities of each entry and mixture, by what the samples are called."""
    numbers = data.numbers("test")
    keys = store.samples.column("name").to_pylist() if "name" in store.samples.column_names else store.sample_index.tolist()
    found = {}
    for name in moderator.grid.names:
        values = moderator.log_probabilities(name, getattr(moderator, part))
        found[name] = {keys[place]: row for place, row in zip(numbers.tolist(), values, strict=True)}
    return found


@pytest.mark.parametrize("n_classes", [2, 3])
def test_it_is_scikit_learns_lda_and_a_direct_mahalanobis_distance(tmp_path, n_classes):
    store = store_of(tmp_path / "run", n_classes)
    data = data_of(store)
    moderator = fitted(data, PrototypeModerator(list(METRICS)))
    train, test = data.numbers("train"), data.numbers("test")
    labels = data.targets("train")[0].numpy()
    shares = np.bincount(labels) / len(labels)
    for name in data.names:
        rows = store.rows(name, np.arange(N)).double().numpy()
        means = np.stack([rows[train][labels == c].mean(0) for c in range(n_classes)])
        deviations = rows[train] - means[labels]
        n, d = deviations.shape
        within = deviations.T @ deviations
        s = within / (n - 1)
        precisions = {
            "euclidean": np.eye(d),
            "mahalanobis:ridge": d * np.linalg.inv((n - 1) * s + np.trace(s) * np.eye(d)),
            "mahalanobis:ledoit-wolf": np.linalg.inv(ledoit_wolf(deviations, assume_centered=True)[0]),
            "mahalanobis:empirical-n": np.linalg.inv(within / n),
            "mahalanobis:empirical-n-1": np.linalg.inv(s),
            "mahalanobis:empirical-n-k": np.linalg.inv(within / (n - n_classes)),
        }
        for metric, precision in precisions.items():
            gaps = rows[test][:, None] - means
            direct = np.sqrt(np.einsum("nki,ij,nkj->nk", gaps, precision, gaps))
            np.testing.assert_allclose(moderator.tested[f"{name} {metric}"].numpy(), direct, rtol=1e-9)
        oracle = LinearDiscriminantAnalysis(solver="lsqr", priors=shares).fit(rows[train], labels)
        log_p = moderator.log_probabilities(f"{name} mahalanobis:empirical-n", moderator.tested).numpy() + np.log(shares)
        expected = np.exp(log_p) / np.exp(log_p).sum(1, keepdims=True)
        np.testing.assert_allclose(expected, oracle.predict_proba(rows[test]), atol=1e-6)


@pytest.mark.parametrize("batch_size", [7, 64, N])
def test_steps_of_any_size_give_what_whole_vectors_do(tmp_path, batch_size):
    store = store_of(tmp_path / "run")
    whole, steps = data_of(store), data_of(store, batch_size)
    one, other = fitted(whole), fitted(steps)
    assert one.chosen == other.chosen
    for name in one.grid.names:
        a, b = (m.log_probabilities(name, m.tested) for m in (one, other))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert torch.equal(a.argmax(1), b.argmax(1))


def test_shards_and_order_change_no_prediction(tmp_path):
    order = np.random.default_rng(1).permutation(N)
    names = [f"sample {at}" for at in range(N)]
    stores = {
        "plain": store_of(tmp_path / "plain", name=names),
        "shards": store_of(tmp_path / "shards", n_shards=17, seed=5, name=names),
        "order": store_of(tmp_path / "order", order=order, name=[names[at] for at in order]),
    }
    found = {}
    for key, store in stores.items():
        data = data_of(store)
        found[key] = by_name(store, data, fitted(data))
    for name, plain in found["plain"].items():
        assert all(torch.equal(row, found["shards"][name][sample]) for sample, row in plain.items())  # to the last bit
        assert plain.keys() == found["order"][name].keys()  # groups make the split, and they know no order
        for sample, row in plain.items():
            torch.testing.assert_close(found["order"][name][sample], row, rtol=1e-9, atol=1e-9)
            assert found["order"][name][sample].argmax() == row.argmax()


def test_what_is_predicted_from_a_file_is_what_was_tested(tmp_path):
    store = store_of(tmp_path / "run")
    data = data_of(store)
    moderator = fitted(data)
    results = moderation_results(moderator, data, bootstrap=Bootstrap(50))
    saved = save_moderator(tmp_path / "made", moderator, data, data.source, results)
    assert saved.content["fingerprint"] == fingerprint(moderator, data_of(store), data.source)
    other = PrototypeModerator()
    other.grid = saved.grid
    trainer().predict(other, datamodule=StoredSamples(store, data.names, 50), return_predictions=False)
    test = torch.from_numpy(data.numbers("test"))
    for name in moderator.grid.names:
        predicted = other.log_probabilities(name, other.predicted)[test]
        assert torch.equal(predicted, moderator.log_probabilities(name, moderator.tested))
    first = (tmp_path / "made" / "moderator.safetensors").read_bytes()
    again = fitted(data_of(store))
    save_moderator(tmp_path / "again", again, data, data.source, results)
    assert (tmp_path / "again" / "moderator.safetensors").read_bytes() == first  # the same run: the same name and bytes
    for change in ({"seed": 1}, {"names": data.names[:2]}, {"shares": (0.5, 0.3, 0.2)}, {"batch_size": 64}):
        changed = data_of(store, **change)
        assert fingerprint(moderator, changed, changed.source) != saved.content["fingerprint"]
    known = {group for part in ("train", "validation") for group in data.groups_of(part)}
    seen = saved.seen_samples(data.source)
    assert seen.of_groups(data.groups).tolist() == [group in known for group in data.groups]
    assert len(known) < len(set(data.groups)) and not seen.of_groups(["group 99"]).any()
    damaged = bytearray(first)
    damaged[-5] ^= 1
    (tmp_path / "made" / "moderator.safetensors").write_bytes(damaged)
    with pytest.raises(CorruptShardError, match="damaged"):
        load_moderator(tmp_path / "made")


def test_results_are_chosen_on_validation_and_measured_on_test(tmp_path):
    data = data_of(store_of(tmp_path / "run"))
    moderator = fitted(data)
    results = moderation_results(moderator, data)
    truth = {part: data.targets(part)[0].numpy() for part in ("validation", "test")}
    for name in moderator.grid.names:
        scores = {
            part: (moderator.log_probabilities(name, values)[:, 1] - moderator.log_probabilities(name, values)[:, 0]).numpy()
            for part, values in (("validation", moderator.validated), ("test", moderator.tested))
        }
        assert moderator.validation[name] == pytest.approx(roc_auc_score(truth["validation"], scores["validation"]))
        if name in results.table.metrics:
            metrics, threshold = results.table.metrics[name], results.thresholds[name]
            assert metrics["auroc"].estimate == pytest.approx(roc_auc_score(truth["test"], scores["test"]))
            assert (scores["validation"][truth["validation"] == 0] > threshold).mean() <= 0.01
            assert metrics[RECALL].estimate == pytest.approx((scores["test"][truth["test"] == 1] > threshold).mean())
            assert metrics[FALSE_POSITIVES].estimate == pytest.approx((scores["test"][truth["test"] == 0] > threshold).mean())
            assert np.sum(results.confusion[name]) == len(truth["test"])
            assert results.confusion[name][1][1] == ((scores["test"] > 0) & (truth["test"] == 1)).sum()
    assert moderator.validation[moderator.chosen] == max(moderator.validation.values())
    benign = torch.from_numpy(np.flatnonzero(truth["test"] == 0))
    name, each = moderator.chosen, list(range(len(benign)))
    of_test = scores_of(moderator.log_probabilities(name, moderator.tested))
    only = metrics_on(of_test[benign], torch.zeros(len(benign)).long(), each, results.thresholds[name], Bootstrap(), 2)
    assert only.keys() == {FALSE_POSITIVES}  # harmless samples alone: nothing else is defined
    assert only[FALSE_POSITIVES].estimate == results.table.metrics[name][FALSE_POSITIVES].estimate


def test_what_makes_results_doubtful_is_said(tmp_path):
    rows, labels, groups = gaussians()
    hashes = [f"{at // 2:032x}" for at in range(N)]  # each text twice
    for column, numbers in (("group", groups), (None, np.arange(N).tolist())):
        kept = {"label": [f"class {n}" for n in labels], "group": numbers, "token_hash": hashes}
        data = data_of(write_rows(tmp_path / f"{column}", rows, **kept), group=column)
        results = moderation_results(fitted(data, PrototypeModerator(n_folds=None)), data, bootstrap=Bootstrap(50))
        found = "\n".join(results.table.warnings)
        assert "have the same tokens as a sample of train" in found
        assert "negatives, too few for a rate of 1%" in found and results.table.threshold.n_negatives < 100
        assert ("test has 6 groups only" in found) == (column is not None)
        assert ("no --group was given" in found) == (column is None)


def test_groups_that_are_numbers_are_resampled_in_the_order_of_numbers(tmp_path):
    rows, labels, _ = gaussians()
    found = []
    for name, numbers in (("numbers", [at % 30 for at in range(N)]), ("names", [f"{at % 30:02d}" for at in range(N)])):
        data = data_of(write_rows(tmp_path / name, rows, label=[f"class {n}" for n in labels], group=numbers))
        found.append(moderation_results(fitted(data, PrototypeModerator(n_folds=None)), data).table.metrics)
    assert found[0] == found[1]  # as text, 10 would come before 9


def test_imported_masks_and_own_ones_do_not_stand_for_each_other(tmp_path):
    rows, labels, groups = gaussians()
    tokens = {"resid_post.0/tokens": np.repeat(rows["resid_post.0/mean"], 2, axis=0)}  # two tokens a sample, one always content
    kept = {"label": [f"class {n}" for n in labels], "group": groups, "token_hash": [f"{at:032x}" for at in range(N)]}
    source = Aggregations([MaskedRows(write_rows(tmp_path / "run", tokens, lengths=[2] * N, **kept), ["last"])])
    data = ActivationDataModule(source, "label", group="group")
    moderator = fitted(data, PrototypeModerator(n_folds=None))
    saved = save_moderator(tmp_path / "made", moderator, data, source, moderation_results(moderator, data))
    saved.refuse_another(source, saved.best)
    source.sources[0].masks_hash = "of a file"
    with pytest.raises(InvalidInputError, match="is pooled under imported masks, and under the run's own ones in"):
        saved.refuse_another(source, saved.best)


@pytest.mark.parametrize("limit", [{"limit_train_batches": 1}, {"limit_val_batches": 1}])
@pytest.mark.parametrize("batch_size", [None, 64])
def test_a_trainer_that_does_not_read_every_sample_once_is_refused(tmp_path, limit, batch_size):
    data = data_of(store_of(tmp_path / "run"), batch_size)
    made = trainer()
    for name, value in limit.items():
        setattr(made, name, value)
    with pytest.raises(InvalidInputError, match="do not limit its batches"):
        made.fit(PrototypeModerator(), datamodule=data)


def test_sums_that_do_not_fit_into_memory_are_refused_at_the_start(tmp_path, monkeypatch):
    store = store_of(tmp_path / "run")
    of_one = 8 * 5 * 2 * WIDTH**2
    monkeypatch.setattr(
        "exactivations.lit_modules.moderation.prototype_moderator.psutil.virtual_memory",
        lambda: SimpleNamespace(available=2 * of_one),
    )
    with pytest.raises(InvalidInputError, match=r"the sums of 3 vectors x 2 classes x 5 folds on 1 devices take .*--batch-size"):
        trainer().fit(PrototypeModerator(), datamodule=data_of(store, 64))
    moderator = PrototypeModerator()
    moderator.trainer = trainer()
    moderator.trainer.datamodule = data_of(store)
    moderator.on_fit_start()  # whole vectors come one at a time


def test_no_group_straddles_folds_and_mixtures_are_of_held_out_probabilities(tmp_path):
    data = data_of(store_of(tmp_path / "run"))
    folds = folds_of_train(data, 5)
    groups = np.array(data.groups_of("train"))
    assert all(len(set(folds[groups == name])) == 1 for name in groups) and set(folds) == set(range(5))
    labels = data.targets("train")[0].numpy()
    assert all((np.bincount(labels[folds == fold], minlength=2) > 0).all() for fold in range(5))
    noise = torch.randn(len(data.source), 40, generator=torch.Generator().manual_seed(0))
    data.add("resid_post.9/mean", noise)  # many dimensions of noise: by its own training rows it would look best of all
    moderator = fitted(data)
    weights = moderator.grid.mixtures["MLPM/mean mahalanobis:ledoit-wolf"]
    weight_of = dict(zip(weights.vectors, weights.weights.layer_weights.tolist(), strict=True))
    assert weight_of["resid_post.9/mean"] < 0.1 * max(weight_of.values())


def test_a_shard_that_cannot_be_read_stops_the_fit_by_name(tmp_path):
    for how in ("truncated", "removed", "another"):
        store = store_of(tmp_path / how)
        path = tmp_path / how / "shards" / "00001.safetensors"
        if how == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        elif how == "removed":
            path.unlink()
        else:
            path.write_bytes((tmp_path / how / "shards" / "00002.safetensors").read_bytes())
        with pytest.raises(StoreError, match=r"00001\.safetensors"):
            fitted(data_of(store))


def test_what_cannot_be_moderated_is_refused_by_name(tmp_path):
    rows, labels, groups = gaussians()
    words = [f"class {number}" for number in labels]

    def refused(match, moderator=None, label=words, group=groups, changed=None, **options):
        refused.number += 1
        store = write_rows(tmp_path / str(refused.number), changed or rows, label=label, group=group)
        with pytest.raises(InvalidInputError, match=match):
            fitted(data_of(store, **options), moderator)

    refused.number = 0
    refused("one", label=["class 0"] * N)
    refused("class 'class 1' is absent from", label=["class 1" if at < 2 else "class 0" for at in range(N)])
    rare = ["class 1" if name in groups[:3] else "class 0" for name in groups]
    refused("class 'class 1' of label is in one fold of train only", label=rare)
    refused("cannot be dealt to 50 folds", PrototypeModerator(n_folds=50))
    nan = {name: values.copy() for name, values in rows.items()}
    nan["resid_post.1/mean"][7] = np.nan
    refused(r"sample 7: resid_post\.1/mean is not finite", changed=nan)
    flat = {name: values.copy() for name, values in rows.items()}
    flat["resid_post.2/mean"][:, 3] = 1.0
    refused(
        r"resid_post\.2/mean: .*not positive definite.*classes of label: 0 is 'class 0', 1 is 'class 1'",
        PrototypeModerator(["mahalanobis:empirical-n"]), changed=flat,
    )  # fmt: skip
    with pytest.raises(InvalidInputError, match="metrics must be some of"):
        PrototypeModerator(["cosine"])
    with pytest.raises(InvalidInputError, match="no moderator 'x'"):
        PrototypeModerator().grid.entries_of("x")


SERVER = multiprocessing.get_context("forkserver")  # imports once, and forks each rank from that
SERVER.set_forkserver_preload(
    ["exactivations.lit_modules.moderation.prototype_moderator", "hypothesis", "pytest", "sklearn.discriminant_analysis"]
)
RANK = """
import os, sys
sys.path.insert(0, {root!r})
os.environ.update({environment!r})
from tests.lit_modules.moderation.test_prototype_moderator import fit_and_save
fit_and_save({run!r}, {out!r}, {devices})
"""


def fit_and_save(run, out, devices):
    """Fits whole vectors, and in steps, and writes what came of it."""
    from exactivations.store.activation_store import ActivationStore

    torch.set_num_threads(1)
    store, found = ActivationStore(run), {}
    for kind, batch_size in (("whole", None), ("steps", 23)):
        data = data_of(store, batch_size, names=[f"resid_post.{at}/mean" for at in LAYERS[:3]])
        moderator = fitted(data, devices=devices)
        of_all = {name: moderator.log_probabilities(name, moderator.tested) for name in moderator.grid.names}
        means = {name: made["euclidean"].means for name, made in moderator.grid.prototypes.items()}
        factors = {name: made["mahalanobis:ledoit-wolf"].factor for name, made in moderator.grid.prototypes.items()}
        again = PrototypeModerator()
        again.grid = moderator.grid
        trainer(devices).predict(again, datamodule=StoredSamples(store, data.names, 40), return_predictions=False)
        found[kind] = {
            "tested": of_all,
            "means": means,
            "factors": factors,
            "predicted": again.predicted,
            "chosen": moderator.chosen,
        }
    if moderator.global_rank == 0:
        torch.save(found, out)


def test_two_ranks_make_the_prototypes_of_one_and_of_whole_data(tmp_path):
    store = store_of(tmp_path / "run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        environment = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0", "LOCAL_RANK": str(rank)
        }  # fmt: skip
        program = RANK.format(
            root=str(Path(__file__).parents[3]), environment=environment, run=str(tmp_path / "run"), out=str(tmp_path / "two"),
            devices=2,
        )  # fmt: skip
        processes.append(SERVER.Process(target=exec, args=(program, {"__name__": "rank"}), daemon=True))
        processes[-1].start()
    fit_and_save(tmp_path / "run", tmp_path / "one", 1)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    data = data_of(store)
    train, labels = data.numbers("train"), data.targets("train")[0].numpy()
    for kind in ("whole", "steps"):
        assert one[kind]["chosen"] == two[kind]["chosen"]
        for what in ("tested", "means", "factors", "predicted"):
            for name, values in one[kind][what].items():
                other = two[kind][what][name]
                if kind == "whole":
                    assert torch.equal(values, other)  # a vector is one rank's: to the last bit
                torch.testing.assert_close(values, other, rtol=1e-10, atol=1e-10)
        for name, means in two[kind]["means"].items():
            rows = store.rows(name, train).double().numpy()
            whole = np.stack([rows[labels == c].mean(0) for c in range(2)])
            np.testing.assert_allclose(means.numpy(), whole, rtol=1e-10)
            covariance = ledoit_wolf(rows - whole[labels], assume_centered=True)[0]
            factor = two[kind]["factors"][name].numpy()
            np.testing.assert_allclose(factor @ factor.T, covariance, rtol=1e-10, atol=1e-10 * np.abs(covariance).max())
