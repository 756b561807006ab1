"""The report and the table: every number is the results', every vector and warning is there, and hostile names stay names."""

import re

import pytest

from exactivations.lit_modules.probes.group_bootstrap import Interval
from exactivations.scripts.probe_report import LEVEL, MOST_ROWS, probe_report, results_table
from tests.scripts.probe_results import LAYERS, results_of

NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
FIXED = {"0", "0.5", "1", "2019"}  # what chance and perfection are, and the year of a paper
CASES = {
    "two classes": results_of(),
    "values": results_of(classes=(), shift=-0.7),
    "three classes": results_of(classes=("a", "b", "c")),
    "tokens": results_of(unit="token"),
    "nothing more": results_of(["embed/last"], bare=True, n_shuffles=0, threshold=None),
    "no groups": results_of(group_column=None),
    "below": results_of(over_baseline=Interval(-0.07, -0.11, -0.02, 57, 1000, 3)),
}


def numbers_in(value):
    """All numbers in results, however deep."""
    if isinstance(value, int | float):
        return {value}
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*map(numbers_in, inner))


def table(results):
    return results_table(results, everything=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("write", [probe_report, table])
def test_every_number_is_one_of_the_results_at_its_precision(name, write):
    results, text = CASES[name], write(CASES[name]).replace(LEVEL, "")
    text = re.sub(r"^(> - |WARNING: ).*$", "", text, flags=re.MULTILINE)  # warnings have a test of their own
    for vector in results.vectors:
        text = text.replace(vector.name, "")
    values, found = numbers_in(results.to_json()), NUMBER.findall(text)
    assert len(found) >= 10
    for number in found:
        n_digits = len(number.partition(".")[2])
        of_results = any(f"{value:.{n_digits}f}" == number.replace(",", "").lstrip("+") for value in values)
        assert of_results or number in FIXED or float(number) in values, f"{number} is not in the results"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("write", [probe_report, table])
def test_every_vector_stands_in_one_line_with_its_own_values(name, write):
    results = CASES[name]
    lines = write(results).partition("## Every vector")[2 if write is probe_report else 0].splitlines()
    for vector in results.vectors:
        (line,) = [line for line in lines if re.match(rf"(\| `|[* ] ){re.escape(vector.name)}[` ]", line)]
        test, validation = vector.test, "-" if vector.validation is None else f"{vector.validation:.3f}"
        assert f"{test.estimate:.3f} [{test.low:.3f}, {test.high:.3f}]" in line
        assert validation in line.split()
        assert ("(chosen)" in line or line.startswith("*")) == (vector.name == results.best)
        if vector.shuffled:
            assert f"[{min(i.low for i in vector.shuffled):.3f}, {max(i.high for i in vector.shuffled):.3f}]" in line


def test_warnings_stand_in_full_before_any_table():
    results = CASES["two classes"]
    report = probe_report(results)
    first, second = r"the text alone may be as good: by +0.010 [-0.010, +0.030]", r"another \| with \`marks\` &amp; &lt;b&gt;"
    assert f"\n> - {first}\n> - {second}\n" in report and report.index(second) < report.index("\n|")
    assert all(f"\nWARNING: {warning}" in results_table(results) for warning in results.warnings)
    assert "Warnings" not in probe_report(results_of(bare=True))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.1, "the activations tell more than this baseline"), (-0.001, 0.1, "the baseline alone may be as good"),
        (-0.1, -0.001, "the baseline alone tells more"), (0.0, 0.1, "the baseline alone may be as good"),
    ],
)  # fmt: skip
def test_the_answer_follows_the_interval_over_the_baseline(low, high, verdict):
    results = results_of(over_baseline=Interval((low + high) / 2, low, high, 57, 1000, 0))
    (answer,) = [line for line in probe_report(results).splitlines() if line.startswith("The probe of `resid_post.1/last`")]
    assert verdict in answer and f"{(low + high) / 2:+.3f} [{low:+.3f}, {high:+.3f}]" in answer
    assert "No baseline was given" in probe_report(results_of(bare=True))


def test_what_was_not_measured_has_no_section():
    whole, little = probe_report(CASES["two classes"]), probe_report(CASES["nothing more"])
    for what in ("## Threshold", "Selectivity", "Erasure", "Ensemble", "untrained", "baseline: length"):
        assert what not in little
    assert all(what in whole for what in ("## Threshold", "Selectivity +0.314", "Erasure", "best on validation, it has +0.2"))
    assert "above 0.9731" in whole and "its 265 negatives" in whole
    assert "![AUROC on test by layer](layers.png)" in whole
    assert "Labels were not shuffled" in little


def test_resamples_without_a_class_are_told():
    changed = results_of()
    changed.metrics[changed.best]["f1"] = Interval(0.5, 0.4, 0.6, 57, 1000, 31)
    assert "Up to 31 further resamples" in probe_report(changed)


def test_further_lines_stand_with_how_it_was_done():
    assert probe_report(CASES["values"], how=["The model was x."], picture="a.png").endswith("\n- The model was x.\n")


def test_hostile_names_break_no_table():
    names = ["a|b/mean", "`c`/mean", "<img src=x>/last", "x\ny/last", " d ", "resid_post.0/mean"]
    results = results_of(names, label="is|it*\n# so", classes=("|", "`"), best="`c`/mean")
    report = probe_report(results)
    blocks = re.findall(r"(?:^\|.*\n)+", report, flags=re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    n_rows = blocks[2].count("\n") - 2
    assert n_rows == len(results.vectors)
    outside_code = re.sub(r"`[^`\n]*`", "", report.replace(r"\`", ""))
    assert "<img" not in outside_code and "\n# so" not in report


def test_the_table_is_short_aligned_and_best_first():
    names = [f"resid_post.{layer}/mean" for layer in range(30)]
    results = results_of(names, best=names[-1])
    lines = results_table(results).splitlines()
    start = next(at for at, line in enumerate(lines) if "validation" in line)
    n_shown = MOST_ROWS["probe"] + MOST_ROWS["control"] + 4
    rows = lines[start : start + 1 + n_shown]
    assert rows[1].split()[:2] == ["*", names[-1]] and rows[2].split()[0] == names[-2]
    assert len({len(row) for row in rows}) == 1 and len(rows[0]) < 132
    assert f"and {len(results.vectors) - n_shown} more, worse on validation" in lines[start + 1 + n_shown]
    assert "more, worse" not in results_table(results_of(LAYERS, controls=()))
