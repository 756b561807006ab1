"""sentence-transformers: `encode`, which sorts by length, in batches of 32. It gives the mean after the final norm."""

import torch
from torch import Tensor

from benchmarks.speed.cases import Case, Outputs, Round


def prepare(case: Case) -> Round:
    """Loads the model; a round encodes all texts."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    texts = case.read_texts()
    transformer = Transformer(case.model_path, max_seq_length=case.max_length)
    model = SentenceTransformer(modules=[transformer, Pooling(transformer.get_word_embedding_dimension(), "mean")], device="cpu")

    def run() -> Tensor:
        return model.encode(texts, batch_size=32, convert_to_tensor=True, show_progress_bar=False)

    def outputs(found: Tensor) -> Outputs:
        return {"final_norm/mean": found.to(torch.float32)}

    return Round(run, outputs)
