"""What a reader of probes must know before anything else."""

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.splits import PARTS
from exactivations.lit_modules.probes.group_bootstrap import Interval
from exactivations.lit_modules.probes.probe_results import ProbeResults

FEW_EXAMPLES = 10
FEW_GROUPS = 20  # of 12, intervals of 95% hold the truth in 90% of cases; see `group_bootstrap.intervals`


def warnings_of(results: ProbeResults, data: ActivationDataModule) -> list[str]:
    """Returns what makes the results doubtful, in sentences."""
    found = []
    chance = 0.5 if data.classes else 0.0
    if results.over_baseline is not None and results.best_baseline is not None and results.over_baseline.low <= 0:
        found.append(as_good_as(results.best, results.over_baseline, results.best_baseline))
    if results.erased is not None and results.erased.low > chance:
        found.append(
            f"{results.best} still tells the label after erasure ({results.erased.estimate:.3f}): what is left is not linear, or "
            "there were too few training samples to erase it by"
        )
    if results.over_untrained is not None and results.over_untrained.low <= 0:
        found.append(
            f"the untrained model may be as good: {results.best} has {results.over_untrained.estimate:+.3f} "
            f"[{results.over_untrained.low:+.3f}, {results.over_untrained.high:+.3f}] over {results.best_untrained!r}: then "
            "training has not put the label in"
        )
    best = next(vector for vector in results.vectors if vector.name == results.best)
    if data.classes and best.test.high < 0.5:
        found.append(f"{results.best} is worse than chance on test: the parts differ in more than the draw")
    off = [interval for interval in best.shuffled if data.classes and not interval.low <= chance <= interval.high]
    if len(off) > len(best.shuffled) / 2:
        values = ", ".join(f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]" for interval in off)
        found.append(
            f"shuffled labels should give {chance}, but {len(off)} of {len(best.shuffled)} of {results.best} do not: {values}"
        )
    doubled = _doubled(data)
    if doubled:
        found.append(
            f"{doubled:,} samples of test or validation have the same tokens as a sample of train: what is remembered looks like "
            "what is known. Group by a column that keeps them together"
        )
    if results.threshold is not None and results.threshold.n_negatives < 1 / results.threshold.max_fpr:
        found.append(
            f"the threshold was fixed on {results.threshold.n_negatives} negatives, too few for a rate of "
            f"{results.threshold.max_fpr:.0%}: give a benign store"
        )
    rare = min(results.parts["test"]["classes"].items(), key=lambda pair: pair[1], default=("", FEW_EXAMPLES))
    if rare[1] < FEW_EXAMPLES:
        found.append(f"test has {rare[1]} {results.unit}s of class {rare[0]!r} only: what is said of them is said of very few")
    n_groups = results.parts["test"]["groups"]
    if n_groups < FEW_GROUPS:
        found.append(f"test has {n_groups} groups only: the intervals are too narrow (of 12 groups, 95% ones hold 90%)")
    if data.group is None:
        found.append("no --group was given: samples that resemble each other may be in several parts, and intervals too narrow")
    return found


def _doubled(data: ActivationDataModule) -> int:
    hashes = data.source.samples.column("token_hash").to_pylist()
    train = {hashes[place] for place in data.split.train.tolist()}
    return sum(hashes[place] in train for part in PARTS[1:] for place in getattr(data.split, part).tolist())


def as_good_as(best: str, over: Interval, baseline: str) -> str:
    """Says that the text alone does as well as activations, or better.

    Args:
        best: What was chosen.
        over: What it has over the baseline.
        baseline: Its name.
    """
    return (
        f"the text alone {'is better' if over.high < 0 else 'may be as good'}: {best} has {over.estimate:+.3f} "
        f"[{over.low:+.3f}, {over.high:+.3f}] over {baseline!r}. What is read off the words shows "
        "nothing of what the model makes of them"
    )
