"""Opening a run of completions with the tokenizer that it was made with."""

from pathlib import Path

from exactivations.datamodules.named_tokenizer import load_tokenizer
from exactivations.datamodules.tokenization import tokenizer_hash
from exactivations.store.completions import CompletionStore
from exactivations.store.errors import InvalidInputError
from exactivations.store.run_folder import RunFolder


def open_completions(
    path: str | Path, tokenizer: str | Path | None = None, *, allow_incomplete: bool = False, trust_remote_code: bool = False
) -> CompletionStore:
    """Opens a run of completions, with their texts.

    Args:
        path: The run folder.
        tokenizer: Where the run's tokenizer lies now, if not where run.json says.
        allow_incomplete: See `CompletionStore`.
        trust_remote_code: Whether code from the tokenizer's repository may run here.

    Raises:
        InvalidInputError: If the tokenizer cannot be loaded, or is not the one that the prompts were made with.
        StoreError: See `CompletionStore`.
    """
    info = RunFolder(path).read_info()
    name = tokenizer or info.about["tokenizer"]
    if name is None:
        raise InvalidInputError(f"the tokenizer of {path} was an object in Python, that has no name: save it and name its folder")
    loaded = load_tokenizer(name, revision=info.about["tokenizer_revision"], trust_remote_code=trust_remote_code)
    if tokenizer_hash(loaded) != info.identity["tokenizer"]:
        raise InvalidInputError(
            f"tokenizer {str(name)!r} is not the one that the prompts of {path} were made with (its hash differs): name that one"
        )
    return CompletionStore(path, loaded, allow_incomplete=allow_incomplete)
