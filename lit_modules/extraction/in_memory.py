"""Activations of a few texts in one call, in memory: for a notebook, and for what is too small for a store."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exactivations.datamodules.plan import PlanOptions
from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import TextOptions
from exactivations.lit_modules.extraction.extractor import ActivationExtractor
from exactivations.lit_modules.extraction.live_activations import LiveActivations
from exactivations.lit_modules.models.language_model import ModelOptions
from exactivations.store.errors import InvalidInputError


def activations(
    model: str | PreTrainedModel,
    texts: Sequence[str],
    hook_points: Sequence[str],
    poolings: Sequence[str] = ("mean",),
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    device: str | None = None,
    options: ModelOptions | None = None,
    text: TextOptions | None = None,
    plan_options: PlanOptions | None = None,
) -> dict[str, Tensor | list[Tensor]]:
    """Computes activations of texts and returns them in the order of the texts, on the host, in the model's dtype.

    They are what a store of the same texts would hold, but nothing is written, and nothing is verified against the texts alone.

    Args:
        model: Hub id, local path or "demo"; or a Hugging Face model, which stays where and as it is.
        texts: n texts.
        hook_points: "resid_post.3", "embed", …: see the README.
        poolings: "mean", "last", "tokens", …: see the README.
        tokenizer: Hub id, path or a tokenizer. Default: that of the model, if it was named.
        device: "cpu", "cuda", "cuda:1", … Default: where a model that was given lies; else a GPU if there is one.
        options: Of a model that was named: dtype, attention, revision.
        text: Length, template and which tokens count.
        plan_options: Token budget and padding of batches.

    Returns:
        By "<hook point>/<pooling>": [n, D], row i of texts[i]; of "tokens" a list, of which item i is [tokens of texts[i], D].

    Raises:
        InvalidInputError: If a text is empty or too long, there is no such hook point or pooling, or a model was given without
            its tokenizer.
        NotFiniteError: If an activation is not finite, naming its sample.
    """
    if isinstance(texts, str):
        raise InvalidInputError(f"texts must be a list of texts, got one text: [{texts[:20]!r}…]")
    if text is not None and text.on_empty == "skip":
        raise InvalidInputError("row i is to be that of texts[i]: leave empty texts out before, and not with on_empty='skip'")
    if tokenizer is None:
        if not isinstance(model, str):
            raise InvalidInputError(f"a {type(model).__name__} does not say what its tokenizer is: tokenizer=…")
        tokenizer = model
    if device is None:
        named = "cuda" if torch.cuda.is_available() else "cpu"
        device = named if isinstance(model, str) else str(model.device)
    extractor = ActivationExtractor(model, list(hook_points), list(poolings), options=options)
    live = LiveActivations(extractor, TextDataModule(list(texts), tokenizer, text=text, plan_options=plan_options), device)
    found: dict[str, Tensor | list[Tensor]] = {}
    for name, per_token in live.per_token.items():
        rows = live.rows(name, np.arange(live.token_start[-1] if per_token else len(live)))
        found[name] = list(torch.split(rows, np.diff(live.token_start).tolist())) if per_token else rows
    return found
