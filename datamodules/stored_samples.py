"""StoredSamples: all samples of a source, without labels, for Trainer.predict."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from exactivations.datamodules.example_order import ExamplesInOrder
from exactivations.datamodules.example_reading import refuse_not_finite_rows
from exactivations.datamodules.examples import ActivationSource, Examples, IntArray
from exactivations.store.errors import InvalidInputError


class StoredSamples(pl.LightningDataModule):
    """Yields every sample of a source once, in steps of all vectors; each rank reads its share of them.

    Use `Trainer(use_distributed_sampler=False)`.

    Args:
        source: A store, or anything else that is read by number.
        names: Which activations, with one row for each sample.
        batch_size: Samples of a step, on one rank.

    Raises:
        InvalidInputError: If the source has no such activation; later, if a row is not finite, naming its sample.
    """

    def __init__(self, source: ActivationSource, names: Sequence[str], batch_size: int = 1024) -> None:
        super().__init__()
        absent = [name for name in names if source.per_token.get(name, True)]
        if absent or not names:
            fitting = [name for name, per_token in source.per_token.items() if not per_token]
            raise InvalidInputError(
                f"{source.title} has no {absent[0] if absent else 'activation that was named'} with a row for each sample; of such "
                f"it has {', '.join(fitting) or 'none'}"
            )
        self.source, self.names, self.batch_size = source, list(names), batch_size

    def predict_dataloader(self) -> DataLoader[Examples]:
        """All samples in order."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        every = torch.arange(len(self.source)).numpy()
        order = ExamplesInOrder(every, self.batch_size, rank, world_size)
        return DataLoader(_Blocks(self.source, self.names), batch_size=None, sampler=order)


class _Blocks(Dataset[Examples]):
    def __init__(self, source: ActivationSource, names: Sequence[str]) -> None:
        self._source, self._names = source, names

    def __getitem__(self, item: tuple[IntArray, int]) -> Examples:
        numbers, n = item
        rows = {name: self._source.rows(name, numbers) for name in self._names}
        for name, values in rows.items():
            refuse_not_finite_rows(name, values, self._source.sample_index[numbers])
        return Examples(rows, torch.empty(0, n, dtype=torch.int64), torch.from_numpy(numbers), None, n)
