"""The embedded model is a trained one: it predicts modules that it was not trained on."""

import math

import torch
import transformers

from exactivations.datamodules.demo import HELD_OUT, library_sources, read_source
from exactivations.datamodules.embedded import resolve_model

MODULES = ("heapq", "textwrap", "queue")


def test_it_needs_at_most_one_and_a_half_bits_per_character_of_modules_held_out():
    """Windows without overlap, so that every token has less context than in the model card's figure: an upper bound."""
    assert set(MODULES) <= HELD_OUT
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model("demo"))
    model = transformers.AutoModelForCausalLM.from_pretrained(resolve_model("demo"), dtype=torch.float32)
    nats, characters = 0.0, 0
    for module, path in library_sources():
        if module not in MODULES:
            continue
        text = read_source(path)
        characters += len(text)
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
        for start in range(0, len(ids) - 1, 1023):
            window = ids[start : start + 1024][None]
            with torch.no_grad():
                nats += model(window, labels=window).loss.item() * (window.shape[1] - 1)
    assert characters > 30_000
    assert nats / math.log(2) / characters < 1.5


def test_its_tokenizer_is_lossless():
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model("demo"))
    for text in ["def f(x):\n\treturn x\n", "é 漢字 \x00 \U0001f600", "a  b   c\r\n", "<|endoftext|>"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
