"""Activations of samples computed here and now, without a Trainer or a store."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from exactivations.datamodules.examples import IntArray
from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.extraction.extractor import ActivationExtractor, check_counted, check_lengths
from exactivations.store.batches import ActivationBatch
from exactivations.store.finite import refuse_not_finite


def live_batches(extractor: ActivationExtractor, data: TextDataModule, device: str = "cpu") -> Iterator[ActivationBatch]:
    """Yields the activations of all samples of some data, on the host, in the steps of their plan.

    Raises:
        InvalidInputError: If the data does not fit the model or the poolings; see `check_lengths` and `check_counted`.
        NotFiniteError: If an activation is not finite, naming its sample.
    """
    data.setup()
    check_lengths(extractor.load(device).model, data)
    check_counted(extractor.poolings, data)
    steps = data.steps_of(list(range(data.plan.n_shards)))
    for number in range(len(steps)):
        out = extractor.predict_step(steps[number])
        out = replace(out, activations={name: values.cpu() for name, values in out.activations.items()})
        refuse_not_finite(out)
        yield out


class LiveActivations:
    """Activations of a data module's samples, computed when they are first asked for and then held in memory.

    It stands wherever an `ActivationStore` is read by number: `ActivationDataModule(LiveActivations(extractor, data), "label")`.
    What was computed is not verified against the samples alone, as a store's rows are. Under several ranks each computes all.

    Args:
        extractor: What is read, of which model.
        data: Whose samples; the columns that it keeps are those of `samples`.
        device: Where the model is put.

    Attributes:
        sample_index: int64 [n], as in the data's tokens.
    """

    def __init__(self, extractor: ActivationExtractor, data: TextDataModule, device: str = "cpu") -> None:
        self._extractor, self._data, self._device = extractor, data, device
        data.setup()
        self.sample_index: IntArray = data.tokens.sample_index

    def __len__(self) -> int:
        return len(self.sample_index)

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"live activations of {self._extractor.model_name or 'a model'}"

    @cached_property
    def samples(self) -> pa.Table:
        """One row a sample, as in a store's samples.parquet."""
        return self._data.samples

    @cached_property
    def token_start(self) -> IntArray:
        """int64 [n+1]: how many tokens the samples before each one have."""
        return np.concatenate([[0], np.cumsum(self._data.tokens.n_tokens, dtype=np.int64)])

    @property
    def per_token(self) -> Mapping[str, bool]:
        """Whether there is a row for each token, and not for each sample, by the name of the activation."""
        self._extractor.load(self._device)
        return {name: spec.per_token for name, spec in self._extractor.specs().items()}

    def rows(self, name: str, numbers: IntArray) -> Tensor:
        """Returns rows [m, D] by the number of the sample, or of the token; see `ActivationStore.rows`."""
        return self._computed[0][name][torch.from_numpy(numbers)]

    def token_ids(self, numbers: IntArray) -> Tensor:
        """Returns the ids int64 [m] of tokens by number."""
        return self._computed[1][torch.from_numpy(numbers)]

    def are_content(self, numbers: IntArray) -> Tensor:
        """Returns whether tokens by number are content, and not special, bool [m]."""
        return self._computed[2][torch.from_numpy(numbers)]

    @cached_property
    def _computed(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """All activations by name, and the ids and the mask of all tokens."""
        per_token, start, n_tokens = self.per_token, self.token_start, int(self.token_start[-1])
        found: dict[str, Tensor] = {}
        ids, mask = torch.empty(n_tokens, dtype=torch.int64), torch.empty(n_tokens, dtype=torch.bool)
        for batch in live_batches(self._extractor, self._data, self._device):
            places = np.searchsorted(self.sample_index, batch.sample_index.numpy())
            tokens = torch.from_numpy(np.concatenate([np.arange(start[place], start[place + 1]) for place in places]))
            ids[tokens], mask[tokens] = batch.input_ids, batch.token_mask
            for name, values in batch.activations.items():
                n = n_tokens if per_token[name] else len(self)
                out = found.setdefault(name, torch.empty(n, values.shape[1], dtype=values.dtype))
                out[tokens if per_token[name] else torch.from_numpy(places)] = values
        return found, ids, mask
