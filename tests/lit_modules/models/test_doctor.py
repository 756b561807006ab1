"""The doctor's verdicts against the truth as it is written down, and against direct calls of Hugging Face's models.

`python -m tests.lit_modules.models.test_doctor` prints the table in docs/doctor.md.
"""

import re
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from exactivations.lit_modules.models import doctor, model_facts
from exactivations.lit_modules.models.doctor import CASES, EXACT_LENGTH, RIGHT_PADDING, Trial, Verdict, trial_for
from exactivations.lit_modules.models.ground_truth import GroundTruth, relative_error
from exactivations.lit_modules.models.hook_points import cut_after, dissect, resolve_hook_points
from exactivations.lit_modules.models.language_model import forward_arguments
from exactivations.lit_modules.models.model_facts import random_samples
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.tiny_models import CONFIGS, SMALL, tiny_model

FAMILIES = ["gpt2", "gpt_neox", "llama", "bert", "roberta", "mamba"]
DTYPES = [torch.float32, torch.bfloat16]
PADDED = [case for case in CASES if case not in EXACT_LENGTH]
BY_NAME = {case.name: case for case in CASES}
RIGHT, WRONG, NONE = "right", "WRONG", "not applicable"

# Written by hand. Causal models: what follows a token does not matter, whatever a mask says. Learned absolute positions (GPT-2,
# BERT) count left pads unless position_ids are given; rotary ones are relative. RoBERTa counts what is not the pad token, by
# itself. Encoders see everything that no mask hides. Mamba's state runs over left pads, unless a mask has them zeroed.
TRUTH = {
    "right padding, no mask": (RIGHT, RIGHT, RIGHT, WRONG, WRONG, RIGHT),
    "right padding, mask": (RIGHT, RIGHT, RIGHT, RIGHT, RIGHT, RIGHT),
    "right padding, position [-1] read": (WRONG, WRONG, WRONG, WRONG, WRONG, WRONG),
    "left padding, mask": (WRONG, RIGHT, RIGHT, WRONG, RIGHT, RIGHT),
    "left padding, mask and position_ids": (RIGHT, RIGHT, RIGHT, RIGHT, RIGHT, NONE),
    "left padding, no mask": (WRONG, WRONG, WRONG, WRONG, WRONG, WRONG),
}


def in_dtype(family, dtype):
    """The tiny model, loaded in a dtype as a checkpoint is (a cast would round the rotary frequencies too)."""
    if dtype == torch.float32:
        return tiny_model(family)
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(family).save_pretrained(folder)
        return transformers.AutoModel.from_pretrained(folder, dtype=dtype)


def pad_of(family):
    return CONFIGS[family].pad_token_id or 0


def right_or_not(finding):
    return RIGHT if finding.verdict.is_right else str(finding.verdict)


def table():
    """Verdict of each case, by case, family and dtype."""
    cells = {}
    for family in FAMILIES:
        for dtype in DTYPES:
            trial = trial_for(in_dtype(family, dtype), pad_id=pad_of(family))
            for case in CASES:
                cells[case.name, family, dtype] = trial.examine(case).verdict
    return cells


