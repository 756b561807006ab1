"""From texts to tokens, once: parallel, cached on disk by `datasets`, read back from a memory map.

Every sample leaves here with what identifies it from then on: its index in the dataset as given, and a hash of its token ids.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from exactivations.datamodules import chat_template
from exactivations.datamodules.chat_template import RENDERED_TODAY, how_to_pin, plain_arguments, template_for, without_today
from exactivations.store.errors import InvalidInputError
from exactivations.store.token_hash import hash_of_ids

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "token_mask": datasets.List(datasets.Value("uint8")),
        "token_hash": datasets.Value("string"),
        "truncated": datasets.Value("bool"),
        "problem": datasets.Value("string"),
    }
)
PLACEHOLDER = "{text}"
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
EMPTY = "is empty"
DATED = "would be rendered with today's date"
TOO_LONG = re.compile(r"is a conversation of (\d+) tokens, max_length is \d+")
NAMES = ("text_column", "messages_column", "on_empty")  # of TextOptions: what decides no token of a sample that is kept
LATER = ("chat_template_kwargs", "skip_first")  # came when there were runs already; at its default none is in the identity
CHOICES = {"token_mask": ("content", "assistant", "all"), "truncation_side": ("left", "right"), "on_empty": ("error", "skip")}


@dataclass(frozen=True)
class TextOptions:
    """How a row of the dataset becomes tokens.

    Attributes:
        text_column: The column with the texts.
        template: Text around each text, with "{text}" where it goes; nothing else in it is special.
        messages_column: A column with lists of {"role": …, "content": …}, to which the tokenizer's chat template is applied.
            Takes the place of text_column.
        add_generation_prompt: Whether the chat template opens the assistant's next turn.
        chat_template_kwargs: Further variables that the chat template reads, such as {"enable_thinking": False} or "tools" (as JSON
            schemas). A template that would render today's date is refused, unless the variable that it reads it from is given.
        add_special_tokens: Whether the tokenizer adds its own special tokens (BOS, [CLS], …). A chat template always does.
        token_mask: Which tokens poolings count. "content": all but special tokens; "assistant": those that the chat template
            marks as the assistant's (it needs {% generation %} blocks for that); "all": every token.
        skip_first: So many tokens at the beginning of each sample, special ones included, are not content: where the tokenizer adds
            no BOS, the first one takes its place as an attention sink. A sample that has no others counts as empty.
        max_length: Longer texts are cut to so many tokens, special tokens included; None cuts nothing. Longer conversations are
            refused: with an end, what the chat template says there would be cut off.
        truncation_side: Which end of a text is cut off. The special tokens that the tokenizer adds stay, at both.
        on_empty: What to do about a text that is None, empty, or has no token that counts: "error", or "skip" and record it.
    """

    text_column: str = "text"
    template: str | None = None
    messages_column: str | None = None
    add_generation_prompt: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    add_special_tokens: bool = True
    token_mask: Literal["content", "assistant", "all"] = "content"
    skip_first: int = 0
    max_length: int | None = None
    truncation_side: Literal["left", "right"] = "right"
    on_empty: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if self.template is not None and self.template.count(PLACEHOLDER) != 1:
            raise InvalidInputError(f"the template must hold {PLACEHOLDER} exactly once, got {self.template!r}")
        if self.template is not None and self.messages_column is not None:
            raise InvalidInputError("a template applies to texts, a chat template to messages: give one of the two")
        if self.token_mask == "assistant" and self.messages_column is None:
            raise InvalidInputError("token_mask='assistant' needs a messages_column: plain texts have no assistant")
        if self.max_length is not None and self.max_length < 1:
            raise InvalidInputError(f"max_length must be at least 1, got {self.max_length}")
        if self.skip_first < 0 or (self.skip_first and self.token_mask != "content"):
            raise InvalidInputError(
                f"skip_first must be at least 0, and with token_mask={self.token_mask!r} 0, got {self.skip_first}: it says which "
                "tokens are content"
            )
        object.__setattr__(self, "chat_template_kwargs", plain_arguments(self.chat_template_kwargs))
        if self.chat_template_kwargs is not None and self.messages_column is None:
            raise InvalidInputError("chat_template_kwargs needs a messages_column: plain texts have no chat template")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InvalidInputError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    @property
    def column(self) -> str:
        """The column that is tokenized."""
        return self.messages_column or self.text_column

    def identity(self) -> dict[str, Any]:
        """Returns what decides the tokens and their mask, by field name."""
        default = {f.name: f.default for f in fields(self)}
        options = {name: value for name, value in asdict(self).items() if name not in NAMES}
        return {name: value for name, value in options.items() if name not in LATER or value != default[name]}

    @classmethod
    def of_identity(cls, identity: Mapping[str, Any], **names: Any) -> "TextOptions":
        """Makes options again from an identity that holds theirs, and the columns and on_empty, which it does not."""
        recorded = {f.name: identity[f.name] for f in fields(cls) if f.name not in (*NAMES, *LATER)}
        return cls(**recorded, **{name: identity[name] for name in LATER if name in identity}, **names)


def text_at_cut_end(options: TextOptions) -> str:
    """Returns what the template says at the end at which long texts are cut, and which is cut off with it."""
    before, _, after = (options.template or PLACEHOLDER).partition(PLACEHOLDER)
    return after if options.truncation_side == "right" else before


@dataclass(frozen=True)
class TokenTable:
    """The tokens of all samples that are not skipped, mapped from disk. Samples are called by their position in here.

    Attributes:
        rows: Arrow table with input_ids, token_mask, token_hash and truncated. A skipped sample has a row without tokens.
        kept: int64 [n], which rows of the table the samples are.
        sample_index: int64 [n], positions in the dataset as given, ascending.
        skipped: Indices of samples that were left out because they are empty.
    """

    rows: pa.Table
    kept: npt.NDArray[np.int64]
    sample_index: npt.NDArray[np.int64]
    skipped: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sample_index)

    @cached_property
    def n_tokens(self) -> npt.NDArray[np.int64]:
        """int64 [n], tokens of each sample."""
        return np.concatenate([np.diff(start) for _, start in self._ids]).astype(np.int64)[self.kept]

    @cached_property
    def n_counted(self) -> npt.NDArray[np.int64]:
        """int64 [n], tokens of each sample that poolings count."""
        until = [(np.concatenate([[0], np.cumsum(flat, dtype=np.int64)]), start) for flat, start in self._masks]
        return np.concatenate([np.diff(counted[start]) for counted, start in until])[self.kept]

    @cached_property
    def token_hash(self) -> pa.ChunkedArray:
        """Strings [n], the hash of each sample's token ids (xxh3-128 of them as little-endian int32)."""
        hashes = self.rows.column("token_hash")
        return hashes if len(hashes) == len(self) else hashes.take(pa.array(self.kept))

    @cached_property
    def truncated(self) -> npt.NDArray[np.bool_]:
        """Bool [n], whether the sample was cut to max_length."""
        truncated: npt.NDArray[np.bool_] = self.rows.column("truncated").to_numpy()[self.kept]
        return truncated

    @cached_property
    def content_hash(self) -> str:
        """One hash for all samples, their indices and their masks, however the table is cut into chunks."""
        digest = xxhash.xxh3_128(self.sample_index.astype("<i8").tobytes())
        for value in self.token_hash:
            digest.update(value.as_buffer())
        for flat, _ in self._masks:
            digest.update(flat.tobytes())
        return digest.hexdigest()

    @cached_property
    def largest_id(self) -> int:
        """The largest token id of all."""
        return max(int(flat.max()) for flat, _ in self._ids if len(flat))

    def gather(self, positions: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Returns ids int64 and mask bool, both [T], of these samples' tokens, one sample after the other."""
        table_rows = self.kept[positions]
        chunks = np.searchsorted(self._chunk_start, table_rows, side="right") - 1
        places = table_rows - self._chunk_start[chunks]
        ids, mask = [], []
        for chunk, place in zip(chunks.tolist(), places.tolist(), strict=True):
            flat, start = self._ids[chunk]
            ids.append(flat[start[place] : start[place + 1]])
            flat, start = self._masks[chunk]
            mask.append(flat[start[place] : start[place + 1]])
        return torch.from_numpy(np.concatenate(ids).astype(np.int64)), torch.from_numpy(np.concatenate(mask).astype(np.bool_))

    @cached_property
    def _chunk_start(self) -> npt.NDArray[np.int64]:
        sizes = [len(chunk) for chunk in self.rows.column("input_ids").chunks]
        return np.concatenate([[0], np.cumsum(sizes)])

    @cached_property
    def _ids(self) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        return self._chunks("input_ids")

    @cached_property
    def _masks(self) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        return self._chunks("token_mask")

    def _chunks(self, column: str) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """Per Arrow chunk: all its values flat, as a view of the map, and where each row starts in them."""
        chunks = []
        for chunk in self.rows.column(column).chunks:
            start = chunk.offsets.to_numpy()
            chunks.append((chunk.values.to_numpy()[start[0] : start[-1]], start - start[0]))  # a slice shares the values of all
        return chunks


def tokenize(
    dataset: datasets.Dataset,
    sample_index: npt.NDArray[np.int64],
    tokenizer: PreTrainedTokenizerBase,
    options: TextOptions,
    processes: int | None = None,
) -> TokenTable:
    """Tokenizes the dataset's rows, whose indices in the dataset as given are `sample_index`, or finds them in the cache.

    Fast tokenizers use all cores by themselves; `processes` is for slow ones.

    Raises:
        InvalidInputError: If the column is missing, a text is empty or not text (with its index), or a message list does not
            fit the chat template.
    """
    if options.column not in dataset.column_names:
        raise InvalidInputError(f"the dataset has no column {options.column!r}; it has {', '.join(dataset.column_names)}")
    _check_fit(tokenizer, options)
    versions = [transformers_version, Path(__file__).read_text(), Path(chat_template.__file__).read_text()]
    key = json.dumps([dataset._fingerprint, tokenizer_hash(tokenizer), asdict(options), versions], sort_keys=True)
    fingerprint = xxhash.xxh3_64(key.encode()).hexdigest()
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "exactivations"
    cache.mkdir(parents=True, exist_ok=True)
    rows = dataset.map(
        _tokenize_rows,
        batched=True,
        input_columns=[options.column],
        remove_columns=dataset.column_names,
        fn_kwargs={"tokenizer": tokenizer, "options": options},
        features=FEATURES,
        new_fingerprint=fingerprint,  # ours: a tokenizer's pickled state, which `datasets` would hash, changes with use
        cache_file_name=str(cache / f"{fingerprint}.arrow"),
        num_proc=processes,
        desc="tokenizing",
    )
    return _without_empty(rows.data.table, sample_index, tokenizer, options)


@dataclass(frozen=True)
class EncodedSample:
    """One sample's tokens, made from its text alone: input_ids int64 [L], token_mask bool [L], token_hash, truncated."""

    input_ids: Tensor
    token_mask: Tensor
    token_hash: str
    truncated: bool


def encode_alone(value: Any, tokenizer: PreTrainedTokenizerBase, options: TextOptions) -> EncodedSample:
    """Tokenizes one text (or conversation) by itself, without the cache.

    Raises:
        InvalidInputError: If it has no tokens that count, or cannot be tokenized; without its index, which is not known here.
    """
    _check_fit(tokenizer, options)
    row = {name: values[0] for name, values in _tokenize_rows([value], tokenizer, options).items()}
    if row["problem"] is not None:
        raise InvalidInputError(row["problem"] + _hint([row["problem"]], tokenizer, options))
    return EncodedSample(
        torch.tensor(row["input_ids"], dtype=torch.int64), torch.tensor(row["token_mask"], dtype=torch.bool),
        row["token_hash"], row["truncated"],
    )  # fmt: skip


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of everything that decides how this tokenizer turns text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.init_kwargs], sort_keys=True, default=str)
    else:  # truncation and padding are state of the last call, not of the tokenizer
        rules = json.dumps(
            {name: part for name, part in json.loads(backend.to_str()).items() if name not in ("truncation", "padding")}
        )
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    splits_special = getattr(tokenizer, "split_special_tokens", False)
    return xxhash.xxh3_128(
        json.dumps([rules, special, splits_special, tokenizer.chat_template], sort_keys=True).encode()
    ).hexdigest()


