"""From labels of character spans to one label per token, for exactly the tokens that a store has."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from exactivations.datamodules.label_files import column_of
from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import PLACEHOLDER, EncodedSample, TextOptions, encode_alone
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError, StoreError, shown
from exactivations.store.run_folder import SAMPLES_BLOCK
from exactivations.store.shard import publishing


class Span(NamedTuple):
    """Characters start to stop (not included) of a text, and their label."""

    start: int
    stop: int
    label: str


@dataclass(frozen=True)
class LabelledTokens:
    """The labels of a text's tokens, None where one has none, and the hash that says which tokens they are of."""

    labels: list[str | None]
    token_hash: str


def label_samples(
    store: ActivationStore, data: TextDataModule, spans_of: Callable[[str], list[Span]]
) -> Iterator[tuple[int, LabelledTokens]]:
    """Yields the index of each sample of a store, in the order of store.sample_index, and the labels of its tokens.

    Args:
        store: The store.
        data: The texts that it was made of, and how they became tokens.
        spans_of: Returns the spans of a text; an InvalidInputError from it gets the sample's index.

    Raises:
        InvalidInputError: Naming the sample: if it is not in the dataset, its tokens are not the store's, or its spans cannot be
            told or overlap; if samples are conversations, or the tokenizer cannot say which characters a token is of.
    """
    if data.text.messages_column is not None:
        raise InvalidInputError(
            f"{store.title} is of conversations (column {data.text.messages_column!r}): a chat template does not say which "
            "characters a token is of, so that spans can be given of plain texts only"
        )
    texts = data.full_dataset.select_columns([data.text.column])
    hashes = column_of(store, "token_hash").to_pylist()
    for index, token_hash in zip(store.sample_index.tolist(), hashes, strict=True):
        if index >= len(texts):
            raise InvalidInputError(f"sample {index}: the dataset has samples 0 to {len(texts) - 1}: it is another one")
        try:
            text = texts[index][data.text.column]
            labelled = label_tokens_of(text, spans_of, data.tokenizer, data.text)
        except InvalidInputError as error:
            raise InvalidInputError(f"sample {index} {error}") from error
        if labelled.token_hash != token_hash:
            raise InvalidInputError(
                f"sample {index} has token hash {labelled.token_hash} in the dataset, {token_hash} in {store.title}: it is "
                "another dataset, or in another order, or otherwise tokenized"
            )
        yield index, labelled


def label_tokens_of(
    text: Any, spans_of: Callable[[str], list[Span]], tokenizer: PreTrainedTokenizerBase, options: TextOptions
) -> LabelledTokens:
    """Returns the labels of one text's tokens: those that extraction with these options makes, cut as it cuts them.

    A token that several labels touch has the one that most of its characters have, blanks not counted; of equally many the one that
    comes first. A token has none if it does not count (it is special), if it is of blanks or of the template around the text only,
    or if no span touches it.

    Raises:
        InvalidInputError: If the text has no tokens that count, spans overlap or leave it, or the tokenizer does not tell offsets;
            without its index, which is not known here.
    """
    encoded = encode_alone(text, tokenizer, options)
    whole, offsets = characters_of_tokens(text, encoded, tokenizer, options)
    shift = (options.template or PLACEHOLDER).index(PLACEHOLDER)
    label_at: list[str | None] = [None] * len(whole)
    for span in _checked(spans_of(text), len(text)):
        label_at[shift + span.start : shift + span.stop] = [span.label] * (span.stop - span.start)
    labels = [
        _commonest(label_at[start:stop], whole[start:stop]) if counts else None
        for (start, stop), counts in zip(offsets, encoded.token_mask.tolist(), strict=True)
    ]
    return LabelledTokens(labels, encoded.token_hash)


def characters_of_tokens(
    text: str, encoded: EncodedSample, tokenizer: PreTrainedTokenizerBase, options: TextOptions
) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text with the template around it, and from which to which of its characters each token is.

    Raises:
        InvalidInputError: If the tokenizer does not tell offsets, or those of other tokens than were encoded; without the text's
            index, which is not known here.
    """
    whole = (options.template or PLACEHOLDER).replace(PLACEHOLDER, text)
    if not tokenizer.is_fast:
        raise InvalidInputError(
            f"cannot be laid over its tokens: {type(tokenizer).__name__} does not tell which characters a token is of, only fast "
            "tokenizers do"
        )
    side_before = tokenizer.truncation_side
    tokenizer.truncation_side = options.truncation_side
    try:
        found = tokenizer(
            whole, return_offsets_mapping=True, add_special_tokens=options.add_special_tokens, verbose=False,
            truncation=options.max_length is not None, max_length=options.max_length,
        )  # fmt: skip
    finally:
        tokenizer.truncation_side = side_before
    if found["input_ids"] != encoded.input_ids.tolist():
        raise InvalidInputError(
            f"has other tokens where the tokenizer {tokenizer.name_or_path!r} tells their offsets: it cannot be laid over them"
        )
    return whole, found["offset_mapping"]


def write_token_labels(path: str | Path, column: str, labelled: Iterable[tuple[int, LabelledTokens]]) -> Counter[str | None]:
    """Writes labels as Parquet, beside the final name and then under it, in the form that `token_labels_of` reads.

    Returns:
        How many tokens have each label, and how many None.

    Raises:
        StoreError: If the file cannot be written.
    """
    counts: Counter[str | None] = Counter()
    samples, path = iter(labelled), Path(path)
    types = {"sample_index": pa.int64(), "token_hash": pa.string(), column: pa.list_(pa.string())}
    try:
        with (
            publishing(path) as temporary,
            pq.ParquetWriter(temporary, pa.schema(types), compression="zstd", write_page_checksum=True) as writer,
        ):
            while block := list(islice(samples, SAMPLES_BLOCK)):
                rows = [(index, tokens.token_hash, tokens.labels) for index, tokens in block]
                writer.write(pa.table(dict(zip(types, zip(*rows, strict=True), strict=True)), schema=writer.schema))
                counts.update(label for _, tokens in block for label in tokens.labels)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"cannot write {path}: {error}") from error
    return counts


def _checked(spans: list[Span], length: int) -> list[Span]:
    """Returns spans in order; none leaves the text, no two overlap."""
    spans = sorted(spans)
    end = 0
    for span in spans:
        if not end <= span.start <= span.stop <= length:
            raise InvalidInputError(
                f"has a span {shown(tuple(span))}, expected one from {end} on (the end of the span before it) up to {length} "
                "at most (the end of the text): spans may not overlap or leave the text"
            )
        end = span.stop
    return spans


def _commonest(labels: list[str | None], characters: str) -> str | None:
    found = Counter(
        label for label, character in zip(labels, characters, strict=True) if label is not None and not character.isspace()
    )
    return found.most_common(1)[0][0] if found else None  # of equally many it gives the one that came first
