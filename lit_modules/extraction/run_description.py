"""run.json's content: a run described from its parts, and the parts made again from the description."""

from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from exactivations.datamodules.embedded import EMBEDDED
from exactivations.datamodules.plan import PlanOptions
from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import TextOptions
from exactivations.lit_modules.extraction.extractor import ActivationExtractor
from exactivations.lit_modules.models.language_model import ModelOptions
from exactivations.store.batches import ActivationSpec
from exactivations.store.errors import InvalidInputError
from exactivations.store.run_folder import RunInfo

PACKAGES = ("exactivations", "torch", "transformers", "lightning", "datasets", "safetensors", "numpy")


def run_info(extractor: ActivationExtractor, data: TextDataModule, specs: dict[str, ActivationSpec]) -> RunInfo:
    """Returns the content of run.json for a run of this extractor over this data."""
    options = extractor.options
    return RunInfo(
        identity={**extractor.identity(), **data.identity()},
        about={
            "model": absolute(extractor.model_name),
            "revision": getattr(extractor.load(extractor.device).model.config, "_commit_hash", None) or options.revision,
            "attn_implementation": options.attn_implementation,
            "trust_remote_code": options.trust_remote_code,
            "random_weights": options.random_weights,
            **about_data(data),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
        },
        n_shards=data.plan.n_shards,
        n_samples=len(data.tokens),
        n_tokens=int(data.plan.lengths.sum()),
        n_computed_tokens=int(data.plan.batch_tokens.sum()),
        activations={name: {**asdict(spec), "dtype": str(spec.dtype).removeprefix("torch.")} for name, spec in specs.items()},
        skipped=data.tokens.skipped,
    )


def about_data(data: TextDataModule) -> dict[str, Any]:
    """Returns what is told of data but does not decide values: what it is called and how it was asked for."""
    return {
        "tokenizer": absolute(_name_of(data.tokenizer)),
        "tokenizer_revision": data.tokenizer_revision,
        "dataset": absolute(str(data.source)) if isinstance(data.source, str | Path) else None,
        "dataset_kind": type(data.source).__name__,
        "config": data.config,
        "split": data.split,
        "text_column": data.text.text_column,
        "messages_column": data.text.messages_column,
        "on_empty": data.text.on_empty,
        "num_samples": data.num_samples,
        "sample_seed": data.sample_seed,
        "keep_columns": data.keep_columns,
        "n_truncated": int(data.tokens.truncated.sum()),
    }


def versions() -> dict[str, str]:
    """Returns the versions of the packages that values depend on."""
    return {name: version(name) for name in PACKAGES}


def _name_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    name: str = tokenizer.name_or_path
    embedded = {str(path): short for short, path in EMBEDDED.items()}
    return embedded.get(name, name) or None


def absolute(name: str | None) -> str | None:
    """Returns the full path of a local file or folder, so that it is found from any working directory; other names as they are."""
    return str(Path(name).resolve()) if name is not None and name not in EMBEDDED and Path(name).exists() else name


@dataclass(frozen=True)
class Elsewhere:
    """What a run was made of, where it is called or lies otherwise now than run.json says; None: as it says."""

    model: str | None = None
    tokenizer: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str | None = None


def extractor_of(info: RunInfo, elsewhere: Elsewhere) -> ActivationExtractor:
    """Makes the extractor of a run again from its description. Whether it is the same, its identity tells.

    Raises:
        InvalidInputError: If the model was an object without a name and none is given.
    """
    about, identity = info.about, info.present_identity
    model = named(elsewhere.model or about["model"], "model", identity["model_class"])
    options = ModelOptions(
        about["revision"], identity["dtype"], about["attn_implementation"], about["trust_remote_code"], about["random_weights"]
    )
    return ActivationExtractor(
        model, identity["hook_points"], identity["poolings"], options=options,
        store_dtype=identity["store_dtype"], cpu_threads=identity["cpu_threads"],
    )  # fmt: skip


def data_of(info: RunInfo, elsewhere: Elsewhere) -> TextDataModule:
    """Makes the data module of a run again from its description.

    Raises:
        InvalidInputError: If dataset or tokenizer was an object without a name and none is given.
    """
    about, identity = info.about, info.present_identity
    dataset = named(elsewhere.dataset or about["dataset"], "dataset", about["dataset_kind"])
    tokenizer = named(elsewhere.tokenizer or about["tokenizer"], "tokenizer", "tokenizer object")
    names = {"text_column": about["text_column"], "messages_column": about["messages_column"], "on_empty": about["on_empty"]}
    return TextDataModule(
        dataset,
        tokenizer,
        tokenizer_revision=about["tokenizer_revision"],
        trust_remote_code=about["trust_remote_code"],
        config=elsewhere.config or about["config"],
        split=elsewhere.split or about["split"],
        keep_columns=about["keep_columns"],
        num_samples=about["num_samples"],
        sample_seed=about["sample_seed"],
        text=TextOptions.of_identity(identity, **names),
        plan_options=PlanOptions(**{f.name: identity[f.name] for f in fields(PlanOptions)}),
    )


def named(name: str | None, what: str, kind: str) -> str:
    """Returns a part's name, or refuses a part that has none."""
    if name is None:
        raise InvalidInputError(
            f"the run's {what} was a {kind} in Python, that has no name: save it and pass --{what}; or verify from Python with "
            "exactivations.lit_modules.verify_store"
        )
    return name