def _check_fit(tokenizer: PreTrainedTokenizerBase, options: TextOptions) -> None:
    """Refuses options that this tokenizer cannot do."""
    name = tokenizer.name_or_path
    if options.messages_column is None:
        added = tokenizer.num_special_tokens_to_add() if options.add_special_tokens else 0
        if options.max_length is not None and options.max_length <= added:
            raise InvalidInputError(
                f"max_length {options.max_length} leaves no room for text: the tokenizer adds {added} special tokens to each sample"
            )
        return
    template = template_for(tokenizer, options.chat_template_kwargs)
    if options.token_mask == "assistant" and not GENERATION_BLOCK.search(template):
        raise InvalidInputError(
            f"the chat template of {name} does not mark the assistant's tokens (it has no {{% generation %}} block): "
            "token_mask='assistant' cannot be told from it; take another template, or token_mask='content'"
        )


def _without_empty(
    rows: pa.Table, sample_index: npt.NDArray[np.int64], tokenizer: PreTrainedTokenizerBase, options: TextOptions
) -> TokenTable:
    problems = rows.column("problem")
    bad = problems.is_valid().to_numpy()
    if not bad.any():
        return TokenTable(rows, np.arange(len(rows)), sample_index)
    found = list(zip(sample_index[bad].tolist(), problems.drop_null().to_pylist(), strict=True))
    wrong = [(i, problem) for i, problem in found if options.on_empty == "error" or not problem.startswith(EMPTY)]
    if wrong:
        shown = "; ".join(f"sample {i} {problem}" for i, problem in wrong[:5])
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        hint = _hint([problem for _, problem in wrong], tokenizer, options) or ". Mend the dataset"
        if all(problem.startswith(EMPTY) for _, problem in wrong):
            hint += ", or pass --on-empty skip to leave empty texts out and record them"
        raise InvalidInputError(f"column {options.column!r}: {shown}{more}{hint}")
    if bad.all():
        raise InvalidInputError(f"column {options.column!r}: all {len(bad)} texts are empty")
    return TokenTable(rows, np.flatnonzero(~bad), sample_index[~bad], skipped=sample_index[bad].tolist())


