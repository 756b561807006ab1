"""Moderation of samples that are computed here and now, only as deep into the model as a moderator needs."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.extraction.live_activations import live_batches
from exactivations.lit_modules.extraction.live_model import LiveModel
from exactivations.lit_modules.extraction.origin import Samples
from exactivations.lit_modules.moderation.moderator_file import SavedModerator
from exactivations.store.errors import InvalidInputError


@dataclass(frozen=True)
class _Prompted:
    """A moderator as `data_for` reads it: with the template of some of its vectors."""

    about: dict[str, object]
    identity: dict[str, object]


class LiveModerator(LiveModel):
    """A saved moderator put on its model.

    Args:
        saved: What `load_moderator` gave.
        name: Which entry or mixture; None is the one that validation chose.
        model: How the model is called or lies now, if otherwise than when the moderator was made.
        tokenizer: Its tokenizer, likewise.
        device: Where the model is put.

    Raises:
        InvalidInputError: If there is no such moderator or model, or it was made of masks that came from elsewhere: texts that are
            scored have none.
    """

    def __init__(
        self, saved: SavedModerator, name: str | None = None, *, model: str | None = None, tokenizer: str | None = None,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.saved, self.name = saved, name or saved.best
        self._places = {vector: saved.content["vectors"][vector] for vector in saved.grid.vectors_of(self.name)}
        masked = [vector for vector, place in self._places.items() if place["masks"] is not None]
        if masked:
            raise InvalidInputError(
                f"{masked[0]} of {saved.path} was pooled under imported masks, and nothing says what those of other texts would "
                "be: extract and import the masks of these texts too, and use `moderate test`"
            )
        places = list(self._places.values())
        super().__init__(saved, places, model=model, tokenizer=tokenizer, device=device, title="the moderator")

    def data_of(self, samples: Samples, keep_columns: list[str] | None = None) -> TextDataModule:
        """Returns samples, put into the moderator's template and tokenized as those that it was made of.

        Raises:
            IdentityError: If model, tokenizer or dtype are others.
        """
        (template,) = {place["template"] for place in self._places.values()}  # a mixture is of one aggregation
        prompted = _Prompted(self.saved.about, self.saved.identity | {"template": template})
        return self.described_data(prompted, samples, keep_columns)

    def batches(self, data: TextDataModule) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yields sample_index int64 [B], and distances [B, K] of each entry that is needed, batch by batch: the longest first.

        Raises:
            InvalidInputError: If a sample does not fit the model.
            NotFiniteError: If an activation is not finite, naming its sample.
        """
        grid = self.saved.grid
        for batch in live_batches(self.extractor, data, self.device):
            found: dict[str, Tensor] = {}
            for entry in grid.entries_of(self.name):
                vector, metric = grid.entries[entry]
                place = self._places[vector]
                found |= grid.distances(vector, batch.activations[f"{place['hook_point']}/{place['pooling']}"], [metric])
            yield batch.sample_index, found

    def moderate(self, data: TextDataModule) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the same of all samples of `data_of(…)`, in dataset order."""
        indices, parts = [], list[dict[str, Tensor]]()
        for index, distances in self.batches(data):
            indices.append(index)
            parts.append(distances)
        every = torch.cat(indices)
        order = every.argsort()
        return every[order], {entry: torch.cat([part[entry] for part in parts])[order] for entry in parts[0]}
