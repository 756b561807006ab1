"""A saved probe scores as the one that was tested, and a file that is not whole, or is something else, is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.splits import Split
from exactivations.lit_modules.probes.exact_probes import ExactProbeSweep
from exactivations.lit_modules.probes.layer_ensembles import AVERAGE, STACKED, ensembles
from exactivations.lit_modules.probes.probe_evaluation import Bootstrap, evaluate, probe_names
from exactivations.lit_modules.probes.probe_file import PROBES_FILE, load_probes, save_probes
from exactivations.lit_modules.probes.probe_metrics import threshold_at_fpr
from exactivations.store.errors import CorruptShardError, InvalidInputError, StoreError
from exactivations.store.shard import open_shard, write_shard
from tests.lit_modules.probe_stores import STRENGTHS, N, demo_like, run, write_rows

HASHES = [f"{place:032x}" for place in range(N)]
KINDS = {"label": "logistic", "kind": "mass-mean", "value": "ridge"}


@pytest.fixture(scope="module", params=KINDS)
def saved(tmp_path_factory, request):
    """A folder of probes, the sweep and the data that they are of, the ensembles' scores, and the results."""
    label, path = request.param, tmp_path_factory.mktemp("runs")
    rows, columns = demo_like()
    store = write_rows(path / "demo", rows, sample_index=range(7, 7 + 2 * len(columns["label"]), 2), token_hash=HASHES, **columns)
    data = ActivationDataModule(store, label, group="module", others={"untrained": store}, seed=4, names=list(rows)[1:3])
    data.add("baseline: bag", store.pooled("resid_post.0", "mean"))
    sweep = run(data, ExactProbeSweep(KINDS[label], STRENGTHS))
    further, stacking = ensembles(sweep, data, probe_names(data))
    results = evaluate(sweep, data, further=further, bootstrap=Bootstrap(50))
    save_probes(path / "probes", sweep, data, results, store.info, stacking)
    return path / "probes", sweep, data, further, results


def rows_of(data, names, part):
    return {name: data.source.rows(name, data.numbers(part)) for name in names}


def test_scores_from_the_file_are_those_that_were_validated_and_tested(saved):
    folder, sweep, data, further, _ = saved
    probes = load_probes(folder)
    for part, of_sweep in (("validation", {n: v.scores for n, v in sweep.validated.items()}), ("test", sweep.tested)):
        for name in probe_names(data):
            assert probes.vectors_of(name) == [name]
            assert torch.equal(probes.scores(name, rows_of(data, [name], part)), of_sweep[name][0])
        for name in (AVERAGE, STACKED):
            assert probes.vectors_of(name) == probe_names(data)
            expected = getattr(further[name], part)
            if expected is not None:
                assert torch.equal(probes.scores(name, rows_of(data, probe_names(data), part)), expected)
    name = probe_names(data)[0]
    scores = sweep.tested[name][0].double()
    expected = {2: lambda: scores[:, 0].sigmoid(), 3: lambda: scores.softmax(1), 0: lambda: scores[:, 0]}[len(data.classes)]()
    found = probes.probabilities(name, rows_of(data, [name], "test"))
    assert found.dtype == torch.float64 and torch.equal(found, expected)


def test_what_is_known_of_the_probes_is_in_the_file_and_beside_it_for_people(saved):
    folder, sweep, data, _, results = saved
    probes = load_probes(folder / PROBES_FILE)
    readable = json.loads((folder / "probes.json").read_text())
    assert readable == {key: value for key, value in probes.content.items() if key != "checksum"}
    assert probes.content["best"] == results.best and probes.classes == data.classes and not probes.scored_per_token
    assert list(probes.content["vectors"]) == probe_names(data)  # neither baselines nor controls
    for name, known in probes.content["vectors"].items():
        assert f"{known['hook_point']}/{known['pooling']}" == name
        valid = sweep.validated[name]
        assert known["strength"] == sweep.settings[int(valid.chosen[0])].strength
        assert known[f"validation_{results.headline}"] == float(valid.values[0].max())
        threshold = probes.threshold_of(name)
        if len(data.classes) == 2:
            expected = threshold_at_fpr(valid.scores[0, :, 0], data.targets("validation")[0], 0.01)
            assert threshold == known["threshold"] == expected
        else:
            assert threshold is None
    if len(data.classes) == 2:
        assert probes.threshold_of(results.best) == results.threshold.value
    assert probes.threshold_of(AVERAGE) is None
    split = Split.from_json(json.loads((folder / "split.json").read_text()), data.source.sample_index)
    for part in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(split, part), data.numbers(part))
    how = "shares 0.6, 0.2, 0.2, seed 4"
    assert probes.content["split"] == {"group_column": "module", "shares": [0.6, 0.2, 0.2], "seed": split.seed, "how": how}
    assert split.seed == 4