def _hint(problems: list[str], tokenizer: PreTrainedTokenizerBase, options: TextOptions) -> str:
    """Says what to do about conversations that are too long, or dated; nothing of other problems."""
    hint = ""
    if lengths := [int(found[1]) for found in map(TOO_LONG.match, problems) if found is not None]:
        hint += (
            ". A conversation is not cut: what its template says at that end (prompt for an answer, system prompt) would go "
            f"with it. Pass --max-length {max(lengths)} or more, or leave long conversations out of the dataset"
        )
    if DATED in problems:
        hint += f". Today's date: {how_to_pin(tokenizer, options.chat_template_kwargs)}"
    return hint


def _tokenize_rows(values: list[Any], tokenizer: PreTrainedTokenizerBase, options: TextOptions) -> dict[str, list[Any]]:
    """Tokenizes one chunk of rows. A row with a problem gets no tokens, so that the caller can name its index."""
    problems = [_problem(value, options) for value in values]
    good = [value for value, problem in zip(values, problems, strict=True) if problem is None]
    encode = _encode_messages if options.messages_column else _encode_texts
    encoded = iter(encode(good, tokenizer, options))
    out: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for problem in problems:
        ids: list[int] = []
        mask: list[bool] = []
        truncated = False
        if problem is None:
            sample = next(encoded)
            if isinstance(sample, str):
                problem = sample
            elif any(sample[1][options.skip_first :]):
                ids, mask, truncated = sample
                mask = [False] * options.skip_first + mask[options.skip_first :]
            else:
                skipping = f" and skip_first={options.skip_first}" if options.skip_first else ""
                problem = f"{EMPTY}: none of its {len(sample[0])} tokens counts with token_mask={options.token_mask!r}{skipping}"
        out["input_ids"].append(ids)
        out["token_mask"].append(mask)
        out["token_hash"].append(hash_of_ids(ids))
        out["truncated"].append(truncated)
        out["problem"].append(problem)
    return out


