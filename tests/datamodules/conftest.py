"""Tokenizers made on the spot, and a cache of their own for all that `datasets` writes."""

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", "user", "assistant", ":"]
PLAIN_TEMPLATE = "{% for m in messages %}[CLS]{{ m['role'] + ' : ' + m['content'] }}[SEP]{% endfor %}"
MARKING_TEMPLATE = (
    "{% for m in messages %}[CLS]{{ m['role'] + ' : ' }}{% if m['role'] == 'assistant' %}"
    "{%- generation -%} {{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}[SEP]{% endfor %}"
    "{% if add_generation_prompt %}[CLS]assistant :{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test finds what an earlier run, or another test, left in the cache."""
    cache = tmp_path_factory.mktemp("datasets_cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


@pytest.fixture
def word_tokenizer():
    """BERT-like: a word is a token, [CLS] and [SEP] around each text, [UNK] for what is not in the vocabulary."""
    return make_word_tokenizer()


@pytest.fixture
def byte_tokenizer():
    """GPT-2-like: byte-level BPE, no special tokens added, and one token that is BOS, EOS and [UNK] at once."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the cat sat on the mat, the end of the tale"] * 3, trainer)
    end = "<|end|>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end)


def make_word_tokenizer(words=WORDS):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
    )
