"""Completions are what the definition says, row by row, whatever batch, neighbours, order or number of rollouts they come in."""

import dataclasses
import math

import lightning.pytorch as pl
import pytest
import torch
import transformers as t

from exactivations.datamodules.embedded import DEMO_MODEL
from exactivations.datamodules.plan import PlanOptions
from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.amplification.amplifier import AmplifyOptions, LogitDiffAmplifier
from exactivations.lit_modules.amplification.decoding import Decoding, Prompts, Rows, generate, generate_in_parts
from exactivations.lit_modules.amplification.logit_difference import logit_difference
from exactivations.lit_modules.amplification.model_pair import ModelPair
from exactivations.lit_modules.amplification.row_sampling import RowSampling
from exactivations.lit_modules.amplification.tokenizer_compatibility import tokenizer_compatibility
from exactivations.store.batches import TokenBatch
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.pairs import EOS, FAMILIES, by_definition, language_model, pair
from tests.lit_modules.tiny_models import CONFIGS

F32 = torch.float32
PROMPTS = torch.tensor([[7, 33, 8, 91, 14], [44, 12, 70, 9, 31], [60, 60, 23, 8, 77]])
ENDING = frozenset(range(EOS, 99, 7))  # so many that rows end at all lengths
N = 12


def rows_of(prompt, alpha, temperature, top_p, seed, n=N):
    doubles = [torch.tensor(values, dtype=torch.float64) for values in (alpha, temperature, top_p)]
    sampling = RowSampling(doubles[1], doubles[2], torch.tensor(seed))
    n = torch.tensor([n] * len(prompt) if isinstance(n, int) else n)
    return Rows(torch.tensor(prompt), doubles[0], sampling, n)


def mixed():
    """Rows that differ in everything: prompt, alpha, temperature, top-p, seed and length."""
    return rows_of(
        [0, 0, 1, 2, 2, 2, 1, 0],
        [0.0, 1.0, -1.0, 2.0, 0.5, -0.3, 1.0, 1.0],
        [1.0, 0.0, 0.8, 1.3, 1.0, 0.7, 1.0, 1.0],
        [1.0, 1.0, 0.9, 0.5, 0.8, 1.0, 0.95, 0.95],
        [3, 3, 4, 5, 2**63 - 1, 7, 8, 8],
        [N, N, 3, N, N, 7, N, 1],
    )


def ids_of(generated):
    return [ids.tolist() for ids in generated.token_ids.split(generated.n_tokens.tolist())]


def run(models, rows, prompts=PROMPTS, eos=ENDING, attention_mask=None, **arguments):
    return generate(Decoding(Prompts(models, prompts, attention_mask), rows, eos_token_ids=eos, **arguments))


def refuses(message):
    return pytest.raises(InvalidInputError, match=message)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_a_mixed_batch_is_what_the_definition_gives_for_it_alone(family):
    models, rows = ModelPair(**pair(family)), mixed()
    found = run(models, rows, scores=True)
    scores = torch.stack(list(vars(found.scores).values()), dim=1).split(found.n_tokens.tolist())
    assert len(set(found.n_tokens.tolist())) > 3 and set(found.finished) == {"eos", "length"}
    for i, ids in enumerate(ids_of(found)):
        sampling = rows.sampling
        expected, expected_scores = by_definition(
            PROMPTS[rows.prompt[i]].tolist(),
            rows.alpha[i].item(),
            before=models.before,
            after=models.after,
            temperature=sampling.temperature[i].item(),
            top_p=sampling.top_p[i].item(),
            seed=sampling.seed[i].item(),
            max_new_tokens=int(rows.max_new_tokens[i]),
            eos=ENDING,
        )
        assert ids == expected
        assert found.finished[i] == ("eos" if ids[-1] in ENDING else "length")
        torch.testing.assert_close(scores[i], torch.tensor(expected_scores, dtype=torch.float64), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, F32])
