"""run.json's content for a run that generates text."""

from datetime import UTC, datetime
from typing import Any

from transformers import PreTrainedModel

from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.extraction.run_description import about_data, absolute, versions
from exactivations.lit_modules.models.identity import machine_identity, model_identity
from exactivations.lit_modules.models.language_model import weights_hash
from exactivations.store.run_folder import RunInfo

COMPLETIONS_VERSION = 1
"""Raised when the same models, data and options would give other completions."""


def completions_info(
    models: dict[str, PreTrainedModel],
    data: TextDataModule,
    options: dict[str, Any],
    named: dict[str, tuple[str | PreTrainedModel, str | None]],
) -> RunInfo:
    """Returns the description of a run that completes this data's prompts.

    Args:
        models: By the part they play ("after", "before"), loaded.
        data: The prompts.
        options: What else decides the completions, as JSON. With `eos_token_ids`.
        named: By part: the model's name, or the model itself if it was held in Python, and the revision that was asked for.
    """
    first = next(iter(models.values()))
    identity: dict[str, Any] = {
        **{
            f"{part}_{name}": value
            for part, model in models.items()
            for name, value in {"model": weights_hash(model), **model_identity(model)}.items()
        },
        **options,
        "dtype": str(first.dtype).removeprefix("torch."),
        **machine_identity(first.device),
        "completions_version": COMPLETIONS_VERSION,
        **data.identity(),
    }
    about: dict[str, Any] = {}
    for part, (model, revision) in named.items():
        name = model if isinstance(model, str) else model.name_or_path or None
        about |= {part: absolute(name), f"{part}_revision": getattr(models[part].config, "_commit_hash", None) or revision}
    return RunInfo(
        identity=identity,
        about={**about, **about_data(data), "started": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()},
        n_shards=data.plan.n_shards,
        n_samples=len(data.tokens),
        n_tokens=int(data.plan.lengths.sum()),
        n_computed_tokens=int(data.plan.batch_tokens.sum()),
        activations={},
        skipped=data.tokens.skipped,
    )
