"""Batches of training steps, each a pure function of the step's number: what is resumed sees what it would have seen."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from exactivations.datamodules.text import TextDataModule
from exactivations.store.errors import IdentityError, InvalidInputError


def generator_at(what: str, *where: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a random generator that depends on nothing but the kind of device and these.

    Args:
        what: What is drawn, such as "masks": other things are drawn independently.
        where: Such as a seed and a step.
        device: Where it draws.
    """
    return torch.Generator(device).manual_seed(xxhash.xxh3_64_intdigest(repr((what, where)).encode()))


class StepBatches(pl.LightningDataModule):
    """Yields the batch of each step without end, from the step on at which the trainer is.

    Args:
        batch_of: From the number of a step to its batch.
        identity: What decides the batches, by name; a checkpoint of others is refused.
    """

    def __init__(self, batch_of: Callable[[int], Tensor], identity: dict[str, Any]) -> None:
        super().__init__()
        self.batch_of, self.identity = batch_of, identity

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Yields batches; Lightning calls it after a checkpoint is read, when the trainer knows its step."""
        assert self.trainer is not None
        return DataLoader(_From(self.trainer.global_step, self.batch_of), batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        """Returns what goes into a checkpoint."""
        return dict(self.identity)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Holds a checkpoint's batches against these.

        Raises:
            IdentityError: If they are others.
        """
        for what, mine in self.identity.items():
            if state_dict.get(what) != mine:
                raise IdentityError(
                    f"the checkpoint was trained on other batches: its {what} is {state_dict.get(what)}, and here {mine}"
                )


class _From(IterableDataset[Tensor]):
    def __init__(self, first: int, batch_of: Callable[[int], Tensor]) -> None:
        self._first, self._batch_of = first, batch_of

    def __iter__(self) -> Iterator[Tensor]:
        step = self._first
        while True:
            yield self._batch_of(step)
            step += 1


class ShuffledText:
    """A plan's batches of whole samples of equal length, without padding, in a random order that is another one in each epoch.

    Args:
        data: The texts; it is set up.
        seed: Of the order, and of which batches are held out.
        n_held_out: So many batches are for evaluation only.

    Raises:
        InvalidInputError: If nothing would be left to train on, or batches are padded.
    """

    def __init__(self, data: TextDataModule, seed: int, n_held_out: int) -> None:
        if data.plan_options.padding != "none":
            raise InvalidInputError("training takes batches without padding: leave padding at 'none'")
        if not 1 <= n_held_out < data.plan.n_batches:
            raise InvalidInputError(
                f"{n_held_out} batches were to be held out, and the dataset makes {data.plan.n_batches}: hold out at least 1 and "
                "fewer than that, take more samples, or lower the token budget"
            )
        self._data, self._seed = data, seed
        order = np.random.default_rng(seed).permutation(data.plan.n_batches)
        self._held_out, self._training = order[:n_held_out], np.sort(order[n_held_out:])
        self.identity = {**data.identity(), "seed": seed, "n_held_out": n_held_out}

    def __call__(self, step: int) -> Tensor:
        """Returns the token ids, int64 [B, L], of a step's batch."""
        epoch, place = divmod(step, len(self._training))
        order = np.random.default_rng([self._seed, epoch]).permutation(self._training)
        return self._batch(order[place])

    def held_out(self) -> list[Tensor]:
        """Returns the token ids of the batches that no step has."""
        return [self._batch(batch) for batch in self._held_out]

    def _batch(self, number: np.int64) -> Tensor:
        of_plan = self._data.plan.batch(int(number))
        return self._data.batch_with(int(self._data.tokens.sample_index[of_plan[0]])).input_ids
