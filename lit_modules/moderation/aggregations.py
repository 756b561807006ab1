"""Aggregations: the ways from a sample's tokens to one vector, over one run or several of the same texts."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from exactivations.datamodules.examples import IntArray
from exactivations.datamodules.label_files import column_of
from exactivations.datamodules.tokenization import PLACEHOLDER
from exactivations.lit_modules.moderation.masked_rows import MaskedRows
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError
from exactivations.store.means_file import origin_of, refuse_another_origin
from exactivations.store.run_folder import RunInfo

PROMPTED = "+prompt"
"""What the name of a pooling ends in if the texts were put into a template (`extract --template`)."""


class Aggregations:
    """The pooled activations of one or more runs of the same texts, as one `ActivationSource`.

    An activation of texts in a template is called "resid_post.3/last+prompt". Texts in a template have other tokens than without,
    and so other token hashes: that sample i is the same one in all runs is held against the texts, which must have been kept.

    Args:
        sources: The first one's labels, groups and tokens are taken.

    Raises:
        InvalidInputError: If there is none, or two have the same activations, other samples or texts, or did not keep their texts;
            if samples were cut at an end at which the template has text.
        IdentityError: If runs differ in model, tokenizer, or anything but the template.
    """

    def __init__(self, sources: Sequence[ActivationStore | MaskedRows]) -> None:
        if not sources:
            raise InvalidInputError("there is nothing to make prototypes of: name a run folder")
        self.sources, first = list(sources), sources[0]
        self.sample_index: IntArray = first.sample_index
        self._places: dict[str, tuple[ActivationStore | MaskedRows, str]] = {}
        for source in sources:
            _refuse_other_texts(first, source)
            _refuse_cut_template(source)
            suffix = "" if template_of(source.info) is None else PROMPTED
            for name, per_token in source.per_token.items():
                if not per_token and self._places.setdefault(name + suffix, (source, name))[0] is not source:
                    other = self._places[name + suffix][0].title
                    raise InvalidInputError(
                        f"{name + suffix} is in {other} and in {source.title}: name runs of different aggregations"
                    )

    def __len__(self) -> int:
        return len(self.sample_index)

    @property
    def title(self) -> str:
        """What messages call it."""
        return " and ".join(source.title for source in self.sources)

    @property
    def samples(self) -> pa.Table:
        """The first run's samples.parquet."""
        return self.sources[0].samples

    @property
    def token_start(self) -> IntArray:
        """int64 [n+1]: how many tokens the samples before each one have in the first run."""
        return self.sources[0].token_start

    @cached_property
    def per_token(self) -> Mapping[str, bool]:
        """False for each of its activations."""
        return dict.fromkeys(self._places, False)

    def rows(self, name: str, numbers: IntArray) -> Tensor:
        """Returns rows [m, D] of samples by their place in `sample_index`."""
        if name not in self._places:
            raise InvalidInputError(f"{self.title} has no {name}; it has {', '.join(self._places)}")
        source, inner = self._places[name]
        return source.rows(inner, numbers)

    def are_content(self, numbers: IntArray) -> Tensor:
        """Returns whether the first run takes tokens by number for content, bool [m]."""
        return self.sources[0].are_content(numbers)

    def place_of(self, name: str) -> dict[str, Any]:
        """Returns what is known of an activation: its hook point and pooling, and the template and masks that it was made with."""
        source, inner = self._places[name]
        point, _, pooling = inner.rpartition("/")
        masks = source.masks_hash if isinstance(source, MaskedRows) else None
        return {"hook_point": point, "pooling": pooling, "template": template_of(source.info), "masks": masks}

    def origin(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns what decides the values of activations, without their template; see `origin_of`."""
        points = [self.place_of(name)["hook_point"] for name in names]
        return without_template(origin_of(self.sources[0].info.present_identity, points))

    @property
    def runs(self) -> list[dict[str, Any]]:
        """What each run was: its fingerprint, that of its tokens, its template, and that of the masks it was read with."""
        return [
            {
                "fingerprint": source.info.fingerprint,
                "dataset": source.info.identity["dataset"],
                "template": template_of(source.info),
                "masks": source.masks_hash if isinstance(source, MaskedRows) else None,
            }
            for source in self.sources
        ]


def template_of(info: RunInfo) -> str | None:
    """Returns the template that a run's texts were put into."""
    template: str | None = info.present_identity.get("template")
    return template


def without_template(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an origin that says nothing of the template: each aggregation says so of its own."""
    return {name: value for name, value in origin.items() if name != "template"}


def _refuse_cut_template(source: ActivationStore | MaskedRows) -> None:
    template = template_of(source.info)
    if template is None:
        return
    side = source.info.present_identity["truncation_side"]
    before, _, after = template.partition(PLACEHOLDER)
    cut = source.sample_index[column_of(source, "truncated").to_numpy()]
    if len(cut) and (after if side == "right" else before):
        raise InvalidInputError(
            f"{source.title}: sample {cut[0]} was cut on the {side}, and the template with it ({len(cut):,} of {len(source):,} "
            f"samples), so that its last token is not the template's: extract with a larger --max-length, or --truncation-side "
            f"{'left' if side == 'right' else 'right'} and a template with text at the other end only"
        )


def _refuse_other_texts(first: ActivationStore | MaskedRows, other: ActivationStore | MaskedRows) -> None:
    if other is first:
        return
    points = sorted({*first.info.present_identity["hook_points"]} & {*other.info.present_identity["hook_points"]})
    ours, theirs = (without_template(origin_of(source.info.present_identity, points)) for source in (first, other))
    refuse_another_origin(ours, theirs, other.title, first.title)
    if not np.array_equal(first.sample_index, other.sample_index):
        differ = np.setxor1d(first.sample_index, other.sample_index)
        raise InvalidInputError(
            f"{first.title} and {other.title} are of different samples: sample {differ[0]} is in one only ({len(differ):,} are)"
        )
    column = first.info.about["messages_column"] or first.info.about["text_column"]
    texts = [column_of(source, column).to_pylist() for source in (first, other)]
    wrong = [at for at, (here, there) in enumerate(zip(*texts, strict=True)) if here != there]
    if wrong:
        raise InvalidInputError(
            f"sample {first.sample_index[wrong[0]]} has another text in {other.title} than in {first.title} ({len(wrong):,} of "
            f"{len(first):,} samples): extract the same dataset"
        )
