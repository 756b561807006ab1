"""Probes trained in steps: known optima, a plain loop, ragged attention, the same on two ranks and after a kill."""

import itertools
import multiprocessing
import socket
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.lit_modules.probes.probe_heads import AttentionProbes, probe_of_state, scores_of
from exactivations.lit_modules.probes.trained_probes import TrainedProbeSweep
from exactivations.store.errors import InvalidInputError


class InMemory:
    """Activations that a test made, by name: of a row for each sample, or for each token."""

    title = "made"

    def __init__(self, activations, labels, n_tokens=None, content=None):
        n = len(labels)
        self.activations, self.sample_index = activations, np.arange(n)
        lengths = np.ones(n, dtype=np.int64) if n_tokens is None else n_tokens
        self.content = torch.ones(int(lengths.sum()), dtype=torch.bool) if content is None else content
        self.token_start = np.concatenate([[0], np.cumsum(lengths)])
        self.per_token = dict.fromkeys(activations, n_tokens is not None)
        hashes = [str(i) for i in range(n)]
        self.samples = pa.table({"sample_index": self.sample_index, "n_tokens": lengths, "token_hash": hashes, "label": labels})

    def rows(self, name, numbers):
        return self.activations[name][torch.from_numpy(numbers)]

    def are_content(self, numbers):
        return self.content[torch.from_numpy(numbers)]

    def __len__(self):
        return len(self.sample_index)


def pooled(n_classes=2, n=302, width=6, seed=0):
    """Two vectors, of which the second has a dimension that does not vary, and noisy labels; values if there are no classes."""
    dice = torch.Generator().manual_seed(seed)
    first = torch.randn(n, width, generator=dice) * torch.logspace(-1, 2, width) + 5
    scores = (first - 5) / torch.logspace(-1, 2, width) @ torch.randn(width, max(2, n_classes), generator=dice)
    noisy = scores + torch.randn(scores.shape, generator=dice)
    second = torch.cat([torch.randn(n, 3, generator=dice) + scores[:, :1], torch.full((n, 1), 0.1)], dim=1)
    labels = noisy.argmax(1).numpy() if n_classes else (1000 + 30 * noisy[:, 0]).double().numpy()
    return InMemory({"first": first, "second": second}, labels)


def planted(n=240, width=5, seed=0):
    """Ragged tokens of which one in each sample, that a key marks, tells the label; the others say anything."""
    dice = np.random.default_rng(seed)
    lengths, labels = dice.integers(5, 30, n), dice.integers(0, 2, n)
    rows = dice.normal(size=(lengths.sum(), width)).astype(np.float32)
    rows[:, 0], rows[:, 1] = dice.choice([-1, 1], len(rows)), 0
    at = np.cumsum(lengths) - lengths + dice.integers(1, lengths)
    rows[at, 0], rows[at, 1] = 2 * labels - 1, 1
    content = torch.ones(len(rows), dtype=torch.bool)
    content[np.cumsum(lengths) - lengths] = False  # the first of each is a special token, and does not count
    rows[~content.numpy()] = 1e3
    return InMemory({"tokens": torch.from_numpy(rows)}, labels, lengths, content), torch.from_numpy(at)


def data_of(source, batch_size=64, **options):
    return ActivationDataModule(source, "label", seed=1, batch_size=batch_size, **options)


