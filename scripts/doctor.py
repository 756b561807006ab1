"""`exactivations doctor`: what is safe on this very model, dtype and attention implementation, tried before a long run."""

import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from exactivations.lit_modules.models.doctor import Finding
    from exactivations.lit_modules.models.language_model import ModelOptions

HEADER = ("case", "verdict", "error", "rounding", "float32", "cosine", "worst at")
COLUMNS = "  {:<39} {:<14} {:>8} {:>9} {:>8} {:>8}  {}"
LEGEND = """\
  error: of a token's state, relative to the same sample alone in the same dtype. rounding: the sample alone, against itself
  in float32. float32: the error with all in float32. cosine: the lowest. Each is the worst of all hook points and tokens."""


def doctor(
    model: str,
    *,
    revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    max_length: int = 64,
    seed: int = 0,
) -> None:
    """Tries on a model which ways of batching keep each token's state what it is for the sample alone, and says what is safe.

    Args:
        model: "demo" (embedded), a Hugging Face hub id, or a local path.
        revision: Branch, tag or commit of a hub model.
        dtype: The model's dtype. auto: the checkpoint's on a GPU, float32 on a CPU.
        attn_implementation: sdpa, eager, flash_attention_2, ... Default: the model's.
        trust_remote_code: Whether code from the model's repository may run.
        device: cpu, cuda, or auto: a GPU if there is one.
        max_length: Tokens of the longest sample that is tried. Longer ones see more (sliding windows), and cost more.
        seed: Of the random tokens that are tried.
    """
    import torch

    from exactivations.lit_modules.extraction.extractor import refuse_random_weights
    from exactivations.lit_modules.models.doctor import CASES, EXACT_LENGTH, RIGHT_PADDING, Verdict, trial_for, why_wrong
    from exactivations.lit_modules.models.language_model import ModelOptions, forward_arguments, load_model
    from exactivations.store.errors import InvalidInputError

    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError("--device cuda: torch finds no GPU here; use --device cpu, or auto")
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    options = ModelOptions(revision, dtype, attn_implementation, trust_remote_code)
    weights = load_model(model, options, chosen)
    body = weights.body
    body.to(chosen)  # type: ignore[arg-type]  # transformers' own annotation lacks torch.device
    pad = pad_token(body, load_tokenizer(model, options))
    trial = trial_for(body, pad_id=pad.id, excluded=pad.special, max_length=max_length, seed=seed)
    refuse_random_weights(body, trial.hook_points, forward_arguments(body), weights.random)
    longest = max(len(ids) for ids in trial.samples)
    attention = getattr(body.config, "_attn_implementation", None)
    print(f"{model}: {type(body).__name__}, {_short(body.dtype)}, attention {attention}, on {chosen}")
    print(f"{len(trial.samples)} samples of 1 to {longest} random tokens, read at {len(trial.hook_points)} hook points")
    print(COLUMNS.format(*HEADER))
    findings = {}
    for case in CASES:
        findings[case] = trial.examine(case)
        print(row(findings[case]), flush=True)
    print(LEGEND)
    print_facts(body, pad)
    wrong = [findings[case] for case in EXACT_LENGTH if findings[case].verdict is Verdict.WRONG]
    if wrong:
        raise InvalidInputError(
            f"{wrong[0].case.name} is WRONG: what is extracted in batches from {type(body).__name__} in {_short(body.dtype)} "
            f"is not what it computes for a sample alone: {why_wrong(wrong[0])}. {remedy(wrong[0])}"
        )
    print(f"-> {advice(body, findings[RIGHT_PADDING])}")


@dataclass(frozen=True)
class PadToken:
    """The token that fills up shorter samples.

    Attributes:
        id: Its id.
        special: All ids that the tokenizer calls special.
        about: Where it comes from, whether it is the end-of-text token too, and what follows, in words.
    """

    id: int
    special: frozenset[int]
    about: str


def load_tokenizer(name: str, options: "ModelOptions") -> "PreTrainedTokenizerBase | None":
    """Returns the tokenizer that comes with a model; None if none does."""
    from transformers import AutoTokenizer

    from exactivations.datamodules.embedded import resolve_model

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            resolve_model(name), revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except (OSError, ValueError, ImportError):
        return None
    # Where a folder holds no tokenizer, transformers makes one from the configuration, with special tokens and nothing else.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None


