"""The model and tokenizer that a result was made with, made again from its description: to add, compare or score samples."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import TextOptions
from exactivations.lit_modules.extraction.run_description import named
from exactivations.lit_modules.models.language_model import ModelOptions
from exactivations.store.means_file import MeansFile
from exactivations.store.pooling_names import TOKENS
from exactivations.store.vectors import poolings_needed


class Described(Protocol):
    """A result that says what it was made with: `about`, how model and tokenizer are called, and `identity`, what they are."""

    @property
    def about(self) -> dict[str, Any]: ...  # noqa: D102

    @property
    def identity(self) -> dict[str, Any]: ...  # noqa: D102


@dataclass(frozen=True)
class Samples:
    """Which samples of a dataset; see `TextDataModule`. Columns default to those that the result was made of."""

    dataset: str | list[str]
    config: str | None = None
    split: str | None = None
    text_column: str | None = None
    messages_column: str | None = None
    num_samples: int | None = None
    sample_seed: int | None = None
    on_empty: Literal["error", "skip"] = "error"


def model_of(result: Described, model: str | None = None) -> tuple[str, ModelOptions]:
    """Returns how the model of a result is called (or lies now, if that is given) and loaded.

    Raises:
        InvalidInputError: If it was an object without a name, and none is given.
    """
    about, identity = result.about, result.identity
    name = named(model or about["model"], "model", identity["model_class"])
    return name, ModelOptions(
        about["revision"], identity["dtype"], about["attn_implementation"], about["trust_remote_code"], about["random_weights"]
    )


def points_of(file: MeansFile) -> list[str]:
    """Returns the hook points that the vectors are taken at."""
    return list(dict.fromkeys(point for vector in file.options.vectors for point in vector.hook_points))


def poolings_of(file: MeansFile) -> list[str]:
    """Returns the poolings that the vectors, and means by position, are made of."""
    needed = poolings_needed([vector.pooling for vector in file.options.vectors])
    return [*needed, *([TOKENS] if file.options.n_positions else [])]


def data_for(
    result: Described, samples: Samples, tokenizer: str | None = None, keep_columns: list[str] | None = None
) -> TextDataModule:
    """Makes a data module that tokenizes samples as those of the result were; it keeps no columns but those named.

    Raises:
        InvalidInputError: If the tokenizer was an object without a name, and none is given.
    """
    about = result.about
    columns: dict[str, Any] = {
        "text_column": samples.text_column or about["text_column"],
        "messages_column": samples.messages_column or about["messages_column"],
        "on_empty": samples.on_empty,
    }
    if isinstance(samples.dataset, list):
        columns |= {"text_column": "text", "messages_column": None}
    return TextDataModule(
        samples.dataset,
        named(tokenizer or about["tokenizer"], "tokenizer", "tokenizer object"),
        tokenizer_revision=about["tokenizer_revision"],
        trust_remote_code=about["trust_remote_code"],
        config=samples.config,
        split=samples.split,
        keep_columns=keep_columns or [],
        num_samples=samples.num_samples,
        sample_seed=samples.sample_seed,
        text=TextOptions.of_identity(result.identity, **columns),
    )
