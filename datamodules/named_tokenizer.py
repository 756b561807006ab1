"""Loading a tokenizer by its name."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from exactivations.datamodules.embedded import resolve_model
from exactivations.store.errors import InvalidInputError


def load_tokenizer(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that a name stands for: a hub id, a local path, or that of an embedded model.

    Raises:
        InvalidInputError: If it cannot be loaded, or is an empty one.
    """
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            resolve_model(str(name)), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise InvalidInputError(f"tokenizer {str(name)!r} could not be loaded: {error}") from error
    if len(loaded) <= len(loaded.all_special_ids):
        raise InvalidInputError(
            f"tokenizer {str(name)!r} knows no tokens but special ones: where a model comes without a tokenizer, "
            "transformers makes up an empty one. Name the one that belongs to it (--tokenizer)"
        )
    return loaded
