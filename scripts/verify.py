"""`exactivations verify`: holds a finished store against samples computed again, alone."""

from typing import Literal


def verify(
    run: str,
    *,
    samples: int = 16,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    device: str = "auto",
    model: str | None = None,
    dataset: str | None = None,
    config_name: str | None = None,
    split: str | None = None,
    tokenizer: str | None = None,
) -> None:
    """Verifies a finished store: files, checksums, token hashes, and samples computed again alone. The exit status tells.

    Model and dataset are taken from run.json. The verdict is written to the run's verification.json.

    Args:
        run: The run folder.
        samples: How many samples to compute again (those that failed before are always among them).
        seed: Seed of the choice: another seed checks other samples.
        dtype: Compute the truth in this dtype. Default: that of the run.
        device: cpu, cuda, cuda:1, ... auto: a GPU if there is one.
        model: The run's model, if it is called or lies otherwise now.
        dataset: The run's dataset, likewise.
        config_name: Its configuration on the hub, likewise.
        split: Its split, likewise.
        tokenizer: The run's tokenizer, likewise.
    """
    from exactivations.lit_modules.extraction.run_description import Elsewhere, data_of, extractor_of
    from exactivations.lit_modules.models.language_model import DTYPES
    from exactivations.lit_modules.verification.store_check import verify_store
    from exactivations.scripts.verification_table import verification_table
    from exactivations.store.run_folder import RunFolder
    from exactivations.store.verification import refuse_failed

    folder = RunFolder(run)
    info, elsewhere = folder.read_info(), Elsewhere(model, tokenizer, dataset, config_name, split)
    folder.refuse_completions(info, f"their bytes are compared with `exactivations show {run} --checksums`")
    verification = verify_store(
        run, extractor_of(info, elsewhere), data_of(info, elsewhere), n_samples=samples, seed=seed,
        dtype=None if dtype is None else DTYPES[dtype], device=chosen_device(device),
    )  # fmt: skip
    print(f"{run}: {'VERIFIED' if verification.passed else 'FAILED'}")
    print(verification_table(verification, info.n_samples, everything=True))
    refuse_failed(folder, verification)


def chosen_device(device: str) -> str:
    """Returns the device that --device means.

    Raises:
        InvalidInputError: If there is no such device here.
    """
    import torch

    from exactivations.store.errors import InvalidInputError

    if device != "auto" and not _is_there(device):
        raise InvalidInputError(f"--device {device} is not here: use cpu, cuda or cuda:<number>")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _is_there(device: str) -> bool:
    import torch

    kind, _, number = device.partition(":")
    n = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(kind, 0)
    return n > 0 and (not number or (number.isdecimal() and int(number) < n))
