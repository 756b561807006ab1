"""In Hugging Face's own `generate` the processor gives after + alpha * (after - before), and refuses what it cannot do."""

import copy
import math

import pytest
import torch
import transformers as t

from exactivations.lit_modules.amplification.logit_difference import LogitDifferenceProcessor, logit_difference
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.pairs import EOS, FAMILIES, by_definition, language_model, pair
from tests.lit_modules.tiny_models import CONFIGS

F32 = torch.float32
PROMPTS = torch.tensor([[7, 33, 8, 91, 14], [44, 12, 70, 9, 31], [60, 60, 23, 8, 77]])
LENGTHS = [2, 7, 5, 1]


def greedy(model, ids, processors=(), n=12, **arguments):
    arguments = {"do_sample": False, "max_new_tokens": n, "attention_mask": torch.ones_like(ids)} | arguments
    return model.generate(ids, logits_processor=t.LogitsProcessorList(processors), **arguments)


def completion(row, prompt_length):
    """What was generated, up to and with EOS."""
    new = row[prompt_length:].tolist()
    return new[: new.index(EOS) + 1] if EOS in new else new


def refuses(message):
    return pytest.raises(InvalidInputError, match=message)


class Counting:
    """Counts the tokens that a model reads."""

    def __init__(self, model):
        self.read = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        self.read.append(kwargs["input_ids"].shape[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [-1.0, -0.4, 0.7, 2.0])
def test_generate_gives_what_the_definition_gives_with_one_read_of_each_token(family, alpha):
    before, after = pair(family).values()
    counting = Counting(before)
    out = greedy(after, PROMPTS, [LogitDifferenceProcessor(before, alpha)])
    n = out.shape[1] - PROMPTS.shape[1]
    assert counting.read == [5] + [1] * (n - 1)
    for row, prompt in zip(out, PROMPTS.tolist(), strict=True):
        assert completion(row, 5) == by_definition(prompt, alpha, before=before, after=after)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_0_is_the_after_model_and_runs_no_other_and_alpha_minus_1_is_the_before_model(family):
    before, after = pair(family, F32).values()
    expected = greedy(before, PROMPTS)
    assert torch.equal(greedy(after, PROMPTS, [LogitDifferenceProcessor(before, -1.0)]), expected)
    counting = Counting(before)
    assert torch.equal(greedy(after, PROMPTS, [LogitDifferenceProcessor(before, 0.0)]), greedy(after, PROMPTS))
    assert not counting.read
    assert not torch.equal(expected, greedy(after, PROMPTS)[:, : expected.shape[1]])


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_rows_with_an_alpha_each_are_those_of_each_alone(family):
    before, after = pair(family).values()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(6, 99, (n,), generator=generator) for n in LENGTHS]
    alphas = [0.0, 1.5, -1.0, 0.6]
    width = max(LENGTHS)
    ids = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.int64), p]) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(p) for p in prompts]).long()
    processor = LogitDifferenceProcessor(before, alphas, attention_mask=mask)
    for _ in range(2):  # the second time it starts anew
        out = greedy(after, ids, [processor], attention_mask=mask)
        for row, prompt, alpha in zip(out, prompts, alphas, strict=True):
            alone = greedy(after, prompt[None], [LogitDifferenceProcessor(before, alpha)])[0]
            assert completion(row, width) == completion(alone, len(prompt))
            assert completion(row, width) == by_definition(prompt.tolist(), alpha, before=before, after=after)[0]
    with refuses("begins with token 0, which the before model pads"):
        greedy(after, ids, [LogitDifferenceProcessor(before, 1.0)], attention_mask=mask)
    with refuses("another prompt than before"):
        greedy(after, ids + 1, [processor], attention_mask=mask)
    with refuses(r"attention_mask is \[4, 7\], the prompt in generate is \[8, 7\]"):
        processor = LogitDifferenceProcessor(before, 1.0, attention_mask=mask)
        greedy(after, ids, [processor], attention_mask=mask, num_return_sequences=2, do_sample=True)


def test_one_processor_serves_prompt_after_prompt_and_goes_on_where_a_text_goes_on():
    before, after = pair("llama").values()
    processor, counting = LogitDifferenceProcessor(before, 1.0), Counting(before)
    first = greedy(after, PROMPTS, [processor], n=4, eos_token_id=-1)
    assert torch.equal(
        greedy(after, PROMPTS[:, :3], [processor], n=3), greedy(after, PROMPTS[:, :3], [LogitDifferenceProcessor(before, 1.0)], n=3)
    )
    again = greedy(after, PROMPTS, [processor], n=4, eos_token_id=-1)
    assert torch.equal(first, again)
    other = torch.cat([PROMPTS, PROMPTS], dim=1).flip(0)  # longer than what was read, and no continuation of it
    fresh = greedy(after, other, [LogitDifferenceProcessor(before, 1.0)], n=3)
    assert torch.equal(greedy(after, other, [processor], n=3), fresh)
    assert torch.equal(greedy(after, PROMPTS, [processor], n=4, eos_token_id=-1), first)
    counting.read.clear()
    longer = greedy(after, again, [processor], n=4, eos_token_id=-1)
    assert counting.read == [1] * 4
    assert torch.equal(longer, greedy(after, PROMPTS, [LogitDifferenceProcessor(before, 1.0)], n=8, eos_token_id=-1))


