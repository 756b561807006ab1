"""verification.json: what was computed again, alone, and held against a store, and how it came out."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from exactivations.store.errors import StoreError, VerificationError
from exactivations.store.run_folder import SAMPLES_FILE, VERIFICATION_FILE, RunFolder, RunInfo, contents_of
from exactivations.store.shard import write_text_atomically

MOST_EXTREMES = 5  # `exactivations.datamodules.draw` takes no more


@dataclass(frozen=True)
class NameFigures:
    """How one activation agreed, over all samples drawn.

    Figures that are not finite (a true row of zeros, say) are None, since JSON has no infinity.

    Attributes:
        name: "<hook point>/<pooling>".
        worst_error, median_error: Relative errors, norm(stored - true) / norm(true); of a sample's tokens the worst counts.
        worst_cosine, median_cosine: Cosines of stored and true rows; of a sample's tokens the lowest counts.
        rounding: What rounding alone did to the worst sample: the truth in the compute dtype against the truth in float32.
        tolerance: What was allowed for the worst sample.
    """

    name: str
    worst_error: float | None
    median_error: float | None
    worst_cosine: float | None
    median_cosine: float | None
    rounding: float | None
    tolerance: float


@dataclass(frozen=True)
class NextTokenFigures:
    """The model's own head on stored states, against its own next-token distribution for the sample alone.

    Attributes:
        name: The activation that the head was applied to (through the final norm, if it lies before that).
        positions: Tokens that were looked at.
        top1_agreement: Share of them where both have the same most probable next token.
        largest_difference: The largest difference of any token's probability.
        error: The worst relative error of the logits at one position, without their mean: norm(found - own) / norm(own).
        rounding: What rounding did to these logits: in the compute dtype against float32, and by storing.
        tolerance: The error that was allowed there.
    """

    name: str
    positions: int
    top1_agreement: float
    largest_difference: float
    error: float | None
    rounding: float | None
    tolerance: float


@dataclass(frozen=True)
class Verification:
    """The content of verification.json.

    Attributes:
        passed: Whether everything agreed.
        fingerprint: Of the run that was verified, and contents: of its files' bytes then (see `contents_of`). For other
            bytes the verdict does not hold.
        samples: Indices of the samples drawn.
        damaged_shards: Shards that were not what their checksums say.
        failed_samples: Those of them that did not agree.
        failures: What did not agree, in words; the first ones.
        n_failures: How many there were.
        figures: By activation.
        next_tokens: The check of the head, by activation; empty if there was nothing to check.
        next_tokens_note: Why there was nothing to check, or None.
        dtype: What the truth was computed in.
        tolerance: Where the tolerances come from, in words.
        checked: What else was looked at ("checksums", "token hashes of all samples", …).
        seconds: What the verification took, on the rank that took longest.
        share: That as a share of the run's wall time; None when it was done later.
        when: Date and time, ISO 8601.
    """

    passed: bool
    fingerprint: str
    contents: str
    samples: list[int]
    figures: list[NameFigures]
    dtype: str
    tolerance: str
    seconds: float
    when: str
    damaged_shards: list[int] = field(default_factory=list)
    failed_samples: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    n_failures: int = 0
    next_tokens: list[NextTokenFigures] = field(default_factory=list)
    next_tokens_note: str | None = None
    checked: list[str] = field(default_factory=list)
    share: float | None = None

    def largest_hidden_share(self, n_samples: int) -> float:
        """Returns the largest share of a store's samples that can be wrong although none showed, with 95% confidence.

        Each of n samples drawn at random is right with probability 1 - share: 0.05 = (1 - share) ** n. The others (at most
        `MOST_EXTREMES`, and up to half) do not count here: they are those where faults show soonest.

        Args:
            n_samples: How many samples the store has.
        """
        if len(self.samples) >= n_samples:
            return 0.0
        n = len(self.samples) - min(MOST_EXTREMES, -(-len(self.samples) // 2))
        return 1 - 0.05 ** (1 / n) if n else 1.0


def write_verification(folder: RunFolder, verification: Verification) -> None:
    """Writes verification.json, whole or not at all.

    Raises:
        StoreError: If that fails.
    """
    path = folder.path / VERIFICATION_FILE
    try:
        write_text_atomically(path, json.dumps(asdict(verification), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}. The store stays unverified") from error


def read_verification(folder: RunFolder, info: RunInfo) -> Verification | None:
    """Reads verification.json; None if there is none, or it is that of another run.

    Raises:
        StoreError: If it cannot be read.
    """
    path = folder.path / VERIFICATION_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be read: {error}. Remove it and verify anew: exactivations verify {folder.path}"
        ) from error
    try:
        content["figures"] = [NameFigures(**figures) for figures in content["figures"]]
        content["next_tokens"] = [NextTokenFigures(**figures) for figures in content["next_tokens"]]
        verification = Verification(**{f.name: content[f.name] for f in fields(Verification)})
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"{path} is not a verification of this version ({type(error).__name__}: {error}). Remove it and verify anew: "
            f"exactivations verify {folder.path}"
        ) from error
    return verification if verification.fingerprint in info.fingerprints else None


def withdraw_passed(folder: RunFolder, info: RunInfo) -> None:
    """Removes the verdict that a run passed, if shards of it are missing now: it cannot hold for those that will replace them."""
    verification = read_verification(folder, info)
    if verification is not None and verification.passed and len(folder.published(info)) < info.n_shards:
        (folder.path / VERIFICATION_FILE).unlink()


def refuse_unverified(folder: RunFolder, info: RunInfo, checksums: dict[int, str]) -> None:
    """Refuses a store whose verification failed, and a complete one that was not verified with the shards that are there.

    Args:
        folder: The run folder.
        info: Its run.json.
        checksums: Of the shards that are there.

    Raises:
        VerificationError: With what failed, or how to verify it.
    """
    verification = read_verification(folder, info)
    if verification is not None:
        refuse_failed(folder, verification)
    if len(checksums) < info.n_shards:
        return
    if verification is None or verification.contents != contents_of(checksums, folder.samples_footer()):
        why = "no sample of it was computed again alone and compared"
        if verification is not None:
            why = f"its shards or its {SAMPLES_FILE} were changed after {verification.when}, when it was verified"
        raise VerificationError(
            f"{folder.path} is not verified: {why}. Verify it: exactivations verify {folder.path}; or open it with "
            "allow_unverified=True"
        )


def refuse_failed(folder: RunFolder, verification: Verification) -> None:
    """Refuses a store by its verdict.

    Raises:
        VerificationError: If it failed, with what failed.
    """
    if verification.passed:
        return
    more = f"\n  and {verification.n_failures - 5} more" if verification.n_failures > 5 else ""
    raise VerificationError(
        f"{folder.path} failed its verification of {verification.when}:\n  "
        + "\n  ".join(verification.failures[:5])
        + f"{more}\nMend the cause and extract it anew with --overwrite, verify it again (exactivations verify {folder.path}), "
        "or open it with allow_unverified=True to look into it"
    )