def trainer_of(max_epochs, **options):
    options = {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1, **options}
    return pl.Trainer(
        max_epochs=max_epochs, logger=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def trained(sweep, data, max_epochs, **options):
    trainer = trainer_of(max_epochs, **options)
    trainer.fit(sweep, datamodule=data)
    return trainer


def at_the_end(sweep):
    """The parameters after the last step, and not the best."""
    return {name: {key: tensor.detach().clone() for key, tensor in head.trained.items()} for name, head in sweep._by_name.items()}


def standardised(source, name, data, part):
    rows = source.activations[name].double().numpy()
    train = rows[data.numbers("train")]
    varies = train.std(axis=0) > 1e-9
    return (rows[data.numbers(part)] - train.mean(axis=0)) / np.where(varies, train.std(axis=0), 1) * varies


@pytest.mark.parametrize(
    ("n_classes", "balanced", "batch_size", "max_epochs", "tolerance"),
    # Steps of a part of the examples are noisy until the rate has fallen to 0. Weights of shuffled labels are small and feel it
    # most; of AUROC, one pair of the 60 test samples is 1e-3.
    [(2, False, 64, 80, 2e-2), (2, True, 200, 200, 2e-3), (3, False, 200, 200, 2e-3), (0, False, 200, 200, 2e-3)],
)
def test_linear_probes_reach_scikit_learns_optimum(n_classes, balanced, batch_size, max_epochs, tolerance):
    source = pooled(n_classes)
    data, strengths = data_of(source, batch_size, n_shuffles=1), [0.003, 0.3]
    kind = "logistic" if n_classes else "linear"
    sweep = TrainedProbeSweep(kind, strengths, learning_rate=0.1, balanced=balanced, patience=None)
    trained(sweep, data, max_epochs)
    labels = data.targets("train").numpy()
    for name, (v, (s, strength)) in itertools.product(data.names, itertools.product(range(2), enumerate(strengths))):
        oracle = (
            LogisticRegression(C=strength, tol=1e-10, max_iter=10_000, class_weight="balanced" if balanced else None)
            if n_classes
            else Ridge(alpha=1 / strength)
        )
        oracle.fit(standardised(source, name, data, "train"), labels[v])
        found, probes, allowed = np.atleast_2d(oracle.coef_), sweep.probes(name), tolerance * (1 + 3 * v)
        assert np.linalg.norm(probes.weight[v, s].detach().numpy() - found) <= allowed * np.linalg.norm(found)
        test = source.rows(name, data.numbers("test"))
        scores = probes.scores(test)[v, s].detach().numpy()
        expected = standardised(source, name, data, "test") @ found.T + oracle.intercept_
        if n_classes == 2:
            truth = data.targets("test")[v].numpy()
            assert roc_auc_score(truth, scores[:, 0]) == pytest.approx(
                roc_auc_score(truth, expected[:, 0]), abs=max(1e-3, tolerance / 4)
            )
        free = n_classes > 2  # softmax leaves a constant free
        np.testing.assert_allclose(
            scores - free * scores.mean(1, keepdims=True), expected - free * expected.mean(1, keepdims=True),
            atol=4 * allowed * expected.std(), rtol=0,
        )  # fmt: skip
    assert sweep.probes("second").weight[..., -1].abs().max() < 1e-6  # what does not vary in training says nothing


def test_a_probe_among_many_is_what_a_plain_loop_makes_of_it_and_its_best_epoch_is_kept():
    source, epochs = pooled(n=201), 12
    data = data_of(source, n_shuffles=1)
    sweep = TrainedProbeSweep("mlp", (0.01, 1.0), (3, 4), n_hidden=8, activation="relu", patience=None)
    trained(sweep, data, epochs)
    v, s, name, strength = 1, 3, "first", 1.0  # shuffled labels, strength 1.0, seed 4
    alone = TrainedProbeSweep("mlp", (strength,), (4,), n_hidden=8)
    alone.trainer = trainer_of(1)
    alone.trainer.datamodule = data
    alone.configure_model()  # untrained: only its start is used
    begin = {key: tensor[0, 0].detach() for key, tensor in alone._by_name[name].trained.items()}
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)).double()
    with torch.no_grad():
        keys = ("hidden_weight", "hidden_bias", "weight", "bias")
        for parameter, key in zip(model.parameters(), keys, strict=True):
            assert begin[key].abs().max() <= (6 if "hidden" in key else 8) ** -0.5  # as torch.nn.Linear starts
            parameter.copy_(begin[key])
    rows = {part: torch.from_numpy(standardised(source, name, data, part)) for part in ("train", "validation")}
    labels, numbers = data.targets("train")[v].double(), data.numbers("train")
    loader = data.train_dataloader()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    values, after = [], []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for step, _ in loader.sampler:
            at = torch.from_numpy(np.searchsorted(numbers, step))
            squares = sum(p.square().sum() for p in model.parameters() if p.ndim == 2)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(rows["train"][at])[:, 0], labels[at])
            optimizer.zero_grad()
            (loss + squares / (2 * strength * len(labels))).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            values.append(roc_auc_score(data.targets("validation")[v], model(rows["validation"])[:, 0].float()))
        after.append([p.detach().clone() for p in model.parameters()])
    best = int(np.argmax(values))
    assert 0 < best < epochs - 1, "the case shows nothing: the best epoch is the first or the last"
    assert float(sweep.validated[name].values[v, s]) == pytest.approx(values[best], abs=1e-12)
    for key, last, kept in zip(keys, after[-1], after[best], strict=True):
        torch.testing.assert_close(sweep._by_name[name].trained[key][v, s], last, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(sweep._kept[name][key][v, s], kept, rtol=1e-6, atol=1e-7)


def test_attention_finds_the_one_token_that_tells_and_the_mean_of_tokens_does_not():
    source, at = planted()
    data = data_of(source, 32, over_tokens=True)
    sweep = TrainedProbeSweep("attention", (1e3,), learning_rate=0.1)
    trained(sweep, data, 40).test(sweep, datamodule=data, verbose=False)
    truth = data.targets("test")[0]
    assert roc_auc_score(truth, sweep.tested["tokens"][0, :, 0]) > 0.99
    probe = probe_of_state("attention", sweep.state()["tokens"])
    test = data.numbers("test")
    batch = data.examples("test", data.names, test)
    attention = probe.attention(batch.rows["tokens"], batch.n_tokens)[0, 0]
    most = torch.stack([of_sample.argmax() for of_sample in attention.split(batch.n_tokens.tolist())])
    first = torch.from_numpy(source.token_start[test]) + 1  # of each sample's content tokens
    assert torch.equal(most, at[torch.from_numpy(test)] - first)
    starts = source.token_start
    means = [source.activations["tokens"][a + 1 : b].mean(0) for a, b in itertools.pairwise(starts)]
    mean_data = data_of(InMemory({"mean": torch.stack(means)}, source.samples["label"].to_numpy()))
    plain = TrainedProbeSweep("logistic", (0.1, 10.0))
    trained(plain, mean_data, 40).test(plain, datamodule=mean_data, verbose=False)
    assert roc_auc_score(mean_data.targets("test")[0], plain.tested["mean"][0, :, 0]) < 0.8


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6), size=st.sampled_from([1.0, 1e4]), seed=st.integers(0, 99))
def test_ragged_attention_and_its_gradients_are_those_of_a_loop_over_samples(lengths, size, seed):
    dice = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=dice, dtype=torch.float64)

    mean, scale, rows = draw(4), draw(4).abs() + 0.5, draw(sum(lengths), 4)
    query, weight, bias = (
        (size**power * draw(2, 3, *shape)).requires_grad_() for power, shape in ((1, (4,)), (0, (2, 4)), (0, (2,)))
    )
    probes, n_tokens = AttentionProbes(mean, scale, query, weight, bias), torch.tensor(lengths)
    pieces, weights = [], []
    for tokens in torch.split((rows - mean) / scale, lengths):
        attention = torch.softmax(torch.einsum("td,vsd->vst", tokens, query), dim=-1)
        pieces.append(torch.einsum("vst,td,vskd->vsk", attention, tokens, weight) + bias)
        weights.append(attention)
    expected, by = torch.stack(pieces, dim=2), draw(2, 3, len(lengths), 2)
    found = probes.scores(rows, n_tokens)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(probes.attention(rows, n_tokens), torch.cat(weights, dim=2), rtol=1e-9, atol=1e-12)
    grads = [torch.autograd.grad((scores * by).sum(), (query, weight, bias)) for scores in (found, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "n_classes"), [("logistic", 3), ("linear", 0), ("mlp", 2), ("mlp", 0), ("attention", 2)])
