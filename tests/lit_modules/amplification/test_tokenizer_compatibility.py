"""What two tokenizers differ in is told, and only ids that mean the same token in both are called common."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from exactivations.datamodules.embedded import DEMO_MODEL
from exactivations.lit_modules.amplification.tokenizer_compatibility import tokenizer_compatibility
from exactivations.store.errors import InvalidInputError


def demo():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def changed(edit):
    """The demo tokenizer with its JSON edited."""
    tokenizer = demo()
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    edit(parts)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), **special)


def swap(parts):
    vocabulary = parts["model"]["vocab"]
    first, second = (token for token in list(vocabulary) if vocabulary[token] in (300, 301))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def test_a_tokenizer_is_identical_to_itself():
    found = tokenizer_compatibility(before=demo(), after=demo())
    assert found.verdict == "identical" and found.differences == ()
    assert found.common_or_refuse().tolist() == [True] * 4096
    assert found.text == "identical: 4096 ids mean the same token in both vocabularies"
    assert tokenizer_compatibility(before=changed(lambda parts: None), after=demo()).verdict == "identical"


def test_added_tokens_renamed_tokens_and_chat_templates_leave_the_others_common():
    after, before = demo(), demo()
    for tokenizer, added in ((after, ["<|im_start|>", "<|im_end|>", "<|tool|>"]), (before, ["<|reserved_0|>", "<|im_end|>"])):
        tokenizer.add_special_tokens({"additional_special_tokens": added})
    after.chat_template = "{{ messages }}"
    after.eos_token = "<|im_end|>"
    found = tokenizer_compatibility(before=before, after=after)
    assert found.verdict == "compatible"
    assert found.common.tolist() == [True] * 4096 + [False, True]
    text = found.text
    assert "1 added or special ids are different tokens (before / after): 4096: '<|reserved_0|>' / '<|im_start|>'" in text
    assert "1 ids are in the vocabulary of the after model only: 4098: None / '<|tool|>'" in text
    assert "eos_token: '<|endoftext|>' / '<|im_end|>'" in text
    assert "only the after model has a chat template" in text
    turned = tokenizer_compatibility(before=after, after=before)
    assert (
        turned.common.tolist() == found.common.tolist()
        and "vocabulary of the before model only: 4098: '<|tool|>' / None" in turned.text
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (swap, "2 ids are different tokens"),
        (lambda parts: parts["model"]["merges"].reverse(), "merges differ"),
        (lambda parts: parts.update(pre_tokenizer={"type": "Whitespace"}), "their pre_tokenizers differ"),
        (
            lambda parts: parts.update(normalizer={"type": "NFC" if parts["normalizer"] != {"type": "NFC"} else "NFD"}),
            "normalizers differ",
        ),
        (lambda parts: parts["model"].update(byte_fallback=True), "their models differ"),
    ],
)
def test_another_vocabulary_or_other_rules_are_incompatible(edit, message):
    found = tokenizer_compatibility(before=changed(edit), after=demo())
    assert found.verdict == "incompatible" and message in found.differences[0]
    with pytest.raises(InvalidInputError, match=message):
        found.common_or_refuse()


def test_ids_that_mean_other_tokens_are_never_common():
    found = tokenizer_compatibility(before=changed(swap), after=demo())
    assert (~found.common).nonzero()[:, 0].tolist() == [300, 301]


def test_more_merges_behind_the_same_ones_are_compatible_and_other_roles_are_told():
    def cut(parts):
        parts["model"]["merges"].pop()
        token = max(parts["model"]["vocab"], key=parts["model"]["vocab"].get)
        del parts["model"]["vocab"][token]

    found = tokenizer_compatibility(before=changed(cut), after=demo())
    assert found.verdict == "compatible" and found.common.tolist() == [True] * 4095
    assert "one has more merges, behind those of the other" in found.text
    plain = demo()
    plain.pad_token = None
    roles = tokenizer_compatibility(before=plain, after=demo())
    assert roles.verdict == "compatible" and "pad_token: None / '<|padding|>'" in roles.text


def test_another_post_processor_or_token_rule_is_told_and_changes_no_id():
    def template(parts):
        parts["post_processor"] = None
        parts["added_tokens"][0]["lstrip"] = not parts["added_tokens"][0]["lstrip"]

    found = tokenizer_compatibility(before=changed(template), after=demo())
    assert found.verdict == "compatible" and found.common.all()
    assert "1 added tokens are found in texts by other rules: '<|endoftext|>'" in found.text
