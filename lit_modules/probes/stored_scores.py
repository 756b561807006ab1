"""Scores of stored rows by saved probes: a block of rows at a time."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from exactivations.datamodules.example_reading import refuse_not_finite_rows
from exactivations.datamodules.examples import ActivationSource, IntArray
from exactivations.datamodules.token_parts import content_tokens
from exactivations.lit_modules.probes.probe_file import SavedProbes
from exactivations.store.errors import InvalidInputError

BLOCK = 4096


def stored_scores(
    probes: SavedProbes, names: Sequence[str], source: ActivationSource, numbers: IntArray
) -> dict[str, Float[Tensor, "n k"]]:
    """Returns the scores of each of some vectors or ensembles, float32, as `SavedProbes.scores`.

    Args:
        probes: The probes.
        names: Vectors or ensembles.
        source: What rows are read from; `SavedProbes.refuse_another` says whether it is theirs.
        numbers: int64 [n], places of samples in `source.sample_index`, or, of probes of tokens, numbers of tokens.

    Raises:
        InvalidInputError: If a row is not finite, or a sample has no content token to attend to; it is named.
    """
    vectors = list(dict.fromkeys(vector for name in names for vector in probes.vectors_of(name)))
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for start in range(0, len(numbers), BLOCK):
        block = of_rows = numbers[start : start + BLOCK]
        n_tokens = None
        if probes.content["over_tokens"]:
            of_rows, n_tokens = content_tokens(source, block)
            if not n_tokens.all():
                empty = source.sample_index[block[int(n_tokens.argmin())]]
                raise InvalidInputError(f"sample {empty} of {source.title} has no content token, so nothing to attend to")
        per_token = probes.scored_per_token or n_tokens is not None
        places = source.token_start.searchsorted(of_rows, side="right") - 1 if per_token else of_rows
        rows = {vector: source.rows(vector, of_rows) for vector in vectors}
        for vector, values in rows.items():
            refuse_not_finite_rows(vector, values, source.sample_index[places])
        for name in names:
            found[name].append(probes.scores(name, rows, n_tokens))
    return {name: torch.cat(pieces) for name, pieces in found.items()}