def _problem(value: Any, options: TextOptions) -> str | None:
    wanted = list if options.messages_column else str
    if value is None:
        return f"{EMPTY}: it is None"
    if not isinstance(value, wanted):
        return f"is of type {type(value).__name__}, expected {'a list of messages' if options.messages_column else 'text'}"
    return None if value else EMPTY


Encoded = list[tuple[list[int], list[bool], bool] | str]  # ids, mask, truncated; or the problem with this sample


def _encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase, options: TextOptions) -> Encoded:
    if not texts:
        return []
    if options.template is not None:
        texts = [options.template.replace(PLACEHOLDER, text) for text in texts]
    arguments: dict[str, Any] = {
        "add_special_tokens": options.add_special_tokens,
        "return_attention_mask": False,
        "verbose": False,
    }
    all_ids = tokenizer(texts, **arguments)["input_ids"]
    too_long = [i for i, ids in enumerate(all_ids) if options.max_length is not None and len(ids) > options.max_length]
    if too_long:  # the tokenizer cuts, since only it knows which special tokens have to stay
        side_before = tokenizer.truncation_side
        tokenizer.truncation_side = options.truncation_side
        try:
            cut = tokenizer([texts[i] for i in too_long], truncation=True, max_length=options.max_length, **arguments)["input_ids"]
        finally:
            tokenizer.truncation_side = side_before
        for i, ids in zip(too_long, cut, strict=True):
            all_ids[i] = ids
    special = _special_ids(tokenizer)
    cut_rows = set(too_long)
    return [
        (ids, [options.token_mask == "all" or token not in special for token in ids], i in cut_rows)
        for i, ids in enumerate(all_ids)
    ]