def as_markdown(cells):
    lines = ["| case | " + " | ".join(FAMILIES) + " |", "|---|" + "---|" * len(FAMILIES)]
    for case in CASES:
        verdicts = [list(dict.fromkeys(cells[case.name, family, dtype] for dtype in DTYPES)) for family in FAMILIES]
        lines.append(f"| {case.name} | " + " | ".join(" / ".join(both) for both in verdicts) + " |")
    return "\n".join(lines)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_its_verdicts_are_the_truth(family, dtype):
    model = in_dtype(family, dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trial = trial_for(model, pad_id=pad_of(family))
    findings = {case.name: trial.examine(case) for case in CASES}
    for case in EXACT_LENGTH:
        assert findings[case.name].verdict.is_right, case
    found = {name: right_or_not(findings[name]) for name in TRUTH}
    assert found == {name: cells[FAMILIES.index(family)] for name, cells in TRUTH.items()}
    for finding in findings.values():
        if finding.verdict is not Verdict.NOT_APPLICABLE:
            assert finding.control.agrees is finding.verdict.is_right, "no verdict here hangs on rounding"
            assert finding.verdict.is_right or finding.decisive.error > 0.1
            assert finding.own.cosine > 0.99 or not finding.verdict.is_right
    assert model.dtype == dtype
    assert all(torch.equal(value, before[name]) and value.dtype == before[name].dtype for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_table_in_the_documentation_is_this_one():
    """Compared up to rounding, which is another machine's affair."""
    text = (Path(__file__).parents[3] / "docs" / "doctor.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", text, re.MULTILINE))
    for name, cells in TRUTH.items():
        shown = [{RIGHT if v in ("SAFE", "ROUNDING ONLY") else v for v in cell.split(" / ")} for cell in rows[name].split(" | ")]
        assert shown == [{cell} for cell in cells], name
    for case in EXACT_LENGTH:
        assert not {"WRONG", NONE} & set(re.split(r" \| | / ", rows[case.name]))


@torch.no_grad()
def test_cells_of_the_truth_by_direct_calls():
    """No code of ours: last_hidden_state of three samples alone, and in a batch made by hand."""
    samples = [torch.tensor(ids) for ids in ([7, 8, 9, 10, 11], [12, 13], [14, 15, 16])]

    def error(family, left, mask, positions=False, pad=0):
        model = tiny_model(family)
        ids, attend, places = torch.full((3, 5), pad), torch.zeros(3, 5, dtype=torch.long), []
        for row, sample in enumerate(samples):
            start = 5 - len(sample) if left else 0
            places.append(slice(start, start + len(sample)))
            ids[row, places[-1]], attend[row, places[-1]] = sample, 1
        more = {"attention_mask": attend} if mask else {}
        if positions:
            more["position_ids"] = (attend.cumsum(1) - 1).clamp(min=0)
        batch = model(input_ids=ids, **more).last_hidden_state
        alone = [model(input_ids=sample[None]).last_hidden_state[0] for sample in samples]
        return max(
            ((batch[r, p] - true).norm() / true.norm()).item() for r, (p, true) in enumerate(zip(places, alone, strict=True))
        )

    assert error("gpt2", left=False, mask=False) < 1e-5
    assert error("gpt2", left=True, mask=True) > 0.1
    assert error("gpt2", left=True, mask=True, positions=True) < 1e-5
    assert error("gpt_neox", left=True, mask=True) < 1e-5
    assert error("llama", left=True, mask=False) > 0.1
    assert error("bert", left=False, mask=False) > 0.1
    assert error("bert", left=False, mask=True) < 1e-5
    assert error("roberta", left=True, mask=True, pad=1) < 1e-5
    assert error("roberta", left=True, mask=True, pad=3) > 0.1, "it counts what is not its own pad token"
    assert error("mamba", left=False, mask=False) < 1e-4
    assert error("mamba", left=True, mask=False) > 0.1
    assert error("mamba", left=True, mask=True) < 1e-4


def test_what_float32_shows_above_safe_is_rounding_for_in_float64_it_is_gone():
    trial = trial_for(tiny_model("mamba").double())
    assert trial.examine(RIGHT_PADDING).own.error < 1e-12
    assert trial.examine(BY_NAME["left padding, no mask"]).verdict is Verdict.WRONG


class MixesRows(nn.Module):
    """What a batch norm in training mode does: each row's state depends on the other rows."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden_states, *args, **kwargs):
        out = self.block(hidden_states, *args, **kwargs)
        return out - out.mean(dim=0, keepdim=True) / 50


def test_a_model_that_mixes_rows_is_wrong_in_batches_of_one_length():
    model = tiny_model("llama")
    model.layers[1] = MixesRows(model.layers[1])
    trial = trial_for(model)
    findings = [trial.examine(case) for case in EXACT_LENGTH]
    assert [finding.verdict for finding in findings] == [Verdict.SAFE, *[Verdict.WRONG] * 5], "alone there is no other row"
    assert all(finding.control.error > 1e-3 for finding in findings[1:])
    with pytest.raises(InvalidInputError, match="needs a causal model in which padding on the right changes nothing"):
        doctor.refuse_unsafe_right_padding(model, resolve_hook_points(model, ["resid_post.2"]))
    doctor.refuse_unsafe_right_padding(model, resolve_hook_points(model, ["resid_post.0"]))


def test_a_fault_as_small_as_one_part_in_a_thousand_is_wrong_in_float32():
    model = tiny_model("llama")
    handle = model.layers[2].mlp.register_forward_hook(lambda module, args, out: out + 1e-3 * (len(out) - 1) * out)
    finding = trial_for(model).examine(EXACT_LENGTH[1])
    handle.remove()
    assert finding.verdict is Verdict.WRONG
    assert finding.own.error == pytest.approx(1e-3, rel=0.1)
    assert finding.own.name == "mlp_out.2"


@pytest.mark.parametrize(("case", "last"), [(RIGHT_PADDING, False), (BY_NAME["right padding, position [-1] read"], True)])
def test_a_forward_pass_that_fails_is_wrong_with_its_reason(case, last):
    model = tiny_model("gpt2")

    def refuse(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > 1 and (kwargs.get("attention_mask") is not None) is last:
            raise ValueError("this model is particular about masks\nand more")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    finding = trial_for(model).examine(case)
    assert finding.verdict is Verdict.WRONG
    assert finding.reason == "the forward pass failed: ValueError: this model is particular about masks"
    assert finding.decisive is None


def test_our_own_errors_are_not_taken_for_a_verdict():
    model = tiny_model("gpt2")
    trial = trial_for(model)
    model.h[1].register_forward_hook(lambda module, args, out: out[:, :1])
    with pytest.raises(InvalidInputError, match=r"hook point resid_post.1 has shape \[8, 1, 32\]"):
        trial.examine(RIGHT_PADDING)


def test_a_model_that_cannot_compute_one_sample_is_told_so():
    config = transformers.T5Config(vocab_size=99, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    with pytest.raises(InvalidInputError, match="nothing can be read from T5Model: blocks: "):
        trial_for(transformers.T5Model(config))
    model = tiny_model("gpt2")
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("not like this")))
    with pytest.raises(InvalidInputError, match="GPT2Model cannot compute a single sample from input_ids alone: not like this"):
        trial_for(model)


def test_states_that_overflow_are_wrong_whatever_rounding_would_allow():
    """Tiny Mamba's states reach 1e5: in float16 they are infinite, alone as in any batch."""
    trial = trial_for(in_dtype("mamba", torch.float16))
    finding = trial.examine(EXACT_LENGTH[3])
    assert finding.verdict is Verdict.WRONG
    assert finding.control.agrees and "the states are not finite" in doctor.why_wrong(finding)


def test_hidden_states_end_with_the_state_after_the_final_norm_if_there_is_one():
    for family in ("gpt2", "llama", "mamba"):
        differences = model_facts.last_hidden_state(tiny_model(family))
        assert differences["final_norm"] == 0
        assert differences["resid_post.2"] > 0.1
    assert model_facts.last_hidden_state(tiny_model("bert")) == {"resid_post.2": 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_causality_is_measured(family):
    model = tiny_model(family)
    influence, _ = model_facts.influence_of_later_tokens(model, resolve_hook_points(model, dissect(model).names()))
    assert influence > 0.01 if family in ("bert", "roberta") else influence == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba", "mixtral"])
def test_right_padding_is_tried_on_a_model_that_was_cut_in_at_most_ten_forward_passes(family, dtype):
    model = in_dtype(family, dtype)
    points = resolve_hook_points(model, ["resid_post.1"])
    assert cut_after(model, points) == 2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert doctor.refuse_unsafe_right_padding(model, points).verdict.is_right
    assert len(passes) == (5 if dtype == torch.float32 else 10)
    assert all(torch.equal(value, before[name]) and value.dtype == before[name].dtype for name, value in model.state_dict().items())


def test_right_padding_of_encoders_is_refused_with_figures():
    model = tiny_model("bert")
    with pytest.raises(
        InvalidInputError, match=r"off by 0\.\d+ of their norm, and rounding explains 0.0001, at resid_post.1, token"
    ):
        doctor.refuse_unsafe_right_padding(model, resolve_hook_points(model, ["resid_post.1"]))


def test_right_padding_is_refused_where_rotary_embeddings_depend_on_the_length():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = transformers.LlamaModel(transformers.LlamaConfig(**SMALL, max_position_embeddings=64, rope_parameters=rope))
    with pytest.raises(InvalidInputError, match=r"by the length of the batch \(dynamic\)"):
        doctor.refuse_unsafe_right_padding(model, resolve_hook_points(model, ["resid_post.1"]))


def test_random_tokens_have_no_meaning_of_their_own():
    config = transformers.LlamaConfig(**SMALL, pad_token_id=5, eos_token_id=[6, 7])
    (sample,) = random_samples(transformers.LlamaModel(config), [2000], {50}, torch.Generator().manual_seed(0))
    assert set(sample.tolist()) == set(range(99)) - {1, 5, 6, 7, 50}  # 1: Llama's own bos


def test_figures_are_those_of_the_row_that_is_named():
    """The worst row of GPT-2's left padding, recomputed by hand from its sample."""
    model = tiny_model("gpt2")
    trial = trial_for(model)
    found = trial.examine(BY_NAME["left padding, no mask"])
    worst, ids = found.own, trial.samples[found.own.sample_index]
    points = resolve_hook_points(model, [worst.name])
    true = GroundTruth(model, points, forward_arguments(model)).states(ids)[worst.name]
    group = next(batch for batch in trial._batches(found.case) if worst.sample_index in batch)
    longest = max(len(trial.samples[i]) for i in group)
    assert len(ids) == found.n_tokens
    padded = torch.cat([torch.zeros(longest - len(ids), dtype=torch.long), ids])
    got = GroundTruth(model, points, forward_arguments(model)).states(padded)[worst.name][longest - len(ids) :]
    assert relative_error(got, true)[worst.worst_row].item() == pytest.approx(worst.error, rel=1e-4)


def test_a_trial_can_be_made_of_ones_own_samples():
    model = tiny_model("gpt2")
    points = resolve_hook_points(model, ["resid_post.1"])
    truth = GroundTruth(model, points, forward_arguments(model)).states
    samples = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    assert Trial(model, points, samples, [], 0, truth).examine(RIGHT_PADDING).verdict is Verdict.SAFE


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(as_markdown(table()))
