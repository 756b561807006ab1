"""Texts are scored as they were in training, by a model of no more blocks than it takes, which must be the same one."""

from dataclasses import replace

import datasets
import pytest
import torch
from transformers import GPT2Model

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.plan import PlanOptions
from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import TextOptions
from exactivations.lit_modules.extraction.extractor import ActivationExtractor
from exactivations.lit_modules.extraction.live_activations import LiveActivations
from exactivations.lit_modules.extraction.origin import Samples
from exactivations.lit_modules.extraction.run_description import run_info
from exactivations.lit_modules.models.language_model import ModelOptions
from exactivations.lit_modules.probes.exact_probes import ExactProbeSweep
from exactivations.lit_modules.probes.layer_ensembles import AVERAGE, STACKED, ensembles
from exactivations.lit_modules.probes.probe_evaluation import Bootstrap, evaluate, probe_names
from exactivations.lit_modules.probes.probe_file import load_probes, save_probes
from exactivations.lit_modules.probes.probe_scores import probabilities
from exactivations.lit_modules.probes.scoring import Scorer
from exactivations.lit_modules.probes.trained_probes import TrainedProbeSweep
from exactivations.store.errors import IdentityError, InvalidInputError
from tests.datamodules.conftest import make_word_tokenizer
from tests.lit_modules.probe_stores import STRENGTHS, WORDS, run, save_model, texts_of

TEXTS, LABELS, LETTERS = texts_of(120)
POINTS = ["resid_post.0", "resid_post.1", "final_norm"]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def trained(model, path, label="label", sweep=None, poolings=("mean",), text=None, dtype="auto", max_epochs=1, **options):
    """Trains on live activations and saves; returns the folder, the sweep, the data, and the scores of ensembles."""
    columns = {"body": TEXTS, "label": LABELS, "letters": LETTERS, "module": [f"m{i % 40}" for i in range(len(TEXTS))]}
    texts = TextDataModule(
        datasets.Dataset.from_dict(columns), model, text=text or TextOptions("body"), plan_options=PlanOptions(60, 90)
    )
    extractor = ActivationExtractor(model, POINTS, list(poolings), options=ModelOptions(dtype=dtype))
    data = ActivationDataModule(LiveActivations(extractor, texts), label, group="module", **options)
    sweep = run(data, sweep or ExactProbeSweep("logistic", STRENGTHS), max_epochs=max_epochs)
    further, stacking = ensembles(sweep, data, probe_names(data))
    results = evaluate(sweep, data, further=further, bootstrap=Bootstrap(50))
    save_probes(path, sweep, data, results, run_info(extractor, texts, extractor.specs()), stacking)
    return path, sweep, data, further


@pytest.fixture(scope="module")
def pooled(model, tmp_path_factory):
    return trained(model, tmp_path_factory.mktemp("probes") / "pooled")


def scored(folder, texts, vector=None, **options):
    """Scores texts; returns the samples in their order."""
    scorer = Scorer(load_probes(folder), vector, **options)
    found = sorted(scorer.score(scorer.data_of(Samples(texts))), key=lambda sample: sample.sample_index)
    assert [sample.sample_index for sample in found] == list(range(len(texts)))
    return found


def test_texts_get_the_scores_that_they_were_tested_with(pooled):
    folder, sweep, data, further = pooled
    texts = [TEXTS[number] for number in data.numbers("test")]
    expected = {name: scores[0] for name, scores in sweep.tested.items()} | {
        name: further[name].test for name in (AVERAGE, STACKED)
    }
    assert len(expected) == 5
    for name, scores in expected.items():
        found = torch.stack([sample.probabilities for sample in scored(folder, texts, name)])
        torch.testing.assert_close(found, probabilities(scores, 2), atol=1e-5, rtol=0)
    best = load_probes(folder).content["best"]
    alone = scored(folder, texts[3:4])[0]  # by default the one that validation chose
    assert float(alone.probabilities) == pytest.approx(float(probabilities(expected[best], 2)[3]), abs=1e-5)
    assert len(alone.input_ids) == len(texts[3].split()) + 2 and alone.token_mask.tolist() == [
        False,
        *[True] * len(texts[3].split()),
        False,
    ]


def test_tokens_and_their_scores_stay_together(model, tmp_path):
    folder, sweep, data, _ = trained(model, tmp_path / "probes", "letters", poolings=["tokens"], unit="token")
    assert load_probes(folder).scored_per_token
    places = sorted(set(data.sample_of(data.numbers("test")).tolist()))
    for name in probe_names(data):
        found = scored(folder, [TEXTS[place] for place in places], name)
        expected = dict(zip(data.numbers("test").tolist(), probabilities(sweep.tested[name][0], 2), strict=True))
        n = 0
        for place, sample in zip(places, found, strict=True):
            assert len(sample.probabilities) == len(sample.input_ids) == len(LETTERS[place])
            for token, number in enumerate(range(data.source.token_start[place], data.source.token_start[place + 1])):
                if LETTERS[place][token] is not None:
                    assert float(sample.probabilities[token]) == pytest.approx(float(expected[number]), abs=1e-5)
                    n += 1
        assert n == len(expected)