def pad_token(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None") -> PadToken:
    """Chooses the token to pad with: the pad token of the tokenizer (or configuration), else its end-of-text token, else id 0."""
    from exactivations.lit_modules.models.language_model import vocabulary_size

    source, whose = (tokenizer, "tokenizer") if tokenizer is not None else (model.config.get_text_config(), "configuration")
    size = vocabulary_size(model)
    pad, eos = ([i for i in _ids(getattr(source, name, None))] for name in ("pad_token_id", "eos_token_id"))
    notes = [] if tokenizer is not None else ["no tokenizer comes with the model"]
    outside = [i for i in pad[:1] + eos[:1] if size is not None and not 0 <= i < size]
    notes += [f"the {whose} names id {i}, which is not among the model's {size} embeddings" for i in dict.fromkeys(outside)]
    pad, eos = ([i for i in ids if i not in outside] for ids in (pad, eos))
    danger = "so a mask made from ids (ids != pad) would drop real end-of-text tokens: make it from lengths"
    if pad and pad[0] in eos:
        notes.append(f"pad and eos are the same token ({pad[0]}), {danger}")
    elif pad:
        notes.append(f"pad is {pad[0]}, eos is {' or '.join(map(str, eos)) or 'not named'}: they differ")
    elif eos:
        notes.append(f"the {whose} has no pad token; padded here, as is usual, with eos ({eos[0]}), {danger}")
    else:
        notes.append(f"the {whose} has neither pad nor eos; padded here with id 0")
    special = frozenset(tokenizer.all_special_ids) if tokenizer is not None else frozenset[int]()
    return PadToken([*pad, *eos, 0][0], special, "; ".join(notes))


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def row(finding: "Finding") -> str:
    """Returns one line of the table."""
    worst, own, control = finding.decisive, finding.own, finding.control
    if worst is None or own is None or control is None:
        return COLUMNS.format(finding.case.name, finding.verdict, "", "", "", "", finding.reason).rstrip()
    where = f"{worst.name}, token {worst.worst_row} of {finding.n_tokens}" if worst.error else ""
    where += " (float32 is right)" if control.agrees and not own.agrees else ""
    rounding = f"{own.rounding:.1e}" if own is not control else "-"  # in float32 itself it is not known
    figures = (_figure(own.error), rounding, _figure(control.error), f"{worst.cosine:.4f}")
    return COLUMNS.format(finding.case.name, finding.verdict, *figures, where).rstrip()


def _figure(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def print_facts(model: "PreTrainedModel", pad: PadToken) -> None:
    """Prints what was measured besides the cases: causality, the final norm, the pad token."""
    from exactivations.lit_modules.models.ground_truth import FLOAT32_TOLERANCE
    from exactivations.lit_modules.models.hook_points import dissect, resolve_hook_points
    from exactivations.lit_modules.models.model_facts import influence_of_later_tokens, last_hidden_state

    anatomy = dissect(model)
    influence, where = influence_of_later_tokens(model, resolve_hook_points(model, anatomy.names()))
    if not math.isfinite(influence):
        print(f"  causal: cannot be told, states are not finite at {where}")
    elif influence <= FLOAT32_TOLERANCE:
        print(f"  causal: yes, changing later tokens changes no earlier state (relative difference {influence:.1g})")
    else:
        print(f"  causal: no, changing later tokens changes earlier states (at {where} by {influence:.2g} of their norm)")
    print(f"  final norm: {about_final_norm(f'resid_post.{anatomy.n_blocks - 1}', last_hidden_state(model))}")
    print(textwrap.fill(f"pad token: {pad.about}", 128, initial_indent="  ", subsequent_indent="    "))


def about_final_norm(last_block: str, differences: dict[str, float]) -> str:
    """Says which hook points are before and after the final norm, from the differences of `hidden_states[-1]` to them."""
    from exactivations.lit_modules.models.ground_truth import FLOAT32_TOLERANCE

    if not differences:
        return "the model gives no hidden_states to compare with"
    same = [name for name, difference in differences.items() if difference <= FLOAT32_TOLERANCE]
    shown = ", ".join(f"from {name} by {difference:.2g}" for name, difference in differences.items())
    if "final_norm" in same and last_block not in same:
        far, near = differences[last_block], differences["final_norm"]
        return (
            f"{last_block} is before it, final_norm after it, and a language-model head reads final_norm\n"
            f"  hidden_states[-1] of Hugging Face is final_norm (difference {near:.1g}), not {last_block} ({far:.2g})"
        )
    if "final_norm" in same:
        return f"it changes nothing on these tokens: hidden_states[-1], final_norm and {last_block} are the same"
    if last_block in same:
        norm = "none was found" if "final_norm" not in differences else f"hidden_states[-1] is before it (differs {shown})"
        return f"{norm}; hidden_states[-1] is {last_block} (difference {differences[last_block]:.1g})"
    return f"hidden_states[-1] is neither the last block's output nor our final_norm (it differs {shown}): look before you use it"


def advice(model: "PreTrainedModel", right_padding: "Finding") -> str:
    """Says what extract can safely use for this model."""
    from exactivations.lit_modules.models.model_facts import length_dependent_rope

    batches = "extract: batches of one length (the default) are right for this model"
    if not right_padding.verdict.is_right:
        return f"{batches}; --padding tail is not, and is refused"
    if types := length_dependent_rope(model):
        return f"{batches}; --padding tail is refused, since rotary embeddings change with the length ({', '.join(sorted(types))})"
    return f"{batches}; --padding tail is too ({right_padding.verdict})"


def remedy(finding: "Finding") -> str:
    """Says what to do about batches of one length that are WRONG."""
    control = finding.control
    if control is not None and control.agrees:
        return "Float32 is right: use --dtype float32 (a number that overflows, or a router's near tie, tips over in less)"
    return "Its samples change each other in every dtype: extract them one at a time, with --token-budget 1"


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
