"""What differs between the tokenizers of two models, and which ids mean the same token in both."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from exactivations.datamodules.tokenization import tokenizer_hash
from exactivations.store.errors import InvalidInputError, shown

N_EXAMPLES = 3
SEGMENTATION = ("normalizer", "pre_tokenizer", "model")
"""Parts of a tokenizer that decide into which tokens a text is cut."""


@dataclass(frozen=True)
class TokenizerCompatibility:
    """Whether the logits of two models speak of the same tokens.

    Attributes:
        verdict: "identical" if nothing differs; "compatible" if texts are cut in the same way and every id that both have means the
            same token, but for special and added ones; else "incompatible".
        differences: Each in words, with examples; those that make the two incompatible come first.
        common: bool [C], True for ids that mean the same token in both, up to the smaller vocabulary's last id. It is what
            `ModelPair` and `LogitDifferenceProcessor` take.
    """

    verdict: Literal["identical", "compatible", "incompatible"]
    differences: tuple[str, ...]
    common: Tensor

    @property
    def text(self) -> str:
        """All of it, for people."""
        head = f"{self.verdict}: {int(self.common.sum())} ids mean the same token in both vocabularies"
        return "\n".join([head, *(f"- {difference}" for difference in self.differences)])

    def common_or_refuse(self) -> Tensor:
        """Returns `common`.

        Raises:
            InvalidInputError: If the tokenizers are incompatible.
        """
        if self.verdict == "incompatible":
            raise InvalidInputError(
                f"the tokenizers of the before and the after model are {self.text}\nExpected two models of one vocabulary, such as "
                "a model and what was fine-tuned from it"
            )
        return self.common


def tokenizer_compatibility(*, before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase) -> TokenizerCompatibility:
    """Compares vocabularies, added and special tokens, the rules by which texts are cut, and chat templates."""
    of_before, of_after = _token_of_id(before), _token_of_id(after)
    shared = sorted(of_before.keys() & of_after.keys())
    common = torch.zeros(min(max(of_before), max(of_after)) + 1, dtype=torch.bool)
    common[[i for i in shared if of_before[i] == of_after[i]]] = True
    added = {*before.get_added_vocab().values(), *after.get_added_vocab().values()}
    renamed = [i for i in shared if of_before[i] != of_after[i]]

    def named(ids: Sequence[int]) -> str:
        return _examples([f"{i}: {shown(of_before.get(i))} / {shown(of_after.get(i))}" for i in ids])

    breaking, other = _differing_rules(before=before, after=after)
    ordinary = [i for i in renamed if i not in added]
    if ordinary:
        breaking.append(f"{len(ordinary)} ids are different tokens (before / after): {named(ordinary)}")
    if not common.any():
        breaking.append("no id means the same token in both")
    if len(renamed) > len(ordinary):
        special = [i for i in renamed if i in added]
        other.append(f"{len(special)} added or special ids are different tokens (before / after): {named(special)}")
    for name, mine, theirs in (("before", of_before, of_after), ("after", of_after, of_before)):
        only = sorted(mine.keys() - theirs.keys())
        if only:
            other.append(f"{len(only)} ids are in the vocabulary of the {name} model only: {named(only)}")
    if not breaking and not other and tokenizer_hash(before) != tokenizer_hash(after):
        breaking.append("they differ in something that has no name here (their hashes differ)")
    verdict: Literal["identical", "compatible", "incompatible"] = "compatible" if other else "identical"
    return TokenizerCompatibility("incompatible" if breaking else verdict, (*breaking, *other), common)


def _differing_rules(*, before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """Returns what differs of the rules: what changes how texts are cut, and what does not."""
    breaking: list[str] = []
    other: list[str] = []
    if before.is_fast and after.is_fast:
        breaking, other = _differing_parts(before=_parts(before), after=_parts(after))
    elif tokenizer_hash(before) != tokenizer_hash(after):
        breaking = [f"rules of {type(before).__name__} and {type(after).__name__} cannot be compared: one is no fast tokenizer"]
    roles = [{name: str(token) for name, token in t.special_tokens_map.items()} for t in (before, after)]
    differing = [name for name in sorted({*roles[0], *roles[1]}) if roles[0].get(name) != roles[1].get(name)]
    if differing:
        words = [f"{name}: {shown(roles[0].get(name))} / {shown(roles[1].get(name))}" for name in differing]
        other.append(f"special tokens differ (before / after): {_examples(words)}")
    if getattr(after, "split_special_tokens", False) != getattr(before, "split_special_tokens", False):
        other.append("only one splits special tokens that stand in a text")
    if after.chat_template != before.chat_template:
        has = [name for name, t in (("before", before), ("after", after)) if t.chat_template is not None]
        other.append("their chat templates differ" if len(has) == 2 else f"only the {has[0]} model has a chat template")
    return breaking, other


def _parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns the parts of a fast tokenizer as JSON, its vocabulary and the state of its last call left out."""
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = dict(parts.pop("model"))
    vocabulary = model.pop("vocab", {})
    # A unigram's vocabulary is a list of (token, score), which takes the part of merges.
    parts["merges"] = model.pop("merges", vocabulary if isinstance(vocabulary, list) else [])
    parts["added_tokens"] = {token["id"]: token for token in parts["added_tokens"]}
    return {"model": model, **{name: part for name, part in parts.items() if name not in ("truncation", "padding", "version")}}


def _differing_parts(*, before: dict[str, Any], after: dict[str, Any]) -> tuple[list[str], list[str]]:
    breaking = [f"they cut texts differently: their {name}s differ" for name in SEGMENTATION if before[name] != after[name]]
    other = []
    shorter = min(len(before["merges"]), len(after["merges"]))
    changed = [i for i in range(shorter) if before["merges"][i] != after["merges"][i]]
    if changed:
        words = [f"{before['merges'][i]} / {after['merges'][i]}" for i in changed]
        breaking.append(f"they cut texts differently: {len(changed)} merges differ (before / after): {_examples(words)}")
    elif len(before["merges"]) != len(after["merges"]):
        other.append(
            f"one has more merges, behind those of the other: {len(before['merges'])} before, {len(after['merges'])} after"
        )
    both = before["added_tokens"].keys() & after["added_tokens"].keys()
    pairs = [(before["added_tokens"][i], after["added_tokens"][i]) for i in sorted(both)]
    changed_tokens = [shown(b["content"]) for b, a in pairs if b != a and b["content"] == a["content"]]
    if changed_tokens:
        other.append(f"{len(changed_tokens)} added tokens are found in texts by other rules: {_examples(changed_tokens)}")
    for name in ("post_processor", "decoder"):
        if before[name] != after[name]:
            other.append(f"their {name}s differ (which adds special tokens, or makes text of ids)")
    return breaking, other


def _token_of_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def _examples(words: Sequence[str]) -> str:
    return ", ".join(words[:N_EXAMPLES]) + (f" and {len(words) - N_EXAMPLES} more" if len(words) > N_EXAMPLES else "")
