"""What a text alone says, as rows that a probe can be trained on: what a probe on activations has to beat."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from exactivations.datamodules.label_files import column_of
from exactivations.datamodules.text import TextDataModule
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError
from exactivations.store.token_hash import hash_of_ids

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

NO_TOKEN = -1  # what comes before the first token of a sample


@dataclass(frozen=True)
class TextTokens:
    """The tokens of all samples of a store, counted through in the order of store.sample_index.

    Attributes:
        ids: int64 [T].
        is_content: Bool [T], the token mask: which tokens poolings count.
        start: int64 [n+1]: sample i has ids[start[i]:start[i + 1]]; it is store.token_start.
    """

    ids: IntArray
    is_content: BoolArray
    start: IntArray

    @classmethod
    def of(cls, store: ActivationStore, data: TextDataModule | None = None) -> "TextTokens":
        """Reads them from the store's shards, or from `data` if the store keeps no rows of tokens; each is held against its hash.

        Raises:
            InvalidInputError: If there are no rows of tokens and no data, or a sample has other tokens than the store's token_hash
                says; the first is named.
        """
        if any(store.per_token.values()):
            every = np.arange(store.token_start[-1])
            ids, is_content = store.token_ids(every), store.are_content(every)
            source, tokens = store.title, cls(ids.numpy().astype(np.int64), is_content.numpy(), store.token_start)
        elif data is not None:
            source, tokens = "the dataset", _of_data(store, data)
        else:
            raise InvalidInputError(
                f"{store.title} keeps no rows of tokens, and so not which tokens its samples have: give the data module of its "
                "texts, or extract with the pooling 'tokens'"
            )
        tokens._check(source, store)
        return tokens

    def __len__(self) -> int:
        return len(self.start) - 1

    @cached_property
    def sample(self) -> IntArray:
        """int64 [T], the position of the sample that each token is of."""
        return np.repeat(np.arange(len(self)), np.diff(self.start))

    @cached_property
    def previous(self) -> IntArray:
        """int64 [T], the id of the token before each; NO_TOKEN for the first one of a sample."""
        shifted = np.concatenate([[NO_TOKEN], self.ids[:-1]])[: len(self.ids)]
        shifted[self.start[:-1]] = NO_TOKEN
        return shifted

    def _check(self, source: str, store: ActivationStore) -> None:
        expected = column_of(store, "token_hash").to_pylist()
        spans = zip(self.start[:-1].tolist(), self.start[1:].tolist(), strict=True)
        wrong = [i for i, (start, stop) in enumerate(spans) if hash_of_ids(self.ids[start:stop]) != expected[i]]
        if wrong:
            raise InvalidInputError(
                f"{source}: sample {store.sample_index[wrong[0]]} has other tokens than {store.title} says (token hash "
                f"differs; {len(wrong):,} of {len(self):,} samples): it is another dataset or tokenizer, or it was cut otherwise"
            )


def bag_of_tokens(tokens: TextTokens, train: IntArray, max_features: int = 4096) -> tuple[npt.NDArray[np.float32], IntArray]:
    """Returns how often each sample has each of the most widespread content tokens, as log(1 + count), and the ids of the columns.

    Columns go to the tokens that most training samples have, of equally many to the smaller ids; they are in the order of ids. Rows
    are dense: 4 bytes x n x V'.

    Args:
        tokens: Of n samples.
        train: int64, places of the training samples in store.sample_index: no other sample has a say in which columns there are.
        max_features: The most columns.

    Returns:
        float32 [n, V'] and int64 [V'].

    Raises:
        InvalidInputError: If there are no training samples, or one of them is not there.
    """
    check_numbers("training samples", train, len(tokens))
    n_ids = int(tokens.ids.max()) + 1
    keys = (tokens.sample * n_ids + tokens.ids)[tokens.is_content]
    pairs, counts = np.unique(keys, return_counts=True)
    sample, token_id = np.divmod(pairs, n_ids)
    frequency = np.bincount(token_id[np.isin(sample, train)], minlength=n_ids)
    most = np.argsort(-frequency, kind="stable")[:max_features]
    columns = np.sort(most[frequency[most] > 0])
    column = np.full(n_ids, -1)
    column[columns] = np.arange(len(columns))
    kept = column[token_id] >= 0
    rows = np.zeros((len(tokens), len(columns)), dtype=np.float32)
    rows[sample[kept], column[token_id[kept]]] = np.log1p(counts[kept])
    return rows, columns


def length_rows(tokens: TextTokens) -> npt.NDArray[np.float32]:
    """Returns of how many content tokens each sample is: float32 [n, 2], the logarithm of the number and its square.

    A linear probe on both tells any two log-normal distributions of lengths apart as well as can be, since their likelihood ratio
    is linear in these two: also a class that is of middling length, which a probe on the number or its logarithm alone cannot find
    and activations could. It is what the model has read that counts, after truncation, and what poolings count of it.

    Raises:
        InvalidInputError: If a sample has no content token.
    """
    n = np.bincount(tokens.sample[tokens.is_content], minlength=len(tokens))
    if not n.all():
        raise InvalidInputError(f"the sample at position {int(n.argmin())} has no content token, so its length has no logarithm")
    logarithm = np.log(n)
    return np.stack([logarithm, logarithm**2], axis=1).astype(np.float32)


def _of_data(store: ActivationStore, data: TextDataModule) -> TextTokens:
    table = data.tokens
    absent = np.setdiff1d(store.sample_index, table.sample_index)
    if len(absent):
        raise InvalidInputError(
            f"the dataset has no sample {absent[0]}, or it is empty there ({len(absent):,} of {len(store):,} samples of "
            f"{store.title}): it is another dataset, or another part of it"
        )
    positions = np.searchsorted(table.sample_index, store.sample_index)
    ids, is_content = table.gather(positions)
    return TextTokens(ids.numpy(), is_content.numpy(), np.concatenate([[0], np.cumsum(table.n_tokens[positions])]))


def check_numbers(what: str, numbers: IntArray, n: int) -> None:
    """Raises InvalidInputError if there are no numbers, or one of them is not from 0 to n - 1."""
    if not len(numbers) or numbers.min() < 0 or numbers.max() >= n:
        found = f"{numbers.min()} to {numbers.max()}" if len(numbers) else "none"
        raise InvalidInputError(f"{what} must be given by numbers from 0 to {n - 1}, at least one, got {found}")