def test_a_probes_direction_is_where_its_score_rises_fastest(saved):
    """By automatic differentiation of what it says of rows: the gradient does not depend on where it is taken."""
    folder, _, data, _, _ = saved
    probes, name = load_probes(folder), probe_names(data)[0]
    rows = rows_of(data, [name], "test")[name].double().requires_grad_()
    scores = probes.scores(name, {name: rows}).double()
    for number, label in enumerate(probes.classes if len(probes.classes) > 2 else [None]):
        score = scores[:, 0] if label is None else scores[:, number] - scores.mean(dim=1)
        (gradient,) = torch.autograd.grad(score.sum(), rows, retain_graph=True)
        found = probes.direction(name, label)
        assert found.dtype == torch.float32 and found.shape == gradient[0].shape
        assert torch.allclose(found.double(), torch.nn.functional.normalize(gradient)[0], atol=1e-5)
    if len(probes.classes) == 2:
        assert torch.equal(probes.direction(name, probes.classes[1]), found)
        assert torch.equal(probes.direction(name, probes.classes[0]), -found)
    with pytest.raises(InvalidInputError, match="no class 'maybe'"):
        probes.direction(name, "maybe")
    with pytest.raises(InvalidInputError, match="no single linear probe"):
        probes.direction(AVERAGE)
    for further, message in (({"hidden_weight": rows}, "no single linear probe"), ({"query": rows}, "no single linear probe")):
        with pytest.raises(InvalidInputError, match=message):
            replace(probes, tensors={name: probes.tensors[name] | further}).direction(name)
    nothing = replace(probes, tensors={name: probes.tensors[name] | {"weight": 0 * probes.tensors[name]["weight"]}})
    with pytest.raises(InvalidInputError, match="all zero"):
        nothing.direction(name, probes.classes[0] if probes.classes else None)
    if len(probes.classes) > 2:
        with pytest.raises(InvalidInputError, match="say which: a, b, c"):
            probes.direction(name)


def test_no_byte_can_be_changed_unseen(saved, tmp_path):
    folder, *_ = saved
    whole = (folder / PROBES_FILE).read_bytes()
    expected, file = load_probes(folder), tmp_path / PROBES_FILE
    rng, refused = np.random.default_rng(0), 0
    places = np.concatenate([np.arange(16), rng.choice(len(whole), 400, replace=False)])
    for place in places.tolist():
        changed = bytearray(whole)
        changed[place] ^= int(rng.choice([1 << rng.integers(8), rng.integers(1, 256)]))
        file.write_bytes(changed)
        try:
            found = load_probes(file)
        except CorruptShardError as error:
            assert str(error).startswith(f"{file} is damaged, or was not written by `exactivations probe`")
            refused += 1
        else:  # such as 1E-05 for 1e-05 in the header: other letters that say the same
            assert found.content == expected.content and found.tensors.keys() == expected.tensors.keys()
            for name, tensors in expected.tensors.items():
                assert all(torch.equal(found.tensors[name][key], tensor) for key, tensor in tensors.items())
    assert refused >= len(places) - 4
    for end in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:end])
        with pytest.raises(CorruptShardError, match="is damaged"):
            load_probes(file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(CorruptShardError, match="is damaged"):
        load_probes(file)


def test_other_files_and_probes_that_are_not_there_are_refused(saved, tmp_path):
    folder, *_ = saved
    probes = load_probes(folder)
    with pytest.raises(
        InvalidInputError, match=r"has no probe 'resid_post.9/mean'; it has resid_post.1/mean, .*, ensemble: stacked"
    ):
        probes.vectors_of("resid_post.9/mean")
    with pytest.raises(StoreError, match="does not exist: name what `exactivations probe` wrote"):
        load_probes(tmp_path)
    tensors, content = open_shard(folder / PROBES_FILE)
    for changes in ({"kind": "means"}, {"format_version": 1}):
        write_shard(tmp_path / PROBES_FILE, tensors, {key: v for key, v in content.items() if key != "checksum"} | changes)
        with pytest.raises(StoreError, match="holds no probes of version 2"):
            load_probes(tmp_path)


def test_one_vector_alone_has_no_ensembles(tmp_path):
    rows, columns = demo_like()
    store = write_rows(tmp_path / "demo", rows, token_hash=HASHES, **columns)
    data = ActivationDataModule(store, "label", group="module", names=["resid_post.2/mean"])
    sweep = run(data)
    save_probes(tmp_path / "probes", sweep, data, evaluate(sweep, data, bootstrap=Bootstrap(50)), store.info, None)
    probes = load_probes(tmp_path / "probes")
    name = "resid_post.2/mean"
    assert torch.equal(probes.scores(name, rows_of(data, [name], "test")), sweep.tested[name][0])
    with pytest.raises(InvalidInputError, match=r"has no probe 'ensemble: average'; it has resid_post.2/mean$"):
        probes.vectors_of(AVERAGE)