def _encode_messages(conversations: list[Any], tokenizer: PreTrainedTokenizerBase, options: TextOptions) -> Encoded:
    special, template = _special_ids(tokenizer), without_today(template_for(tokenizer, options.chat_template_kwargs))
    out: Encoded = []
    for messages in conversations:
        try:
            encoded: Any = tokenizer.apply_chat_template(
                messages, add_generation_prompt=options.add_generation_prompt, tokenize=True, return_dict=True,
                return_assistant_tokens_mask=options.token_mask == "assistant", chat_template=template,
                **(options.chat_template_kwargs or {}),
            )  # fmt: skip
        except Exception as error:  # a template is a program: what it raises about a conversation can be anything
            is_dated = str(error) == RENDERED_TODAY
            out.append(DATED if is_dated else f"does not fit the chat template: {type(error).__name__}: {error}")
            continue
        ids = list(encoded["input_ids"])
        if options.max_length is not None and len(ids) > options.max_length:
            out.append(f"is a conversation of {len(ids)} tokens, max_length is {options.max_length}")
            continue
        if options.token_mask == "assistant":
            mask = [bool(marked) for marked in encoded["assistant_masks"]]
        else:
            mask = [options.token_mask == "all" or token not in special for token in ids]
        out.append((ids, mask, False))
    return out


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of special tokens.

    [UNK] stands for content that the vocabulary lacks, so it is none of them, unless it serves as BOS, EOS, [CLS] or [SEP] too.
    That some tokenizers pad with it does not matter, since nothing is padded here.
    """
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    return frozenset(special - ({tokenizer.unk_token_id} - others))