def test_probes_over_tokens_attend_to_content_tokens_only(model, tmp_path):
    sweep = TrainedProbeSweep("attention", [1.0])
    folder, sweep, data, further = trained(
        model, tmp_path / "probes", sweep=sweep, poolings=["tokens"], over_tokens=True, batch_size=32, max_epochs=3
    )
    texts = [TEXTS[number] for number in data.numbers("test")]
    for name, scores in {probe_names(data)[0]: sweep.tested[probe_names(data)[0]][0], STACKED: further[STACKED].test}.items():
        found = torch.stack([sample.probabilities for sample in scored(folder, texts, name)])
        torch.testing.assert_close(found, probabilities(scores, 2), atol=1e-5, rtol=0)
    together = ["w1 w2 w3 w4", "w1 [MASK] [MASK] w4", "w40 w50 [MASK] w7"]  # of one length, with more and less content
    alone = [scored(folder, [text])[0] for text in together]
    assert [int(sample.token_mask.sum()) for sample in alone] == [4, 2, 3]
    for sample, expected in zip(scored(folder, together), alone, strict=True):
        assert float(sample.probabilities) == pytest.approx(float(expected.probabilities), abs=1e-6)


@pytest.mark.parametrize(
    ("vector", "blocks"), [("resid_post.0/mean", 1), ("resid_post.1/mean", 2), ("final_norm/mean", 3), (STACKED, 3)]
)
def test_the_model_runs_only_as_deep_as_the_probe_needs(pooled, vector, blocks):
    scorer = Scorer(load_probes(pooled[0]), vector)
    data = scorer.data_of(Samples(TEXTS[:5]))
    body, ran = scorer.extractor.load().model, []
    for number, block in enumerate(body.h):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    assert len(list(scorer.score(data))) == 5
    assert len(body.h) == blocks and set(ran) == set(range(blocks))
    assert scorer.extractor.hook_point_names == (POINTS if vector == STACKED else [vector.rpartition("/")[0]])


def test_another_model_or_tokenizer_is_refused_with_both_values(pooled, model, tmp_path):
    probes = load_probes(pooled[0])

    def refused(field, probes=probes, **options):
        scorer = Scorer(probes, "resid_post.0/mean", **options)
        with pytest.raises(IdentityError) as error:
            scorer.data_of(Samples(TEXTS[:5]))
        (line,) = [line for line in str(error.value).splitlines() if line.startswith(f"  {field}: ")]
        assert " in the probes, " in line and " in what is there now" in line
        return line

    other = GPT2Model.from_pretrained(model)
    with torch.no_grad():
        other.h[2].mlp.c_fc.weight[0, 0] += 1e-6  # in a block that the probe does not even reach
    other.save_pretrained(tmp_path / "model")
    assert probes.identity["model"] in refused("model", model=str(tmp_path / "model"))
    make_word_tokenizer([*WORDS[:-2], *WORDS[:-3:-1]]).save_pretrained(tmp_path / "tokenizer")
    assert probes.identity["tokenizer"] in refused("tokenizer", tokenizer=str(tmp_path / "tokenizer"))
    # Dtypes are those of the probes, whatever a checkpoint says: so only a description that contradicts itself can differ.
    for field, value in (
        ("attn_implementation", "flash"),
        ("values_version", 0),
        ("hook_paths", {**probes.identity["hook_paths"], "resid_post.0": "h.7"}),
    ):
        changed = replace(probes, content={**probes.content, "identity": {**probes.identity, field: value}})
        assert repr(value if field != "hook_paths" else {"resid_post.0": "h.7"}) in refused(field, changed)
    with pytest.raises(InvalidInputError, match=r"has no probe 'resid_post.2/mean'"):
        Scorer(probes, "resid_post.2/mean")


def test_a_model_that_moved_is_the_same(pooled, model, tmp_path):
    moved = save_model(tmp_path / "moved")
    found = scored(pooled[0], TEXTS[:4], model=moved, tokenizer=moved)
    assert [float(s.probabilities) for s in found] == [float(s.probabilities) for s in scored(pooled[0], TEXTS[:4])]


def test_dtype_and_text_options_are_those_of_training(model, tmp_path):
    text = TextOptions("body", template="w1 w2 {text}", max_length=9, add_special_tokens=False)
    folder, sweep, data, _ = trained(model, tmp_path / "probes", text=text, dtype="bfloat16", poolings=["last"])
    scorer = Scorer(load_probes(folder), "final_norm/last")
    scorer.data_of(Samples(TEXTS[:1]))
    assert scorer.extractor.load().model.dtype == torch.bfloat16
    texts = [TEXTS[number] for number in data.numbers("test")]
    found = scored(folder, texts, "final_norm/last")
    assert {len(sample.input_ids) for sample in found} == {min(9, 2 + len(text.split())) for text in texts}
    # Rows of bfloat16 may differ by a rounding where batches are of other sizes.
    expected = probabilities(sweep.tested["final_norm/last"][0], 2)
    assert (torch.stack([sample.probabilities for sample in found]) - expected).abs().median() < 1e-5
