"""Scores of samples by saved probes: computed live, only as deep into the model as the probe needs."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.extraction.live_activations import live_batches
from exactivations.lit_modules.extraction.live_model import LiveModel
from exactivations.lit_modules.extraction.origin import Samples
from exactivations.lit_modules.probes.probe_file import SavedProbes
from exactivations.lit_modules.probes.probe_scores import probabilities
from exactivations.store.batches import ActivationBatch


@dataclass(frozen=True)
class ScoredSample:
    """One sample and what a probe says of it, or of its tokens.

    Attributes:
        sample_index: Its index in the dataset.
        input_ids: int64 [T], and token_mask: bool [T], True where a token is content.
        scores: float32 [K'], logits (of two classes: of the second) or a value; of a probe of tokens [T, K'].
        probabilities: float64 of the second of two classes, [K] of more, or a value; of a probe of tokens with a first dimension T.
    """

    sample_index: int
    input_ids: Tensor
    token_mask: Tensor
    scores: Tensor
    probabilities: Tensor


class Scorer(LiveModel):
    """Saved probes put on their model.

    Args:
        probes: What `load_probes` gave.
        vector: Which probe or ensemble; None is the one that validation chose.
        model: How the model is called or lies now, if otherwise than when the probes were trained.
        tokenizer: Its tokenizer, likewise.
        device: Where the model is put.

    Raises:
        InvalidInputError: If there is no such probe or model.
    """

    def __init__(
        self, probes: SavedProbes, vector: str | None = None, *, model: str | None = None, tokenizer: str | None = None,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.probes, self.vector = probes, vector or str(probes.content["best"])
        self._vectors = probes.vectors_of(self.vector)
        places = [probes.content["vectors"][name] for name in self._vectors]
        super().__init__(probes, places, model=model, tokenizer=tokenizer, device=device, title="the probes")

    def data_of(self, samples: Samples) -> TextDataModule:
        """Returns samples, tokenized as those that the probes were trained on.

        Raises:
            IdentityError: If model, tokenizer or dtype are not those that the probes were trained on.
        """
        return self.described_data(self.probes, samples)

    def score(self, data: TextDataModule) -> Iterator[ScoredSample]:
        """Yields all samples of `data_of(…)`, in the order in which they are computed: the longest first.

        Raises:
            InvalidInputError: If a sample does not fit the model.
            NotFiniteError: If an activation is not finite.
        """
        for batch in live_batches(self.extractor, data, self.device):
            yield from self._scored(batch)

    def _scored(self, batch: ActivationBatch) -> Iterator[ScoredSample]:
        lengths = batch.n_tokens.tolist()
        ids, masks = torch.split(batch.input_ids, lengths), torch.split(batch.token_mask, lengths)
        rows = {name: batch.activations[name] for name in self._vectors}
        n_content = None
        if self.probes.content["over_tokens"]:
            rows = {name: values[batch.token_mask] for name, values in rows.items()}
            n_content = torch.stack([mask.sum() for mask in masks])
        scores = self.probes.scores(self.vector, rows, n_content)
        found = probabilities(scores, len(self.probes.classes))
        per_token = self.probes.scored_per_token
        of_samples = [torch.split(values, lengths) if per_token else values.unbind() for values in (scores, found)]
        for sample, (score, probability) in enumerate(zip(*of_samples, strict=True)):
            yield ScoredSample(int(batch.sample_index[sample]), ids[sample], masks[sample], score, probability)
