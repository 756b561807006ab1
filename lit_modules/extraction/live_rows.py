"""Vectors of samples computed here and now, without a Trainer or a store."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exactivations.lit_modules.extraction.extractor import ActivationExtractor
from exactivations.lit_modules.extraction.live_activations import live_batches
from exactivations.lit_modules.extraction.origin import Samples, data_for, model_of
from exactivations.store.errors import InvalidInputError
from exactivations.store.means_file import MeansFile, origin_of, refuse_another_origin
from exactivations.store.vectors import Vector


@dataclass(frozen=True)
class LiveRows:
    """One row per sample, in dataset order.

    Attributes:
        rows: float64 [n, d].
        n_counted: int64 [n], tokens that count in each.
        sample_index: Their indices in the dataset.
        labels: Their values in a column, or their indices.
    """

    rows: Tensor
    n_counted: Tensor
    sample_index: list[int]
    labels: list[Any]


def live_rows(
    file: MeansFile,
    vector: Vector,
    samples: Samples,
    *,
    device: str = "cpu",
    model: str | None = None,
    tokenizer: str | None = None,
    label_column: str | None = None,
) -> LiveRows:
    """Computes a vector of samples in the model of some means, as the means were computed.

    Raises:
        IdentityError: If model, tokenizer or dtype are not those of the means.
        InvalidInputError: If the samples cannot be used; see `TextDataModule`.
    """
    name, options = model_of(file, model)
    extractor = ActivationExtractor(
        name, list(vector.hook_points), list(vector.poolings), options=options, store_dtype=file.identity["store_dtype"]
    )
    data = data_for(file, samples, tokenizer)
    if label_column is not None and label_column not in data.full_dataset.column_names:
        raise InvalidInputError(f"there is no column {label_column!r}; there are {', '.join(data.full_dataset.column_names)}")
    data.setup()
    extractor.load(device)
    now = origin_of({**extractor.identity(), **data.identity()}, vector.hook_points)
    refuse_another_origin(file.origin_at(vector.hook_points), now, "what is there now")
    n = len(data.tokens)
    found: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    counted = torch.empty(n, dtype=torch.int64)
    for batch in live_batches(extractor, data, device):
        positions = np.searchsorted(data.tokens.sample_index, batch.sample_index.numpy())
        found.append((positions, vector.rows(batch.activations)))
        masks = torch.split(batch.token_mask, batch.n_tokens.tolist())
        counted[torch.from_numpy(positions)] = torch.stack([mask.sum() for mask in masks])
    rows = np.empty((n, found[0][1].shape[1]))
    for positions, values in found:
        rows[positions] = values
    index = data.tokens.sample_index.tolist()
    labels = index if label_column is None else list(data.full_dataset.select_columns([label_column])[index][label_column])
    return LiveRows(torch.from_numpy(rows), counted, index, labels)