def test_temperature_and_top_p_follow_after_the_amplification():
    before, after = pair("gpt_neox").values()
    arguments = {"do_sample": True, "temperature": 0.7, "top_p": 0.6, "num_return_sequences": 400, "output_scores": True}
    torch.manual_seed(0)
    out = greedy(after, PROMPTS[:1], [LogitDifferenceProcessor(before, 1.5)], n=1, return_dict_in_generate=True, **arguments)
    with torch.no_grad():
        one, two = (model(input_ids=PROMPTS[:1]).logits[0, -1] for model in (after, before))
    probabilities = ((one + 1.5 * (one - two)) / 0.7).softmax(0)
    ordered = probabilities.sort(descending=True)
    n_kept = int((ordered.values.cumsum(0) < 0.6).sum()) + 1
    assert set((out.scores[0][0] > -math.inf).nonzero()[:, 0].tolist()) == set(ordered.indices[:n_kept].tolist())


def test_only_common_ids_are_generated_where_vocabularies_differ():
    after = language_model("llama", 0)
    before = language_model("llama", 1, vocab_size=80)
    common = torch.ones(75, dtype=torch.bool)
    common[10:20] = False
    prompts = PROMPTS % 50 + 20
    with refuses("the after model gives 99 logits, the before model 80"):
        greedy(after, prompts, [LogitDifferenceProcessor(before, 1.0)])
    with refuses("`common` speaks of 90 ids"):
        greedy(after, prompts, [LogitDifferenceProcessor(before, 0.0, common=torch.ones(90, dtype=torch.bool))])
    with refuses("prompt 1 has id 90 at token 2, which is none of the 65 ids"):
        greedy(after, torch.tensor([[30, 31, 32], [30, 31, 90]]), [LogitDifferenceProcessor(before, 1.0, common=common)])
    allowed = common.nonzero()[:, 0]
    for alpha in (0.0, -1.0, 1.0):
        # What generate puts behind a row that has ended is no token of the before model, nor is the padding here.
        processor = LogitDifferenceProcessor(
            before, alpha, common=common, attention_mask=torch.tensor([[0, 1, 1, 1, 1]] + [[1] * 5] * 2)
        )
        ids = prompts.clone()
        ids[0, 0] = 98
        mask = torch.tensor([[0, 1, 1, 1, 1], [1] * 5, [1] * 5])
        out = greedy(after, ids, [processor], attention_mask=mask, pad_token_id=98)
        for row, text in enumerate(ids.tolist()):
            text = text[1:] if row == 0 else text
            for token in completion(out[row], 5):
                with torch.no_grad():
                    one, two = (model(input_ids=torch.tensor([text])).logits[0, -1, allowed] for model in (after, before))
                assert token == allowed[(one + alpha * (one - two)).argmax()]
                text.append(token)


def test_the_difference_is_exact_at_both_ends_and_forbidden_tokens_stay_forbidden():
    generator = torch.Generator().manual_seed(0)
    after, before = torch.randn(5, 50, generator=generator) * 30, torch.randn(5, 50, generator=generator) * 30
    after[:, 3], before[:, 4] = -math.inf, -math.inf
    alpha = torch.tensor([0.0, -1.0, 2.0, -0.7, 0.1])
    out = logit_difference(before=before, after=after, alpha=alpha)
    assert torch.equal(out[0], after[0])
    rest = [i for i in range(50) if i not in (3, 4)]
    assert torch.equal(out[1, rest], before[1, rest])
    assert torch.isneginf(out[1:, 3:5]).all()
    true = after.double() + alpha.double()[:, None] * (after.double() - before.double())
    torch.testing.assert_close(out[:, rest].double(), true[:, rest], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("alpha", "arguments", "message"),
    [
        (math.nan, {}, "alpha must be one finite number"),
        ([0.0, math.inf], {}, "alpha must be one finite number"),
        (1.0, {"attention_mask": torch.tensor([[1, 1, 0]])}, "padding on the left"),
        (1.0, {"attention_mask": torch.tensor([[1, 0, 1]])}, "padding on the left"),
    ],
)
def test_what_cannot_be_used_is_refused(alpha, arguments, message):
    with refuses(message):
        LogitDifferenceProcessor(language_model("llama"), alpha, **arguments)


def test_models_and_rows_that_do_not_fit_are_refused():
    before, after = pair("llama").values()
    with refuses("alpha has 2 values, 3 rows"):
        greedy(after, PROMPTS, [LogitDifferenceProcessor(before, [0.0, 1.0])])
    with refuses("no causal language model with its head"):
        LogitDifferenceProcessor(before.model, 1.0)
    with refuses("no past_key_values"):
        LogitDifferenceProcessor(t.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["mamba"])), 1.0)
    with refuses("was cast"):
        LogitDifferenceProcessor(language_model("llama", dtype=F32).to(torch.bfloat16), 1.0)
    with refuses("logits are on cpu, the before model is on meta"):
        greedy(after, PROMPTS, [LogitDifferenceProcessor(language_model("gpt2").to("meta"), 1.0)])