def test_a_row_is_the_same_alone_among_others_in_another_order_and_scored_or_not(family, dtype):
    models, rows = ModelPair(**pair(family, dtype)), mixed()
    together = ids_of(run(models, rows))
    assert ids_of(run(models, rows, scores=True)) == together
    order = torch.tensor([5, 2, 7, 0, 1, 4, 3])  # seven of them
    assert ids_of(run(models, rows.select(order))) == [together[i] for i in order]
    for i in range(len(together)):
        assert ids_of(run(models, rows.select(torch.tensor([i])))) == [together[i]]


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_prompts_give_what_each_gives_without_padding(family):
    models, rows = ModelPair(**pair(family)), mixed()
    lengths = [2, 5, 3]
    mask = torch.stack([torch.arange(5) >= 5 - n for n in lengths])
    found = run(models, rows, PROMPTS.masked_fill(~mask, 98), attention_mask=mask)
    for i, ids in enumerate(ids_of(found)):
        alone = rows.select(torch.tensor([i]))
        prompt = PROMPTS[rows.prompt[i], 5 - lengths[rows.prompt[i]] :][None]
        assert ids_of(run(models, dataclasses.replace(alone, prompt=torch.tensor([0])), prompt)) == [ids]
    with refuses("padding on the left"):
        run(models, rows, attention_mask=mask.flip(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("alpha", "which"), [(0.0, "after"), (-1.0, "before")])
def test_alpha_0_and_minus_1_are_generate_of_one_model_and_the_other_does_not_run(family, alpha, which):
    models = ModelPair(**pair(family, F32))
    other = models.before if which == "after" else models.after
    handle = other.register_forward_pre_hook(lambda *_: pytest.fail("this model is not needed"))
    rows = rows_of([0, 1, 2], [alpha] * 3, [0.0] * 3, [1.0] * 3, [0] * 3)
    found = ids_of(run(models, rows, eos=frozenset({EOS})))
    model = getattr(models, which)
    out = model.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), do_sample=False, max_new_tokens=N)[:, 5:]
    for ids, expected in zip(found, out.tolist(), strict=True):
        assert ids == expected[: len(ids)] and (ids[-1] == EOS or len(ids) == N)
    handle.remove()


def test_a_model_runs_the_rows_that_need_it_and_prompts_are_read_once():
    models = ModelPair(**pair("llama"))
    read = {"after": [], "before": []}
    for name in read:
        model = getattr(models, name)
        model.register_forward_pre_hook(
            lambda _, __, arguments, name=name: read[name].append(list(arguments["input_ids"].shape)), with_kwargs=True
        )
    rows = rows_of([0] * 4, [1.0, 0.0, 0.0, 1.0], [1.0] * 4, [1.0] * 4, [1, 2, 3, 4], n=[2, 4, 6, 3])
    found = run(models, rows, eos=frozenset())
    assert found.n_tokens.tolist() == [2, 4, 6, 3] and found.finished == ("length",) * 4
    assert read["after"] == [[3, 5], [4, 1], [3, 1], [2, 1], [1, 1], [1, 1]]
    assert read["before"] == [[3, 5], [2, 1], [1, 1]]


def test_common_ids_only_and_padding_that_no_model_knows():
    after, before = language_model("llama", 0), language_model("llama", 1, vocab_size=80)
    common = torch.ones(75, dtype=torch.bool)
    common[10:20] = False
    models, rows = ModelPair(before=before, after=after, common=common), mixed()
    prompts = PROMPTS % 50 + 20
    found = run(models, rows, prompts, scores=True)
    assert common[found.token_ids].all()
    assert all(scores.isfinite().all() for scores in vars(found.scores).values())
    for i, ids in enumerate(ids_of(found)):
        assert ids_of(run(models, rows.select(torch.tensor([i])), prompts)) == [ids]
    with refuses("prompt 0 has id 91 at token 3, which is none of the 65 ids"):
        run(models, rows)
    mask = torch.ones_like(prompts)
    mask[0, 0] = 0
    padded = prompts.clone()
    padded[0, 0] = 98
    assert ids_of(run(models, rows, padded, attention_mask=mask))[2:7] == ids_of(found)[2:7]
    with refuses("the after model gives 99 logits, the before model 80"):
        ModelPair(before=before, after=after)


@pytest.mark.parametrize("config", ["gemma2", "qwen3", "mixtral"])
def test_sliding_windows_and_experts(config):
    models = ModelPair(
        after=language_model(config, 0, F32), before=language_model(config, 1, F32)
    )  # experts run in no higher precision
    rows = rows_of([0, 1, 2], [1.0, -0.5, 2.0], [1.0] * 3, [0.9] * 3, [1, 2, 3])
    found = ids_of(run(models, rows))
    assert ids_of(generate_in_parts(Prompts(models, PROMPTS), rows, 1, eos_token_ids=ENDING)) == found  # the prompts' cache stays
    for i, ids in enumerate(found):
        arguments = {"temperature": 1.0, "top_p": 0.9, "seed": i + 1, "eos": ENDING, "before": models.before, "after": models.after}
        assert ids == by_definition(PROMPTS[i].tolist(), rows.alpha[i].item(), **arguments)[0]


