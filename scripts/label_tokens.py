"""`exactivations label-tokens`: one label per token of a store, from the texts themselves."""

from typing import Literal


def label_tokens(
    run: str,
    *,
    out: str,
    by: Literal["python-syntax"] = "python-syntax",
    dataset: str | None = None,
    config_name: str | None = None,
    split: str | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a label for each token of a store's samples, to train probes of tokens on.

    Texts and tokenizer are taken from run.json, and held against the store's token hashes: labels are of exactly its tokens.

    python-syntax: "string", "comment" or "code", by Python's own tokenizer. A token of blanks only and a special token has none. A
    text that is no Python is refused.

    Args:
        run: The run folder.
        out: The .parquet file to write.
        by: What labels say.
        dataset: The run's dataset, if it is called or lies otherwise now than run.json says.
        config_name: Its configuration on the hub, likewise.
        split: Its split, likewise.
        tokenizer: The run's tokenizer, likewise.
        overwrite: Replace the file if it is there.
    """
    from pathlib import Path

    from exactivations.datamodules.python_syntax import python_spans
    from exactivations.datamodules.span_labels import label_samples, write_token_labels
    from exactivations.lit_modules.extraction.run_description import Elsewhere, data_of
    from exactivations.store.activation_store import ActivationStore
    from exactivations.store.errors import InvalidInputError

    if Path(out).suffix != ".parquet":
        raise InvalidInputError(f"{out}: labels of tokens are written as .parquet; name a file that ends so")
    if Path(out).exists() and not overwrite:
        raise InvalidInputError(f"{out} is there already: name another file, or pass --overwrite")
    column, spans_of = {"python-syntax": ("syntax", python_spans)}[by]
    store = ActivationStore(run)
    data = data_of(store.info, Elsewhere(None, tokenizer, dataset, config_name, split))
    counts = write_token_labels(out, column, label_samples(store, data, spans_of))
    print(f"{sum(counts.values()):,} tokens of {len(store):,} samples -> {out}")
    for label, count in sorted(counts.items(), key=lambda item: (item[0] is None, item[0])):
        print(f"  {'no label' if label is None else label:<10} {count:>12,}  {count / sum(counts.values()):6.1%}")
    print("read it with")
    print("    from exactivations.datamodules.labels import token_labels_of")
    print("    from exactivations.store import ActivationStore")
    print(f'    labels = token_labels_of(ActivationStore("{run}"), "{column}", "{out}")')
