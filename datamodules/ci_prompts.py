"""Prompts with sets of causal importances, from their files, in batches of one length."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from exactivations.store.ci_sets import CiSets, read_ci_sets
from exactivations.store.errors import InvalidInputError


@dataclass(frozen=True)
class CiPrompt:
    """A prompt and its sets.

    Attributes:
        token_ids: int64 [L].
        sets: Of L positions.
        own: Name of the set that is the model's own, of which others are subsets or variations; None if there is none.
        file: The file of the sets.

    Raises:
        InvalidInputError: If the sets have another number of positions, or none of them is called as said.
    """

    token_ids: Int64[Tensor, " l"]
    sets: CiSets
    own: str | None = None
    file: str = ""

    def __post_init__(self) -> None:
        if self.sets.n_positions != len(self.token_ids):
            raise InvalidInputError(
                f"set {self.sets.names[0]!r}, layer {next(iter(self.sets.values))!r}: {self.sets.n_positions} positions, but the "
                f"prompt {self.sets.prompt!r} has {len(self.token_ids)} tokens: the sets belong to another prompt, or to another "
                "tokenizer (or one that adds special tokens)"
            )
        if self.own is not None:
            self.sets.index(self.own)


class CiPromptDataModule(pl.LightningDataModule):
    """Files of sets, read, tokenized and held against each other; a batch is a list of `CiPrompt` of one length.

    Args:
        files: As `read_ci_sets` reads them.
        tokenizer: The model's.
        add_special_tokens: Whether it adds its own special tokens (BOS, …).
        own: Name of the set that is the model's own, in all files.
        max_rows: The most sets in a batch of several prompts.

    Attributes:
        prompts: In the order of the files.

    Raises:
        InvalidInputError: If a file cannot be used, or its prompt has another number of tokens than its sets have positions.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        tokenizer: PreTrainedTokenizerBase,
        *,
        add_special_tokens: bool = True,
        own: str | None = None,
        max_rows: int = 64,
    ) -> None:
        super().__init__()
        if not files or max_rows < 1:
            raise InvalidInputError(
                f"expected files of causal importances and max_rows of at least 1, got {list(files)}, {max_rows}"
            )
        self.prompts = []
        for file in files:
            sets = read_ci_sets(file)
            ids = tokenizer(sets.prompt, add_special_tokens=add_special_tokens)["input_ids"]
            try:
                self.prompts.append(CiPrompt(torch.tensor(ids, dtype=torch.int64), sets, own, str(file)))
            except InvalidInputError as error:
                raise InvalidInputError(f"{file}: {error}") from error
        self._max_rows = max_rows

    def batches(self) -> list[list[CiPrompt]]:
        """Returns all prompts, those of one length together, up to max_rows sets."""
        batches: list[list[CiPrompt]] = []
        n_rows = 0
        for prompt in sorted(self.prompts, key=lambda prompt: len(prompt.token_ids)):
            n_sets = len(prompt.sets.names)
            same_length = batches and len(batches[-1][0].token_ids) == len(prompt.token_ids)
            if not same_length or n_rows + n_sets > self._max_rows:
                batches.append([])
                n_rows = 0
            batches[-1].append(prompt)
            n_rows += n_sets
        return batches

    def transfer_batch_to_device(self, batch: list[CiPrompt], device: torch.device, dataloader_idx: int) -> list[CiPrompt]:
        """Leaves prompts on the host: `LocalAttributor` moves what it needs."""
        return batch

    def predict_dataloader(self) -> DataLoader[list[CiPrompt]]:
        """Returns the batches as a loader, whose items they are."""
        return DataLoader(self.batches(), batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