class Kept(pl.Callback):
    """Keeps the ids of each completion by sample, alpha and rollout."""

    def __init__(self):
        self.texts = {}

    def on_predict_batch_end(self, trainer, module, outputs, step, batch_idx, dataloader_idx=0):
        for out, batch in zip(outputs, step.batches(), strict=True):
            assert out.place == batch.place
            names = zip(out.sample_index.tolist(), out.alpha.tolist(), out.rollout.tolist(), strict=True)
            self.texts |= dict(zip(names, ids_of(out), strict=True))


def trainer(*callbacks):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet)


class TestAmplifier:
    OPTIONS = AmplifyOptions(alphas=(0.0, 1.5), rollouts=3, max_new_tokens=8, seed=11, top_p=0.9)

    def completions(self, prompts, index, options=OPTIONS, models=None):
        batch = dataclasses.replace(TokenBatch.of(prompts, token_mask="all"), sample_index=index)
        return LogitDiffAmplifier(**(models or pair("gpt_neox")), options=options)(batch)

    def test_rows_carry_what_generates_them_again_alone_and_do_not_depend_on_the_batch(self):
        models = pair("gpt_neox")
        out = self.completions(PROMPTS, torch.tensor([4, 900, 17]), models=models)
        assert out.sample_index.tolist() == [4] * 6 + [900] * 6 + [17] * 6
        assert out.alpha.tolist() == [0.0, 0.0, 0.0, 1.5, 1.5, 1.5] * 3 and out.rollout.tolist() == [0, 1, 2] * 6
        texts = ids_of(out)
        assert len(set(map(tuple, texts))) > 12
        for i, ids in enumerate(texts):
            prompt = PROMPTS[i // 6].tolist()
            arguments = {"temperature": 1.0, "top_p": 0.9, "seed": int(out.seed[i]), "max_new_tokens": 8}
            assert ids == by_definition(prompt, out.alpha[i].item(), **models, **arguments)[0]
        turned = self.completions(PROMPTS[[2, 0]], torch.tensor([17, 4]), models=models)
        assert ids_of(turned) == texts[12:] + texts[:6]
        other = self.completions(PROMPTS, torch.tensor([4, 900, 17]), dataclasses.replace(self.OPTIONS, seed=12), models)
        assert ids_of(other) != texts

    def test_an_alphas_texts_depend_neither_on_the_other_alphas_nor_on_how_many_rows_run_at_once(self):
        models, index = pair("gpt_neox"), torch.tensor([4, 900, 17])
        texts = ids_of(self.completions(PROMPTS, index, models=models))
        alone = self.completions(PROMPTS, index, dataclasses.replace(self.OPTIONS, alphas=(1.5,)), models)
        assert ids_of(alone) == [ids for i, ids in enumerate(texts) if i % 6 >= 3]
        read = []
        models["after"].register_forward_pre_hook(lambda _, __, a: read.append(list(a["input_ids"].shape)), with_kwargs=True)
        for max_rows in (1, 4, 7, 18):
            read.clear()
            options = dataclasses.replace(self.OPTIONS, max_rows=max_rows, scores=True)
            found = self.completions(PROMPTS, index, options, models)
            assert ids_of(found) == texts and len(found.scores.kl) == found.n_tokens.sum()
            assert read[0] == [3, 5] and max(shape[0] for shape in read[1:]) == max_rows  # one reading of the prompts
            assert all(shape[1] == 1 for shape in read[1:])

    def test_eos_ends_a_row_unless_it_is_ignored(self):
        models = pair("gpt_neox")
        models["after"].generation_config.eos_token_id = sorted(ENDING)
        out = self.completions(PROMPTS, torch.arange(3), models=models)
        assert {"eos", "length"} == set(out.finished)
        for ids, finished in zip(ids_of(out), out.finished, strict=True):
            assert ENDING.isdisjoint(ids[:-1]) and (finished == "eos") == (ids[-1] in ENDING)
        fixed = self.completions(PROMPTS, torch.arange(3), dataclasses.replace(self.OPTIONS, ignore_eos=True), models)
        assert fixed.n_tokens.tolist() == [8] * 18 and set(fixed.finished) == {"length"}
        assert all(long[: len(short)] == short for short, long in zip(ids_of(out), ids_of(fixed), strict=True))
        models["after"].generation_config.eos_token_id = None
        with refuses("name no EOS token"):
            self.completions(PROMPTS, torch.arange(3), models=models)

    def test_with_a_trainer_the_plan_changes_nothing(self):
        texts = [text + " = " + "x" * n for n, text in enumerate(["import os", "def f(a):", "return", "for i in", "class A"])]
        before = language_model("gpt_neox", 3, F32, t.AutoConfig.from_pretrained(DEMO_MODEL))
        found = []
        for token_budget in (8, 64):
            amplifier, kept = LogitDiffAmplifier(before=before, after="demo", options=self.OPTIONS), Kept()
            data = TextDataModule(texts, "demo", plan_options=PlanOptions(token_budget=token_budget))
            trainer(kept).predict(amplifier, datamodule=data, return_predictions=False)
            found.append(kept.texts)
        assert found[0] == found[1] and len(found[0]) == 5 * 6
        assert not list(amplifier.parameters())

    def test_data_that_does_not_fit_is_refused_before_anything_runs(self, monkeypatch):
        monkeypatch.setattr(LogitDiffAmplifier, "predict_step", lambda *_: pytest.fail("it runs"))
        data = TextDataModule(["import os"], "demo")
        with refuses("has 1024 positions: lower max_new_tokens"):
            trainer().predict(
                LogitDiffAmplifier(before="demo", after="demo", options=AmplifyOptions(max_new_tokens=1100)), datamodule=data
            )
        with refuses("the tokenizer gives id"):
            trainer().predict(LogitDiffAmplifier(**pair("gpt_neox"), options=self.OPTIONS), datamodule=data)
        batch = dataclasses.replace(TokenBatch.of(PROMPTS, token_mask="all"), n_tokens=torch.tensor([5, 4, 5]))
        with refuses("padding on the right"):
            LogitDiffAmplifier(**pair("gpt_neox"), options=self.OPTIONS)(batch)


def test_positions_suffice_to_the_last_token_and_not_for_one_more():
    models = ModelPair(**pair("gpt2"))
    rows = rows_of([0], [1.0], [1.0], [1.0], [0], n=60)
    assert run(models, rows, eos=frozenset()).n_tokens.tolist() == [60]  # 64 positions: 5 of the prompt, 59 that are read
    with refuses("prompt and completion are 65 tokens"):
        run(models, rows_of([0], [1.0], [1.0], [1.0], [0], n=61))


def test_no_two_models_tokenizers_or_logits_are_taken_by_their_order():
    models = pair("llama")
    logits, tokenizer = torch.zeros(1, 9), object()
    for take in (
        lambda: ModelPair(*models.values()),
        lambda: LogitDiffAmplifier(*models.values()),
        lambda: tokenizer_compatibility(tokenizer, tokenizer),
        lambda: logit_difference(logits, logits, torch.zeros(1)),
    ):
        with pytest.raises(TypeError, match="positional argument"):
            take()


def test_pairs_that_do_not_fit_are_refused():
    before, after = pair("llama").values()
    with refuses("dtype is torch.float64, the before model's is torch.float32"):
        ModelPair(before=pair("llama", F32)["before"], after=after)
    with refuses("no causal language model"):
        ModelPair(before=before.model, after=after)
    with refuses("no past_key_values"):
        ModelPair(before=before, after=t.AutoModelForCausalLM.from_config(CONFIGS["mamba"]))
    with refuses("finite alpha"):
        rows_of([0], [math.nan], [1.0], [1.0], [0])
    with refuses("rows continue prompts"):
        run(ModelPair(before=before, after=after), rows_of([3], [0.0], [1.0], [1.0], [0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphas": ()}, "alphas must be"),
        ({"alphas": (1.0, 1.0)}, "each given once"),
        ({"alphas": (math.nan,)}, "finite"),
        ({"rollouts": 0}, "rollouts"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_rows": 0}, "max_rows"),
        ({"seed": -1}, "seed"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": 0.0, "rollouts": 2}, "would be the same"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with refuses(message):
        AmplifyOptions(**options)
