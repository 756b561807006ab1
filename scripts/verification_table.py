"""How a verification is shown in a terminal."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exactivations.store.verification import NameFigures, Verification

MOST_ROWS = 12


def verification_table(verification: "Verification", n_samples: int, *, everything: bool = False) -> str:
    """Returns the verdict and its figures as text, the activations nearest to their tolerance first.

    Args:
        verification: The verdict.
        n_samples: How many samples the store has.
        everything: Show all activations, and not only the first ones.
    """
    n, share = len(verification.samples), "" if verification.share is None else f", {verification.share:.1%} of the run"
    what = f"{n} samples, computed again alone in {verification.dtype}"
    verdict = f"verified: {what}, agree with the store"
    if not verification.passed:
        n_wrong, n_damaged = len(verification.failed_samples), len(verification.damaged_shards)
        damaged = f", and {n_damaged} shards are damaged" if n_damaged else ""
        verdict = f"FAILED: of {what}, {n_wrong} disagree with the store{damaged}"
    lines = [f"{verdict} ({verification.seconds:.1f} s{share})"]
    hidden = verification.largest_hidden_share(n_samples)
    if verification.passed and hidden:
        lines.append(
            f"  a fault in more than {hidden:.1%} of its {n_samples:,} samples would have shown (95% confidence); more samples: "
            "exactivations verify RUN --samples 300"
        )
    rows = sorted(verification.figures, key=_nearness, reverse=True)
    shown = rows if everything else rows[:MOST_ROWS]
    width = max([15, *(len(row.name) for row in shown)])
    lines.append(f"  {'activation':<{width}}  worst error  median error  worst cosine  rounding  allowed")
    for row in shown:
        figures = [_figure(value) for value in (row.worst_error, row.median_error)]
        cosine = "inf/NaN" if row.worst_cosine is None else f"{row.worst_cosine:.6f}"
        rounding = "-" if verification.dtype == "float32" and not row.rounding else _figure(row.rounding)
        lines.append(
            f"  {row.name:<{width}}  {figures[0]:>11}  {figures[1]:>12}  {cosine:>12}  {rounding:>8}  {row.tolerance:>7.1e}"
        )
    if len(rows) > len(shown):
        lines.append(f"  and {len(rows) - len(shown)} more, nearer to the truth, in verification.json")
    if verification.next_tokens:
        lines.append(f"  {'the head on ...':<{width}}  error of logits  likeliest token  of probability  rounding  allowed")
    for head in verification.next_tokens:
        lines.append(
            f"  {head.name:<{width}}  {_figure(head.error):>15}  {head.top1_agreement:>10.1%} same"
            f"  {head.largest_difference:>14.1e}  {_figure(head.rounding):>8}  {head.tolerance:>7.1e}"
        )
    if verification.next_tokens_note:
        lines.append(f"  the model's head was not tried: {verification.next_tokens_note}")
    lines += [f"  {checked}" for checked in verification.checked]
    return "\n".join(lines)


def _nearness(row: "NameFigures") -> float:
    return float("inf") if row.worst_error is None else row.worst_error / row.tolerance


def _figure(value: float | None) -> str:
    return "inf/NaN" if value is None else f"{value:.1e}" if value else "0"
