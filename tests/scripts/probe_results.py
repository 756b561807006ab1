"""Results of probes, made up: every number in them is different."""

from itertools import count

from exactivations.lit_modules.probes.group_bootstrap import Interval
from exactivations.lit_modules.probes.probe_metrics import CLASSIFICATION, REGRESSION
from exactivations.lit_modules.probes.probe_results import ProbeResults, Threshold, VectorResult

LAYERS = [f"resid_post.{layer}/{pooling}" for pooling in ("mean", "last") for layer in (0, 1, 2)]


def results_of(names=LAYERS, *, controls=("untrained",), classes=("no", "yes"), shift=0.0, n_shuffles=2, bare=False, **changed):
    """Returns results; `shift` is added to all values, `bare` leaves out all that need not be there."""
    numbers = count()

    def interval():
        estimate = 0.6 + 0.00317 * next(numbers) % 0.35 + shift
        return Interval(estimate, estimate - 0.0413, estimate + 0.0271, 57, 1000, 0)

    def near(value):
        off = 0.0007 * next(numbers)
        return Interval(value + off, value - 0.05 - off, value + 0.04 + off, 57, 1000, 0)

    chance = 0.5 if classes else 0.0
    vectors = [
        VectorResult(name, "probe", 0.03, 0.7 + shift + 0.0013 * at, interval(), [near(chance) for _ in range(n_shuffles)])
        for at, name in enumerate(names)
    ]
    baselines = [] if bare else ["baseline: bag of tokens", "baseline: length"]
    if not bare:
        vectors += [VectorResult(f"{key}: {name}", "control", 0.1, 0.61, interval()) for key in controls for name in names]
        vectors += [VectorResult(name, "baseline", 7.0, 0.72, interval(), [near(chance)]) for name in baselines]
        vectors += [VectorResult("ensemble: average", "ensemble", None, 0.83, interval())]
        vectors += [VectorResult("ensemble: stacked", "ensemble", None, None, interval())]
    best = names[-2] if len(names) > 1 else names[0]
    parts = {
        part: {"examples": 7 * n, "samples": n, "groups": n // 9, "classes": {name: 3 * n + at for at, name in enumerate(classes)}}
        for part, n in (("train", 1203), ("validation", 402), ("test", 397))
    }
    table = CLASSIFICATION if classes else REGRESSION
    content = {
        "label": "has_docstring", "classes": list(classes), "unit": "sample", "headline": "auroc" if classes else "r2",
        "parts": parts, "group_column": "module", "n_resamples": 1000, "best": best, "vectors": vectors,
        "metrics": {name: {what: interval() for what in table} for name in [best, *baselines[:1]]},
        "threshold": Threshold(0.97312402, "validation", 0.01, 265, interval(), interval()) if len(classes) == 2 else None,
        "over_baseline": None if bare else near(0.0623), "best_baseline": None if bare else baselines[0],
        "over_untrained": None if bare else near(0.2211),
        "selectivity": None if bare or not classes else 0.3141, "erased": None if bare else near(0.5),
        "warnings": [] if bare else ["the text alone may be as good: by +0.010 [-0.010, +0.030]", "another | with `marks` & <b>"],
    }  # fmt: skip
    return ProbeResults(**{**content, **changed})
