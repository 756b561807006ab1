"""TokenStream: a store's token rows, shuffled, of several hook points at once and without labels."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import psutil
import torch

from exactivations.datamodules.dealing import deal_groups, deal_samples
from exactivations.datamodules.example_reading import refuse_not_finite_rows
from exactivations.datamodules.examples import IntArray
from exactivations.datamodules.label_files import column_of
from exactivations.datamodules.row_statistics import RowStatistics
from exactivations.datamodules.stored_tokens import BITS, StoredTokens
from exactivations.datamodules.token_order import TokenOrder
from exactivations.datamodules.token_rows import TokenRows
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError
from exactivations.store.moments import ROWS_AT_ONCE, Moments

PARTS = ("train", "validation")
TOKENS = "/tokens"
WINDOWS_HELD = 2  # the one that is given, and the next one, which is read meanwhile


class TokenStream(pl.LightningDataModule):
    """Yields `TokenRows` of a store: all tokens of an epoch once, shuffled, row i of all hook points being the same token.

    In a Trainer an epoch is one of the Trainer's. Without one it is an iterable: `for batch in stream` gives `epochs` epochs, from
    where `state_dict` says on. Steps are the same on any number of ranks; each takes, and reads, its share of every step, so all
    ranks have as many. Blocks of the files come in a random order and `buffer_tokens` tokens of them are shuffled together, see
    `TokenOrder`: two tokens of one block meet in a step about as often as if they were two of buffer_tokens, and not of all tokens.

    A rank holds two windows of buffer_tokens / ranks rows of each hook point (`held_bytes`), of a store of any size.

    Args:
        source: A store with token rows.
        hook_points: Which; None takes all that have token rows.
        batch_size: Tokens of a step, on all ranks together; for several ranks, twice as many as ranks at least.
        seed: Of the order and of the split.
        epochs: How many there are without a Trainer.
        content_only: Leave out special tokens.
        validation: Share of samples that are not trained on; a sample is never in both parts.
        group: The column of which no value is to be in both parts.
        buffer_tokens: Tokens that are shuffled together, on all ranks together.
        block_tokens: Tokens that lie, and are read, together; a multiple of 8.
        rank: Whose share is given; None asks the Trainer, then torch.distributed.
        world_size: Of how many; None likewise.

    Raises:
        InvalidInputError: For options that cannot be used as asked, hook points without token rows, groups that cannot be split, a
            part without tokens, or windows that are larger than the memory; later, for a row that is not finite, naming its sample,
            and for a state of another stream.
    """

    def __init__(
        self,
        source: ActivationStore,
        hook_points: Sequence[str] | None = None,
        *,
        batch_size: int = 4096,
        seed: int = 0,
        epochs: int = 1,
        content_only: bool = True,
        validation: float = 0.0,
        group: str | None = None,
        buffer_tokens: int = 1 << 18,
        block_tokens: int = 512,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        least = {"batch_size": (batch_size, 1), "buffer_tokens": (buffer_tokens, 1), "epochs": (epochs, 0), "seed": (seed, 0)}
        for name, (value, smallest) in least.items():
            if value < smallest:
                raise InvalidInputError(f"{name} must be at least {smallest}, got {value}")
        if block_tokens < BITS or block_tokens % BITS:
            raise InvalidInputError(f"block_tokens must be a multiple of {BITS}, got {block_tokens}")
        if not 0 <= validation < 1 or (group is not None and not validation):
            raise InvalidInputError(f"validation must be a share from 0 to below 1, and above 0 with a group, got {validation}")
        if (rank is None) != (world_size is None) or (rank is not None and not 0 <= rank < (world_size or 0)):
            raise InvalidInputError(
                f"give rank and world_size together, rank from 0 to world_size - 1; got {rank} and {world_size}"
            )
        self.source = source
        with_tokens = [name.removesuffix(TOKENS) for name, per_token in source.per_token.items() if per_token]
        self.hook_points = list(dict.fromkeys(with_tokens if hook_points is None else hook_points))
        for hook_point in self.hook_points or [""]:
            if hook_point not in with_tokens:
                raise InvalidInputError(
                    f"{source.title} has no token rows of {hook_point or 'any hook point'}; it has them of: "
                    f"{', '.join(with_tokens) or 'none. Extract with --pooling tokens'}"
                )
        self.batch_size, self.seed, self.epochs = batch_size, seed, epochs
        self.content_only, self.validation, self.group = content_only, validation, group
        self.buffer_tokens, self.block_tokens = buffer_tokens, block_tokens
        self._rank, self._world_size = rank, world_size
        self._epoch, self._step = 0, 0  # where the next step to be given is

    def setup(self, stage: str = "fit") -> None:
        """Splits, and reads the masks. Doing it twice costs nothing."""
        _ = self._orders

    @cached_property
    def part_of_sample(self) -> npt.NDArray[np.int8]:
        """int8 [n]: 0 for samples that are trained on, 1 for validation, in the order of `source.sample_index`."""
        n = len(self.source)
        if not self.validation:
            return np.zeros(n, dtype=np.int8)
        shares, dice, strata = (1 - self.validation, self.validation), np.random.default_rng(self.seed), np.zeros(n, dtype=np.int64)
        if self.group is None:
            groups = np.arange(n)
        else:
            column = column_of(self.source, self.group)
            if column.null_count:
                first = column.to_pylist().index(None)
                raise InvalidInputError(
                    f"sample {self.source.sample_index[first]} has nothing in column {self.group!r} ({column.null_count:,} of "
                    f"{n:,} samples): every sample needs a group"
                )
            groups = np.unique(np.array(column.to_pylist()), return_inverse=True)[1]
        n_groups = int(groups.max(initial=-1)) + 1
        if n_groups < len(PARTS):
            raise InvalidInputError(
                f"there are {n_groups} {self.group or 'sample'}s, which cannot make two parts: leave validation out"
            )
        part = deal_samples(strata, shares, dice) if self.group is None else deal_groups(strata, groups, shares, dice)
        return part.astype(np.int8)

    @cached_property
    def _tokens(self) -> StoredTokens:
        return StoredTokens(self.source, self.hook_points[0], self.part_of_sample, content_only=self.content_only)

    @cached_property
    def _orders(self) -> dict[str, TokenOrder]:
        counts = self._tokens.counts(self.block_tokens, len(PARTS))
        orders = {}
        for number, part in enumerate(PARTS if self.validation else PARTS[:1]):
            if not counts[number].any():
                raise InvalidInputError(f"{self.source.title} has no {'content ' * self.content_only}token in {part}")
            orders[part] = TokenOrder(
                self._tokens, number, counts[number], batch_size=self.batch_size, block_tokens=self.block_tokens,
                buffer_tokens=self.buffer_tokens, seed=None if part == "validation" else self.seed,
            )  # fmt: skip
        return orders

    @property
    def n_tokens(self) -> dict[str, int]:
        """How many tokens each part has."""
        return {part: order.n_tokens for part, order in self._orders.items()}

    @property
    def n_steps(self) -> int:
        """Steps of an epoch of training."""
        return self._orders["train"].n_steps

    @property
    def held_bytes(self) -> int:
        """Bytes that this rank holds while it reads: two windows of rows with their identity, and the index of the tokens."""
        order = self._orders["train"]
        of_window = max(
            order.step_start(order.steps(w).stop) - order.step_start(order.steps(w).start) for w in range(order.n_windows)
        )
        specs = [self.source.info.activations[hook_point + TOKENS] for hook_point in self.hook_points]
        of_row = sum(spec["width"] * getattr(torch, spec["dtype"]).itemsize for spec in specs) + 8 + 8 + 4
        share = -(-of_window // self._place_in_world()[1])
        held: int = WINDOWS_HELD * (share * of_row + of_window * 8) + self._tokens.nbytes
        return held

    def _place_in_world(self) -> tuple[int, int]:
        """Returns rank and number of ranks."""
        if self._rank is not None and self._world_size is not None:
            return self._rank, self._world_size
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def __iter__(self) -> Iterator[TokenRows]:
        """Yields this rank's share of each step, from where the state says to the end of the last epoch."""
        while self._epoch < self.epochs:
            yield from self._from(self._epoch, self._step)
            self._epoch, self._step = self._epoch + 1, 0

    def rewind(self) -> None:
        """Begins anew with the first epoch."""
        self._epoch, self._step = 0, 0

    def _from(self, epoch: int, step: int) -> Iterator[TokenRows]:
        """Yields the steps of an epoch of training, and counts a step when it is given."""
        for at, batch in enumerate(self._read("train", epoch, step), start=step + 1):
            self._epoch, self._step = epoch, at
            yield batch

    def _read(self, part: str, epoch: int, step: int = 0) -> Iterator[TokenRows]:
        """Yields this rank's share of the steps of an epoch, from one on; the next window is read meanwhile."""
        order, (rank, world_size) = self._orders[part], self._place_in_world()
        order.refuse_ranks(world_size)
        if step >= order.n_steps:
            return
        needed, free = self.held_bytes, psutil.virtual_memory().available
        if needed > free:
            raise InvalidInputError(
                f"two windows of {self.buffer_tokens:,} tokens need {needed / 2**30:.1f} GiB on each rank, {free / 2**30:.1f} GiB "
                "of memory are free: give fewer buffer_tokens, or fewer hook points"
            )

        def window_from(window: int) -> tuple[TokenRows, list[int]]:
            steps = [at for at in order.steps(window) if at >= step]
            before = order.step_start(order.steps(window).start)
            numbers = order.window(epoch, window)
            shares = [numbers[order.step_start(at) - before : order.step_start(at + 1) - before][rank::world_size] for at in steps]
            return self.rows(np.concatenate(shares)), [len(share) for share in shares]

        windows = range(order.window_of(step), order.n_windows)
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(window_from, windows[0])
            for window in windows:
                rows, sizes = coming.result()
                if window != windows[-1]:
                    coming = thread.submit(window_from, window + 1)
                ends = np.cumsum(sizes).tolist()
                for first, last in zip([0, *ends[:-1]], ends, strict=True):
                    yield rows.part(first, last)

    def rows(self, numbers: IntArray) -> TokenRows:
        """Returns tokens by number (see `ActivationStore.rows`), in this order.

        Raises:
            InvalidInputError: If a row is not finite, naming its sample, or there is no such token.
        """
        place = np.searchsorted(self.source.token_start, numbers, side="right") - 1
        rows = {hook_point: self.source.rows(hook_point + TOKENS, numbers) for hook_point in self.hook_points}
        sample_index = self.source.sample_index[place]
        for hook_point, values in rows.items():
            refuse_not_finite_rows(hook_point, values, sample_index)
        position = torch.from_numpy(numbers - self.source.token_start[place])
        return TokenRows(rows, torch.from_numpy(sample_index), position, self.source.token_ids(numbers))

    def statistics(self, hook_point: str, n_tokens: int | None = None) -> RowStatistics:
        """Returns statistics of the rows that are trained on.

        Args:
            hook_point: One of `hook_points`.
            n_tokens: Of so many tokens from all over the store, that the seed chooses; None takes all, which reads all rows once.

        Raises:
            InvalidInputError: If the hook point is not one of these, or n_tokens is less than 1.
        """
        if hook_point not in self.hook_points or (n_tokens is not None and n_tokens < 1):
            raise InvalidInputError(
                f"statistics are of at least one token of {', '.join(self.hook_points)}; asked for {hook_point}, {n_tokens} tokens"
            )
        order, left = self._orders["train"], self._orders["train"].n_tokens if n_tokens is None else n_tokens
        moments = None
        for window in range(order.n_windows):
            numbers = np.sort(order.window(0, window)[:left])
            for first in range(0, len(numbers), ROWS_AT_ONCE):
                rows = self.source.rows(hook_point + TOKENS, numbers[first : first + ROWS_AT_ONCE])
                of_rows = Moments.of(rows.double().numpy())
                moments = of_rows if moments is None else moments.merge(of_rows)
            left -= len(numbers)
            if left <= 0:
                break
        assert moments is not None
        return RowStatistics.of(moments)

    def train_dataloader(self) -> "TokenSteps":
        """This rank's share of each step, in the order of the Trainer's epoch."""
        return TokenSteps(self, "train")

    def val_dataloader(self) -> "TokenSteps | list[Any]":
        """This rank's share of the samples that are not trained on, in the order of the files; nothing without `validation`."""
        return TokenSteps(self, "validation") if self.validation else []

    def _identity(self) -> dict[str, Any]:
        """What the steps depend on."""
        own = {
            name: getattr(self, name)
            for name in ("batch_size", "seed", "content_only", "validation", "group", "buffer_tokens", "block_tokens")
        }
        return {"store": self.source.info.fingerprint, "n_tokens": self.n_tokens["train"], **own}

    def state_dict(self) -> dict[str, Any]:
        """Returns which step is the next one, and what the steps depend on: the same on all ranks, for any number of them.

        Without a Trainer a step is done when it was given; in one, when it was trained on.
        """
        step = self._step
        if self.trainer is not None and self.trainer.training:
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            step -= progress.ready - progress.processed  # one that is being trained on while an error saves a checkpoint
        return {"epoch": self._epoch, "step": step, "identity": self._identity()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes to where a state was taken.

        Raises:
            InvalidInputError: If it was taken of another stream, naming what differs.
        """
        mine, other = self._identity(), state_dict.get("identity", {})
        differ = [name for name in mine if name not in other or other[name] != mine[name]]
        if differ:
            raise InvalidInputError(
                f"the state is of another stream: its {differ[0]} is {other.get(differ[0])!r}, here it is {mine[differ[0]]!r} "
                f"({', '.join(differ)}). Make the stream as it was, or begin anew"
            )
        self._epoch, self._step = state_dict["epoch"], state_dict["step"]


class TokenSteps:
    """The steps of a part, as a Trainer asks for them: how many an epoch has, and those of the epoch it is in.

    After a restart they go on behind the last step that the Trainer trained on. Lightning finds `state_dict` here as well.
    """

    def __init__(self, stream: TokenStream, part: str) -> None:
        self._stream, self._part = stream, part

    def __len__(self) -> int:
        return self._stream._orders[self._part].n_steps

    def __iter__(self) -> Iterator[TokenRows]:
        trainer = self._stream.trainer
        if self._part != "train":
            yield from self._stream._read(self._part, 0)
        elif trainer is None:
            yield from self._stream._from(self._stream._epoch, self._stream._step)
            self._stream._epoch, self._stream._step = self._stream._epoch + 1, 0
        else:  # looked up when the first step is asked for, which is after the Trainer found its place
            yield from self._stream._from(trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def state_dict(self) -> dict[str, Any]:
        """Returns the stream's."""
        return self._stream.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads the stream's."""
        self._stream.load_state_dict(state_dict)
