"""The store: what a run leaves on disk, and how to read it. Knows nothing of Lightning or of language models."""

from exactivations.store.activation_store import ActivationStore, Sample, TokenBlock
from exactivations.store.batches import ActivationBatch, ActivationSpec, Place, TokenBatch, TokenStep
from exactivations.store.mean_activations import MeanActivations
from exactivations.store.shard_sums import MeanOptions
from exactivations.store.vectors import Vector

__all__ = [
    "ActivationBatch",
    "ActivationSpec",
    "ActivationStore",
    "MeanActivations",
    "MeanOptions",
    "Place",
    "Sample",
    "TokenBatch",
    "TokenBlock",
    "TokenStep",
    "Vector",
]