def test_what_is_saved_scores_as_the_sweep_did(kind, n_classes):
    source = planted()[0] if kind == "attention" else pooled(n_classes)
    data = data_of(source, 50, over_tokens=kind == "attention", n_shuffles=1)
    sweep = TrainedProbeSweep(kind, n_hidden=8, seeds=(0, 1), activation="relu")
    trained(sweep, data, 5).test(sweep, datamodule=data, verbose=False)
    for name, state in sweep.state().items():
        assert all(tensor.dtype == torch.float64 and tensor.isfinite().all() for tensor in state.values())
        batch = data.examples("test", [name], data.numbers("test"))
        scores = scores_of(probe_of_state(kind, state, "relu"), batch.rows[name], batch.n_tokens)[0, 0]
        torch.testing.assert_close(scores, sweep.tested[name][0], rtol=1e-6, atol=1e-6)
    assert scores.std() > 0


class Crash(pl.Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 3:
            raise RuntimeError("killed")


def test_training_that_was_killed_goes_on_from_the_checkpoint_to_the_same_end(tmp_path):
    def parts(**options):
        return TrainedProbeSweep("mlp", (0.1, 1.0), n_hidden=8, patience=4, **options), data_of(pooled(), n_shuffles=1)

    whole, data = parts()
    trained(whole, data, 9).test(whole, datamodule=data, verbose=False)
    killed, data = parts()
    keeper = ModelCheckpoint(tmp_path, save_last=True)
    with pytest.raises(RuntimeError, match="killed"):
        trained(killed, data, 9, enable_checkpointing=True, callbacks=[keeper, Crash()])
    resumed, data = parts()
    trainer = trainer_of(9)
    trainer.fit(resumed, datamodule=data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert trainer.global_step == 9 * 3
    trainer.test(resumed, datamodule=data, verbose=False)
    for name in data.names:
        assert torch.equal(resumed.tested[name], whole.tested[name])
        assert torch.equal(resumed.validated[name].values, whole.validated[name].values)
        assert all(torch.equal(tensor, whole._kept[name][key]) for key, tensor in resumed._kept[name].items())
    other = TrainedProbeSweep("mlp", (0.1, 2.0), n_hidden=8)
    with pytest.raises(InvalidInputError, match=r"checkpoint is of other probes: its settings is .*1\.0"):
        trainer_of(9).fit(other, datamodule=parts()[1], ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_training_ends_when_no_probe_becomes_better():
    source = pooled()
    source.activations = {"easy": torch.tensor(source.samples["label"].to_pylist())[:, None].float()}
    source.per_token = {"easy": False}
    sweep = TrainedProbeSweep("logistic", (1.0,), patience=3)
    trainer = trained(sweep, data_of(source), 50)
    assert trainer.current_epoch <= 6 and sweep.validated["easy"].values.min() == 1


def refused(message, sweep, data, **options):
    with pytest.raises(InvalidInputError, match=message):
        trained(sweep, data, 1, **options)


def test_what_cannot_be_trained_is_refused():
    classes, values, tokens = pooled(2), pooled(0), planted()[0]
    refused("give the data module a batch_size", TrainedProbeSweep("mlp"), data_of(classes, None))
    refused("all content tokens.*over_tokens=True", TrainedProbeSweep("attention"), data_of(classes))
    refused("one row an example.*over_tokens=False", TrainedProbeSweep("mlp"), data_of(tokens, over_tokens=True))
    refused("logistic probes .* label, which has real values", TrainedProbeSweep("logistic"), data_of(values))
    refused("linear probes .* label, which has classes", TrainedProbeSweep("linear"), data_of(classes))
    refused("balanced mlp .* real values", TrainedProbeSweep("mlp", balanced=True), data_of(values))
    refused("float64.*got 32-true and 1.0", TrainedProbeSweep("mlp"), data_of(classes), gradient_clip_val=1.0)
    tokens.content[tokens.token_start[7] : tokens.token_start[8]] = False
    refused("sample 7 has no content token", TrainedProbeSweep("attention"), data_of(tokens, over_tokens=True))
    for options in (
        {"kind": "ridge"},
        {"kind": "mlp", "n_hidden": 0},
        {"kind": "mlp", "patience": 0},
        {"kind": "mlp", "strengths": []},
    ):
        with pytest.raises(InvalidInputError, match="must be"):
            TrainedProbeSweep(**options)


SERVER = multiprocessing.get_context("forkserver")  # imports once, and forks each rank from that
SERVER.set_forkserver_preload(["exactivations.lit_modules.probes.trained_probes", "hypothesis", "pytest", "sklearn.linear_model"])
RANK = """
import os, sys
sys.path.insert(0, {root!r})
os.environ.update({environment!r})
from tests.lit_modules.probes.test_trained_probes import fit_and_save
fit_and_save({out!r}, {devices})
"""


def fit_and_save(out, devices):
    """Trains an mlp, and attention, and writes what came of it. The last step has one example, so the second rank has none."""
    torch.set_num_threads(1)
    found = {}
    for kind, source in (("mlp", pooled()), ("attention", planted()[0])):
        data = data_of(source, 20 if kind == "mlp" else 11, over_tokens=kind == "attention", n_shuffles=1)
        sweep = TrainedProbeSweep(kind, n_hidden=8, seeds=(0, 1))
        trained(sweep, data, 4, devices=devices).test(sweep, datamodule=data, verbose=False)
        assert len(data.numbers("train")) % data.batch_size == 1
        auroc = {name: roc_auc_score(data.targets("test")[0], scores[0, :, 0]) for name, scores in sweep.tested.items()}
        moments = {name: (head.mean, head.scale) for name, head in sweep._by_name.items()}
        found[kind] = {"auroc": auroc, "moments": moments, "last": sweep._kept, "state": sweep.state()}
    if sweep.global_rank == 0:
        torch.save(found, out)


def test_two_ranks_train_the_probes_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": "2",
            "NODE_RANK": "0",
            "LOCAL_RANK": str(rank),
        }
        program = RANK.format(root=str(Path(__file__).parents[3]), environment=environment, out=str(tmp_path / "two"), devices=2)
        processes.append(SERVER.Process(target=exec, args=(program, {"__name__": "rank"}), daemon=True))
        processes[-1].start()
    fit_and_save(tmp_path / "one", 1)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    for kind in one:
        for name, auroc in one[kind]["auroc"].items():
            assert two[kind]["auroc"][name] == pytest.approx(auroc, abs=1e-5)
            assert all(torch.equal(a, b) for a, b in zip(one[kind]["moments"][name], two[kind]["moments"][name], strict=True))
            for what in ("last", "state"):
                for key, tensor in one[kind][what][name].items():
                    torch.testing.assert_close(two[kind][what][name][key], tensor, rtol=1e-9, atol=1e-11)
