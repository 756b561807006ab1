"""The store: what a run leaves on disk, and how to read it. Knows nothing of Lightning or of language models."""

from exactivations.store.activation_store import ActivationStore, Sample, TokenBlock
from exactivations.store.batches import ActivationBatch, ActivationSpec, Place, TokenBatch

__all__ = ["ActivationBatch", "ActivationSpec", "ActivationStore", "Place", "Sample", "TokenBatch", "TokenBlock"]
