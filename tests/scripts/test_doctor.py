"""The doctor as a command: its table, its facts, its advice, and when it fails."""

import re

import pytest
import tokenizers
import torch
import transformers

from exactivations.lit_modules import ModelOptions
from exactivations.scripts import main as command_line
from exactivations.scripts.doctor import about_final_norm, doctor, load_tokenizer, pad_token
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.tiny_models import CONFIGS, tiny_model


def test_the_demo_model(capsys):
    doctor("demo", max_length=12)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "demo: GPTNeoXModel, float32, attention sdpa, on cpu"
    assert lines[1] == "48 samples of 1 to 12 random tokens, read at 22 hook points"
    rows = {line[2:41].strip(): line[42:56].strip() for line in lines[3:15]}
    assert rows["right padding, position [-1] read"] == rows["left padding, no mask"] == "WRONG"
    assert {verdict for name, verdict in rows.items() if name.startswith("exact")} <= {"SAFE", "ROUNDING ONLY"}
    assert "  causal: yes, changing later tokens changes no earlier state (relative difference 0)" in lines
    assert "  hidden_states[-1] of Hugging Face is final_norm (difference 0), not resid_post.3 (0.96)" in lines
    assert "  pad token: pad is 1, eos is 0: they differ" in lines
    assert lines[-1].startswith("-> extract: batches of one length (the default) are right for this model; --padding tail is too (")
    assert max(map(len, lines)) <= 132


def test_an_encoder_without_a_tokenizer_in_bfloat16(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(command_line.COMMANDS, "doctor", doctor)
    tiny_model("bert").save_pretrained(tmp_path)
    command_line.main(["doctor", str(tmp_path), "--dtype", "bfloat16", "--max-length", "8", "--attn-implementation", "eager"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}: BertModel, bfloat16, attention eager, on cpu"
    assert any(line.startswith("  causal: no, changing later tokens changes earlier states (at ") for line in lines)
    assert "  final norm: none was found; hidden_states[-1] is resid_post.2 (difference 0)" in lines
    assert "  pad token: no tokenizer comes with the model; pad is 0, eos is not named: they differ" in lines
    assert lines[-1].endswith("--padding tail is not, and is refused")


def test_it_fails_after_the_table_if_batches_of_one_length_are_wrong(tmp_path, capsys, monkeypatch):
    def planted(self, hidden_states, *args, **kwargs):
        return original(self, hidden_states, *args, **kwargs) + hidden_states.mean(dim=0)

    tiny_model("llama").save_pretrained(tmp_path)
    original = transformers.models.llama.modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", planted)
    with pytest.raises(InvalidInputError, match=r"exact length, batch of 2 is WRONG.* off by .*--token-budget 1"):
        doctor(str(tmp_path), max_length=8)
    assert "pad token: " in capsys.readouterr().out


def test_states_that_overflow_in_float16_are_told_with_the_remedy(tmp_path):
    tiny_model("mamba").save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match=r"the states are not finite, at resid_post.*Float32 is right: use --dtype float32"):
        doctor(str(tmp_path), dtype="float16")


def test_a_device_that_is_not_there_and_a_length_that_is_too_short_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidInputError, match="--device cuda: torch finds no GPU here"):
        doctor("demo", device="cuda")
    with pytest.raises(InvalidInputError, match="max_length must be at least 2, got 1"):
        doctor("demo", max_length=1)


def words(**special):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(120)}, unk_token="w3"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="w3", **special)


@pytest.mark.parametrize(
    ("special", "number", "about"),
    [
        ({"pad_token": "w4", "eos_token": "w5"}, 4, "pad is 4, eos is 5: they differ"),
        ({"pad_token": "w5", "eos_token": "w5"}, 5, r"pad and eos are the same token \(5\), so a mask made from ids .* would drop"),
        ({"eos_token": "w5"}, 5, r"the tokenizer has no pad token; padded here, as is usual, with eos \(5\), so a mask"),
        ({}, 0, "the tokenizer has neither pad nor eos; padded here with id 0"),
        ({"pad_token": "w110", "eos_token": "w5"}, 5, "the tokenizer names id 110, which is not among the model's 99 embeddings; "),
    ],
)  # fmt: skip
def test_the_pad_token_and_what_follows_from_it(special, number, about):
    pad = pad_token(tiny_model("llama"), words(**special))
    assert pad.id == number
    assert 3 in pad.special
    assert re.search(about, pad.about)


def test_without_a_tokenizer_the_configuration_is_asked(tmp_path):
    config = transformers.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "eos_token_id": [7, 8], "pad_token_id": 8})
    pad = pad_token(transformers.LlamaModel(config), None)
    assert pad.id == 8
    assert pad.about.startswith("no tokenizer comes with the model; pad and eos are the same token (8)")
    tiny_model("gpt_neox").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), ModelOptions()) is None, "transformers makes one with two special tokens only"
    assert load_tokenizer("demo", ModelOptions()) is not None


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ({}, "the model gives no hidden_states"),
        ({"resid_post.2": 0.0, "final_norm": 0.9}, r"hidden_states\[-1\] is before it .*; hidden_states\[-1\] is resid_post.2"),
        ({"resid_post.2": 0.4, "final_norm": 0.9}, r"neither the last block's output nor our final_norm"),
        ({"resid_post.2": 0.0, "final_norm": 0.0}, "it changes nothing on these tokens"),
    ],
)
def test_every_answer_about_the_final_norm(differences, said):
    assert re.search(said, about_final_norm("resid_post.2", differences))
