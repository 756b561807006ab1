"""What `exactivations score` prints and writes."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from exactivations.datamodules.span_labels import characters_of_tokens
from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.probes.probe_file import SavedProbes
from exactivations.lit_modules.probes.scoring import ScoredSample, Scorer
from exactivations.scripts.token_colours import ScoredText, pieces_of, terminal_depth, token_ansi, token_html
from exactivations.store.errors import InvalidInputError, StoreError
from exactivations.store.shard import publishing, write_text_atomically

SUFFIXES = (".jsonl", ".parquet", ".html")
LETTERS = 60  # of a text that is printed


def refuse_out(out: str | None, probes: SavedProbes, *, overwrite: bool) -> None:
    """Refuses a file that cannot be written before anything is computed.

    Raises:
        InvalidInputError: If it is there already, has another suffix, or is a page and the probe is not of tokens.
    """
    if out is None:
        return
    if Path(out).suffix not in SUFFIXES:
        raise InvalidInputError(f"{out}: scores are written to files that end in {', '.join(SUFFIXES)}")
    if Path(out).suffix == ".html" and not probes.scored_per_token:
        raise InvalidInputError(
            f"{out}: a page shows the scores of tokens, and this probe scores samples: write .jsonl or .parquet"
        )
    if Path(out).exists() and not overwrite:
        raise InvalidInputError(f"{out} is there already: name another file, or pass --overwrite")


def tell_scores(scored: list[ScoredSample], scorer: Scorer, data: TextDataModule, show: int) -> None:
    """Prints the scores of the first samples: a line each, or of tokens the text in colours."""
    probes, classes = scorer.probes, scorer.probes.classes
    print(f"{probes.content['label']} by the {probes.content['probe']} probe of {scorer.vector}")
    if probes.scored_per_token:
        depth = terminal_depth(os.environ, sys.stdout.isatty())
        print(token_ansi([_coloured(sample, classes, data) for sample in scored[:show]], _title(scorer), classes, depth=depth))
    else:
        threshold = probes.threshold_of(scorer.vector)
        what = f"probability of {classes[1]}" if len(classes) == 2 else "class, probability" if classes else "value"
        print(f"{'sample':>8}  {what}")
        for sample in scored[:show]:
            print(f"{sample.sample_index:>8}  {_in_words(sample, classes, threshold)}  {_excerpt(sample, data)}")
        if threshold is not None:
            print(
                f"* above the threshold for {probes.content['threshold_max_fpr']:.0%} false positives: log-odds {threshold:.4f}, "
                f"probability {1 / (1 + math.exp(-threshold)):.4f}"
            )
    if len(scored) > show:
        print(f"{len(scored):,} samples; {show} are shown (--show)")


def write_scores(path: Path, scored: list[ScoredSample], scorer: Scorer, data: TextDataModule) -> None:
    """Writes all scores: a row a sample, or a page of the texts in colours.

    Raises:
        StoreError: If that fails.
    """
    if path.suffix == ".html":
        classes = scorer.probes.classes
        page = token_html([_coloured(sample, classes, data) for sample in scored], _title(scorer), classes)
        write_text_atomically(path, page)
        return
    rows = [_row(sample, scorer) for sample in scored]
    if path.suffix == ".jsonl":
        write_text_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        return
    try:
        with publishing(path) as temporary:
            pq.write_table(pa.Table.from_pylist(rows), temporary)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"cannot write {path}: {error}") from error


def _row(sample: ScoredSample, scorer: Scorer) -> dict[str, Any]:
    classes, found = scorer.probes.classes, sample.probabilities
    row: dict[str, Any] = {"sample_index": sample.sample_index}
    if scorer.probes.scored_per_token:
        return row | {
            "input_ids": sample.input_ids.tolist(),
            "is_content": sample.token_mask.tolist(),
            "probability": found.tolist(),
        }
    if not classes:
        return row | {"value": float(found)}
    if len(classes) > 2:
        return row | {"class": classes[int(found.argmax())], "probability": dict(zip(classes, found.tolist(), strict=True))}
    row |= {"class": classes[int(found > 0.5)], "probability": float(found), "log_odds": float(sample.scores[0])}
    threshold = scorer.probes.threshold_of(scorer.vector)
    return row if threshold is None else row | {"above_threshold": bool(sample.scores[0] > threshold)}


def _in_words(sample: ScoredSample, classes: list[str], threshold: float | None) -> str:
    found = sample.probabilities
    if not classes:
        return f"{float(found):12.4g}"
    if len(classes) > 2:
        likeliest = int(found.argmax())
        return f"{classes[likeliest]:<16} {float(found[likeliest]):.4f}"
    return f"{float(found):.4f} {'*' if threshold is not None and sample.scores[0] > threshold else ' '}"


def _excerpt(sample: ScoredSample, data: TextDataModule) -> str:
    text = data.full_dataset[sample.sample_index][data.text.column]
    return repr(text[:LETTERS]) if isinstance(text, str) else ""


def _title(scorer: Scorer) -> str:
    return f"{scorer.probes.content['label']}, {scorer.vector}"


def _coloured(sample: ScoredSample, classes: list[str], data: TextDataModule) -> ScoredText:
    """Returns a sample's text in the pieces of its tokens, with the probabilities of those that are content."""
    rows = [[1 - p, p] for p in sample.probabilities.tolist()] if len(classes) == 2 else sample.probabilities.tolist()
    probabilities = [row if is_content else None for row, is_content in zip(rows, sample.token_mask.tolist(), strict=True)]
    text = data.full_dataset[sample.sample_index][data.text.column]
    if data.text.messages_column is not None:
        raise InvalidInputError("tokens of conversations cannot be laid over a text: write their scores to .jsonl or .parquet")
    try:
        whole, offsets = characters_of_tokens(text, data.encode_alone(sample.sample_index), data.tokenizer, data.text)
    except InvalidInputError as error:
        raise InvalidInputError(f"sample {sample.sample_index} {error}") from error
    return ScoredText(sample.sample_index, pieces_of(whole, offsets), probabilities)
