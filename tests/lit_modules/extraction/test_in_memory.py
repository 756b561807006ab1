"""Activations of a few texts in one call are those of the untouched model, one text at a time, in the order of the texts."""

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from exactivations.datamodules.plan import PlanOptions
from exactivations.datamodules.tokenization import TextOptions
from exactivations.lit_modules import activations
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.probe_stores import save_model

TEXTS = ["w1 w2 w3", "w7", "w4 w2 w2 w9 w1", "w3 w1 w2", "w5 w5", "w1 w2 w3"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(path):
    """Each text's states behind the second block, by the untouched model, and which of them are content by the tokenizer."""
    model, tokenizer = AutoModel.from_pretrained(path, dtype=torch.float32).train(False), AutoTokenizer.from_pretrained(path)
    found = []
    for text in TEXTS:
        encoded = tokenizer(text, return_tensors="pt", return_special_tokens_mask=True)
        content = encoded.pop("special_tokens_mask")[0] == 0
        with torch.no_grad():
            found.append((model(**encoded, output_hidden_states=True).hidden_states[2][0], content))
    assert not all(content.all() for _, content in found)
    return found


@pytest.mark.parametrize("named", [True, False])
def test_rows_are_those_of_each_text_alone(path, alone, named):
    model = path if named else AutoModel.from_pretrained(path, dtype=torch.float32)
    tokenizer = None if named else AutoTokenizer.from_pretrained(path)
    found = activations(
        model, TEXTS, ["resid_post.1"], ["tokens", "last", "mean"], tokenizer=tokenizer, plan_options=PlanOptions(token_budget=6)
    )
    assert list(found) == ["resid_post.1/tokens", "resid_post.1/last", "resid_post.1/mean"]
    for states, (expected, _) in zip(found["resid_post.1/tokens"], alone, strict=True):
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-6)
    for pooling, rows in {
        "last": torch.stack([states[content][-1] for states, content in alone]),
        "mean": torch.stack([states[content].mean(0) for states, content in alone]),
    }.items():
        torch.testing.assert_close(found[f"resid_post.1/{pooling}"], rows, rtol=1e-5, atol=1e-6)


def test_what_is_missing_or_would_shift_rows_is_refused(path):
    model = AutoModel.from_pretrained(path)
    for arguments, message in [
        ((path, "w1 w2", ["embed"]), "texts must be a list"),
        ((model, TEXTS, ["embed"]), "does not say what its tokenizer is"),
        ((path, ["w1", ""], ["embed"]), "sample 1"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            activations(*arguments)
    with pytest.raises(InvalidInputError, match="leave empty texts out"):
        activations(path, ["w1", ""], ["embed"], text=TextOptions(on_empty="skip"))
