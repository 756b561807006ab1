"""Reading the completions of a run: by sample, in dataset order, as texts, as JSONL."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exactivations.store.errors import CorruptShardError, IncompleteStoreError, InvalidInputError, StoreError
from exactivations.store.run_folder import RunFolder
from exactivations.store.shard import publishing, verify_shard

SCORE = "score/"  # before the name of what is known of each token


class Tokenizer(Protocol):
    """What makes texts of ids; a Hugging Face tokenizer does."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, *, clean_up_tokenization_spaces: bool | None = None) -> Any:
        """Returns the text of some ids."""


def decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of ids, special tokens too. Spaces are not cleaned up, which would change them in front of later tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class Completion:
    """One completion: only what was generated, never its prompt.

    Attributes:
        sample_index: The prompt's position in the dataset as given.
        alpha: after + alpha * (after - before) is what it was drawn from.
        rollout: Its number among those of this prompt at this alpha.
        seed: With it, it can be generated again alone.
        prompt_ids: int32 [n], the prompt.
        token_ids: int32 [n], the completion; if it ended by itself, its last token is what ended it.
        finished: "eos", or "length".
        scores: By name float32 [n], what is known of each token (see `TokenScores`); empty if that was not asked for.
        n_counted: The tokens before the first one that ends a text: what a completion says. Fewer than `token_ids` also where texts
            ran on to a fixed length.
        text: The text of these tokens; None without a tokenizer.
        prompt: The prompt's text; None without a tokenizer.
    """

    sample_index: int
    alpha: float
    rollout: int
    seed: int
    prompt_ids: Tensor
    token_ids: Tensor
    finished: str
    scores: dict[str, Tensor]
    n_counted: int
    text: str | None
    prompt: str | None

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON."""
        fields = ("sample_index", "alpha", "rollout", "seed", "finished", "prompt", "text")
        ids = {"prompt_ids": self.prompt_ids.tolist(), "token_ids": self.token_ids.tolist()}
        return {**{name: getattr(self, name) for name in fields}, **ids, **{name: s.tolist() for name, s in self.scores.items()}}


class CompletionStore:
    """The run folder of an `amplify`, opened for reading. Tensors are mapped from the files.

    Iterating gives all completions, by sample in dataset order, in it by alpha as asked for, in it by rollout; `store[i]` those of
    sample i.

    Args:
        path: The run folder.
        tokenizer: Makes texts of ids: the run's own. `open_completions` finds and checks it.
        allow_incomplete: Open a run of which shards are missing; completions of those are left out.
        verify_checksums: Read every shard once and compare it with its checksum before anything else.

    Raises:
        IncompleteStoreError: If shards are missing and that was not allowed.
        CorruptShardError: If a shard is truncated, renamed or (with verify_checksums) damaged; later, if one holds other samples
            than samples.parquet says.
        StoreError: If it is no run folder, or holds no completions.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer | None = None,
        *,
        allow_incomplete: bool = False,
        verify_checksums: bool = False,
    ) -> None:
        self.folder = RunFolder(path)
        self.info = self.folder.read_info()
        self.tokenizer = tokenizer
        if "alphas" not in self.info.identity:
            raise StoreError(f"{path} holds no completions: it is the folder of another command (see `exactivations show`)")
        published = self.folder.published(self.info)
        missing = self.info.n_shards - len(published)
        if missing and not allow_incomplete:
            raise IncompleteStoreError(
                f"{path} is not complete: {missing} of {self.info.n_shards} shards are missing. Start the same command again "
                "to finish it, or open it with allow_incomplete=True"
            )
        for shard in sorted(published) if verify_checksums else ():
            verify_shard(self.folder.shard_path(shard))
        places = self.folder.read_samples(["sample_index", "shard", "row"])
        self._published = published
        self._shard, self._row = places.column("shard").to_numpy(), places.column("row").to_numpy()
        self._index: npt.NDArray[np.int64] = places.column("sample_index").to_numpy()
        self._open: dict[int, _Shard] = {}

    @property
    def alphas(self) -> list[float]:
        """What was asked for, in that order."""
        return list(self.info.identity["alphas"])

    @property
    def rollouts(self) -> int:
        """Completions of each prompt at each alpha."""
        return int(self.info.identity["rollouts"])

    @property
    def n_planned(self) -> int:
        """Completions that were asked for, at each alpha."""
        return len(self._index) * self.rollouts

    @cached_property
    def sample_index(self) -> npt.NDArray[np.int64]:
        """int64 [n], the samples that are there, ascending."""
        return self._index[np.isin(self._shard, list(self._published))]

    def __len__(self) -> int:
        return len(self.sample_index) * len(self.alphas) * self.rollouts

    def __getitem__(self, sample_index: int) -> list[Completion]:
        """Returns a sample's completions.

        Raises:
            InvalidInputError: If the run has no such sample.
            IncompleteStoreError: If its shard is missing.
        """
        place = int(np.searchsorted(self._index, sample_index))
        if place == len(self._index) or self._index[place] != sample_index:
            raise InvalidInputError(f"{self.folder.path} has no sample {sample_index}: its {len(self._index)} samples are others")
        shard, row = int(self._shard[place]), int(self._row[place])
        if shard not in self._published:
            raise IncompleteStoreError(f"sample {sample_index} is in shard {shard} of {self.folder.path}, which is missing")
        return self._of(shard, row)

    def __iter__(self) -> Iterator[Completion]:
        for index in self.sample_index:
            yield from self[int(index)]

    def to_jsonl(self, path: str | Path) -> None:
        """Writes all completions, one a line; the file is there whole, or as it was.

        Raises:
            StoreError: If it cannot be written.
        """
        try:
            with publishing(Path(path)) as temporary, temporary.open("w") as file:
                for completion in self:
                    file.write(json.dumps(completion.to_json(), ensure_ascii=False) + "\n")
                file.flush()
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error}") from error

    def _of(self, shard: int, row: int) -> list[Completion]:
        if shard not in self._open:
            tensors = self.folder.open_shard(shard, self.info)
            opened = _Shard(tensors, self._index[self._shard == shard][np.argsort(self._row[self._shard == shard])].tolist())
            if len(tensors["alpha"]) != len(tensors["sample_index"]) * len(self.alphas) * self.rollouts:
                raise CorruptShardError(f"{self.folder.shard_path(shard)} does not hold {self.rollouts} rollouts of each alpha")
            self._open[shard] = opened
        opened = self._open[shard]
        each = len(self.alphas) * self.rollouts
        return [self._completion(opened, row, place) for place in range(row * each, (row + 1) * each)]

    def _completion(self, shard: "_Shard", row: int, place: int) -> Completion:
        tensors, tokens, prompt = shard.tensors, shard.tokens(place), shard.prompt(row)
        ids = tensors["token_ids"][tokens]
        ends = torch.isin(ids, torch.tensor(self.info.identity["eos_token_ids"], dtype=ids.dtype)).nonzero()[:, 0].tolist()
        n_counted = ends[0] if ends else len(ids)
        prompt_ids = tensors["prompt_ids"][prompt]
        return Completion(
            sample_index=int(tensors["sample_index"][row]),
            alpha=tensors["alpha"][place].item(),
            rollout=int(tensors["rollout"][place]),
            seed=int(tensors["seed"][place]),
            prompt_ids=prompt_ids,
            token_ids=ids,
            finished="eos" if tensors["ended"][place] else "length",
            scores={name.removeprefix(SCORE): tensors[name][tokens] for name in tensors if name.startswith(SCORE)},
            n_counted=n_counted,
            text=self._text(ids[:n_counted]),
            prompt=self._text(prompt_ids),
        )

    def _text(self, ids: Tensor) -> str | None:
        return None if self.tokenizer is None else decoded(self.tokenizer, ids.tolist())


class _Shard:
    """A shard's tensors, and where the tokens of each row begin."""

    def __init__(self, tensors: Mapping[str, Tensor], planned: Sequence[int]) -> None:
        if tensors["sample_index"].tolist() != list(planned):
            raise CorruptShardError(
                "a shard holds other samples than samples.parquet says: the folder was put together of two runs"
            )
        self.tensors = tensors
        self._ends = tensors["n_tokens"].long().cumsum(0).tolist()
        self._prompt_ends = tensors["n_prompt_tokens"].long().cumsum(0).tolist()

    def tokens(self, place: int) -> slice:
        return slice(self._ends[place - 1] if place else 0, self._ends[place])

    def prompt(self, row: int) -> slice:
        return slice(self._prompt_ends[row - 1] if row else 0, self._prompt_ends[row])
