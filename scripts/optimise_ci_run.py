"""The parts of `exactivations optimise-ci`: the prompt, the optimisation, the file, and the table at the end."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from exactivations.datamodules.named_tokenizer import load_tokenizer
from exactivations.lit_modules.decomposition.causal_importance import hard_sigmoid
from exactivations.lit_modules.decomposition.ci_function_file import read_ci_function
from exactivations.lit_modules.decomposition.ci_optimisation import CiOptimisation
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.lit_modules.decomposition.decomposition import raw_importances
from exactivations.lit_modules.decomposition.optimised_sets import CiOptions, OptimisedSet
from exactivations.lit_modules.models.language_model import ModelOptions
from exactivations.scripts.trainers import trainer_on
from exactivations.store.ci_sets import CiSets, write_ci_sets
from exactivations.store.errors import InvalidInputError

OWN = "own"


@dataclass(frozen=True)
class Prompt:
    """A prompt and the token to predict.

    Attributes:
        text: As given.
        ids: int64 [L].
        target: Its id; None leaves it to the model.
        tokenizer: Of both.
    """

    text: str
    ids: Tensor
    target: int | None
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, text: str, target: str | None, model: str, options: ModelOptions, add_special_tokens: bool) -> "Prompt":
        """Tokenizes.

        Raises:
            InvalidInputError: If the prompt has no tokens, or the target is not one token.
        """
        tokenizer = load_tokenizer(model, revision=options.revision, trust_remote_code=options.trust_remote_code)
        ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        if not ids:
            raise InvalidInputError(f"--prompt {text!r} has no tokens: give a text to predict the next token of")
        prompt = cls(text, torch.tensor(ids, dtype=torch.int64), None, tokenizer)
        if target is None:
            return prompt
        of_target = tokenizer(target, add_special_tokens=False)["input_ids"]
        if len(of_target) != 1:
            raise InvalidInputError(
                f"--target {target!r} is {len(of_target)} tokens, {[prompt.text_of(token) for token in of_target]}: give one, with "
                "the blank before it if it has one"
            )
        return cls(text, prompt.ids, of_target[0], tokenizer)

    def text_of(self, token: int) -> str:
        """Returns a token's text."""
        return str(self.tokenizer.decode([token]))


def refuse_out(out: str, *, overwrite: bool) -> None:
    """Refuses a file that cannot be written before anything is computed.

    Raises:
        InvalidInputError: If it is no .json file, its folder is not there, or it is there already and not to be replaced.
    """
    if Path(out).suffix != ".json" or not Path(out).parent.is_dir():
        raise InvalidInputError(f"sets are written as JSON: --out {out} must end in .json, and its folder must be there")
    if Path(out).exists() and not overwrite:
        raise InvalidInputError(f"{out} is there already: name another file, or pass --overwrite")


def optimise(
    components: ComponentModel, prompt: Prompt, seeds: Sequence[int], options: CiOptions, ci_function: str | None,
    accelerator: str, out: str,
) -> None:  # fmt: skip
    """Optimises, writes the sets, and tells what came of each."""
    own = None
    if ci_function is not None:
        with torch.no_grad():
            _, raw = raw_importances(components, read_ci_function(ci_function, components), prompt.ids[None])
        own = {path: of_map[0] for path, of_map in raw.items()}
    optimisation = CiOptimisation(components, prompt.ids, seeds, options, target=prompt.target, own=own)
    target = f"{prompt.text_of(optimisation.target)!r} ({optimisation.own_probability:.3f} by the original model)"
    n = optimisation.before_sigmoid.shape[1]
    print(f"{len(prompt.ids)} tokens, next {target}; {len(seeds)} sets of {n:,} importances, {options.steps:,} steps", flush=True)
    began = time.monotonic()
    trainer = trainer_on(accelerator, 1, max_epochs=1, logger=False, enable_progress_bar=sys.stderr.isatty())
    trainer.fit(optimisation)
    names, values = [f"seed_{seed}" for seed in seeds], optimisation.importances()
    if own is not None:
        names.append(OWN)
        values = {path: torch.cat([of_map, hard_sigmoid(own[path])[None].cpu()]) for path, of_map in values.items()}
    write_ci_sets(out, CiSets(prompt.text, tuple(names), {path: of_map.float() for path, of_map in values.items()}))
    print(f"{time.monotonic() - began:.1f} s; {', '.join(names)} -> {out}")
    print(table(optimisation.optimised, n))


def table(sets: Sequence[OptimisedSet], n: int) -> str:
    """Returns what came of each seed, one a column, and how much of each map is alive.

    Args:
        sets: Of the same maps.
        n: How many pairs of position and component took part.
    """
    rows = [["", *(f"seed_{one.seed}" for one in sets)]]
    rows.append(["loss", *(f"{one.loss:.3f}" for one in sets)])
    rows.append(["probability of the target, masks random", *(f"{one.stochastic_probability:.3f}" for one in sets)])
    rows.append(["  and with importances as masks", *(f"{one.probability:.3f}" for one in sets)])
    rows.append([f"alive (position, component) of {n:,}", *(f"{sum(one.alive.values()):,}" for one in sets)])
    rows += [[f"  {path}", *(f"{one.alive[path]:,}" for one in sets)] for path in sets[0].alive]
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        f"{row[0]:<{first}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], others, strict=True)) for row in rows
    )
