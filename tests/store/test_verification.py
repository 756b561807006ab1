"""verification.json: what goes in comes out, and a store without a verdict, or with a bad one, is not opened by mistake."""

import json
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from exactivations.datamodules import draw
from exactivations.datamodules.plan import PlanOptions, plan
from exactivations.store import ActivationStore
from exactivations.store.errors import IncompleteStoreError, StoreError, VerificationError
from exactivations.store.run_folder import RunFolder
from exactivations.store.verification import (
    MOST_EXTREMES,
    NameFigures,
    NextTokenFigures,
    Verification,
    read_verification,
    refuse_failed,
    write_verification,
)

from .stores import make_store, run_info, sample_table, verdict

INDEX, LENGTHS = [0, 1, 2, 5, 6, 7], [3, 1, 4, 1, 5, 2]
FAILED = {"passed": False, "failures": ["sample 5: resid_post.1/mean is wrong"], "n_failures": 1, "failed_samples": [5]}
finite = st.floats(allow_nan=False, allow_infinity=False)
maybe = st.none() | finite
name_figures = st.builds(
    NameFigures, name=st.text(), worst_error=maybe, median_error=maybe, worst_cosine=maybe, median_cosine=maybe, rounding=maybe,
    tolerance=finite,
)  # fmt: skip
head_figures = st.builds(
    NextTokenFigures, name=st.text(), positions=st.integers(0), top1_agreement=finite, largest_difference=finite,
    error=maybe, rounding=maybe, tolerance=finite,
)  # fmt: skip
verifications = st.builds(
    Verification, passed=st.booleans(), fingerprint=st.just("mine"), contents=st.text(), samples=st.lists(st.integers(0)),
    figures=st.lists(name_figures, max_size=3), dtype=st.text(), tolerance=st.text(), seconds=finite, when=st.text(),
    failed_samples=st.lists(st.integers(0)), failures=st.lists(st.text()), n_failures=st.integers(0),
    next_tokens=st.lists(head_figures, max_size=3), next_tokens_note=st.none() | st.text(), checked=st.lists(st.text()),
    share=maybe,
)  # fmt: skip


class Fingerprints:
    """All that reading looks at in a RunInfo."""

    fingerprints = ("older", "mine")


def strict(text):
    """Parses JSON as its standard has it, without Python's NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def folder(tmp_path):
    return make_store(tmp_path / "run", INDEX, LENGTHS)


@settings(max_examples=60)
@given(verification=verifications)
def test_what_is_written_is_read_and_is_strict_json(tmp_path_factory, verification):
    folder = RunFolder(tmp_path_factory.getbasetemp())
    write_verification(folder, verification)
    assert read_verification(folder, Fingerprints()) == verification
    assert strict((folder.path / "verification.json").read_text()).keys() == {f.name for f in fields(Verification)}


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_json_cannot_hold_is_never_written_and_the_verdict_before_stays(folder, value):
    before = (folder.path / "verification.json").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_verification(folder, verdict("mine", seconds=value))
    assert (folder.path / "verification.json").read_bytes() == before
    assert not list(folder.path.glob(".*.tmp"))


def test_a_verdict_of_another_run_counts_as_none(folder):
    info = folder.read_info()
    write_verification(folder, verdict("0" * 32))
    assert read_verification(folder, info) is None
    with pytest.raises(VerificationError, match=r"is not verified.*exactivations verify .*allow_unverified=True"):
        ActivationStore(folder.path)
    write_verification(folder, verdict("0" * 32, **FAILED))
    assert read_verification(folder, info) is None, "a failure of another run condemns nothing here"


def test_a_verdict_from_before_an_allowed_change_of_the_environment_still_counts(folder):
    info = folder.read_info()
    older = info.fingerprint
    info.changes.append({"fields": {"torch": ["2.0", "2.1"]}, "fingerprint": "f" * 32})
    write_verification(folder, verdict(older))
    assert read_verification(folder, info) == verdict(older)


def test_no_file_is_no_verification(folder):
    (folder.path / "verification.json").unlink()
    assert read_verification(folder, folder.read_info()) is None


def without(name):
    content = json.loads(json.dumps({f.name: getattr(verdict("mine"), f.name) for f in fields(Verification)}))
    del content[name]
    return json.dumps(content)


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"passed": true', "[]", "7", "null", '"text"', "{}", "\xff\xfe", *(without(f.name) for f in fields(Verification))],
)
def test_what_cannot_be_read_or_is_of_an_older_version_is_an_error_that_says_what_to_do(folder, text):
    (folder.path / "verification.json").write_bytes(text.encode("latin-1"))
    for read in (lambda: read_verification(folder, folder.read_info()), lambda: ActivationStore(folder.path)):
        with pytest.raises(StoreError, match=r"verification\.json .*Remove it and verify anew: exactivations verify") as error:
            read()
        assert str(folder.path) in str(error.value)
    assert len(ActivationStore(folder.path, allow_unverified=True)) == 6


@pytest.mark.parametrize("field", ["figures", "next_tokens"])
@pytest.mark.parametrize("content", [[{"name": "x"}], [{"unknown": 1}], [3], 3, {"name": 1}, None])
def test_figures_of_another_version_are_an_error_too(folder, field, content):
    path = folder.path / "verification.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: content}))
    with pytest.raises(StoreError, match=r"not a verification of this version.*exactivations verify"):
        read_verification(folder, folder.read_info())


@pytest.mark.parametrize("where", ["flush_to_disk", "Path.replace"])
def test_writing_that_fails_leaves_the_verdict_before_and_says_that_the_store_is_unverified(folder, monkeypatch, where):
    def fail(*_):
        raise OSError(28, "No space left on device")

    before = (folder.path / "verification.json").read_bytes()
    monkeypatch.setattr("pathlib.Path.replace" if where == "Path.replace" else f"exactivations.store.shard.{where}", fail)
    with pytest.raises(StoreError, match=r"cannot write .*verification\.json: .*No space left.*stays unverified"):
        write_verification(folder, verdict(folder.read_info().fingerprint, **FAILED))
    monkeypatch.undo()
    assert (folder.path / "verification.json").read_bytes() == before


def test_a_store_that_failed_is_refused_with_what_failed_and_opens_if_allowed(folder):
    write_verification(folder, verdict(folder.read_info().fingerprint, **FAILED))
    with pytest.raises(
        VerificationError, match=r"failed its verification of 2026-01-01(.|\n)*sample 5: resid_post\.1/mean is wrong"
    ):
        ActivationStore(folder.path)
    assert len(ActivationStore(folder.path, allow_unverified=True)) == 6


def test_an_unverified_complete_store_is_refused_and_opens_if_allowed(folder):
    (folder.path / "verification.json").unlink()
    for allowed in ({}, {"allow_incomplete": True}):
        with pytest.raises(VerificationError, match="no sample of it was computed again alone"):
            ActivationStore(folder.path, **allowed)
    assert len(ActivationStore(folder.path, allow_unverified=True)) == 6


def test_an_incomplete_store_needs_no_verdict_but_a_failed_one_refuses_it(tmp_path):
    folder = make_store(tmp_path / "run", INDEX, LENGTHS, leave_out=[1])
    (folder.path / "verification.json").unlink()
    assert len(ActivationStore(folder.path, allow_incomplete=True)) == 4
    with pytest.raises(IncompleteStoreError):
        ActivationStore(folder.path, allow_unverified=True)
    write_verification(folder, verdict(folder.read_info().fingerprint, **FAILED))
    with pytest.raises(VerificationError, match="sample 5"):
        ActivationStore(folder.path, allow_incomplete=True)
    assert len(ActivationStore(folder.path, allow_incomplete=True, allow_unverified=True)) == 4


def test_overwriting_a_run_removes_its_verdict_and_going_on_with_it_does_not(folder):
    order = [0] * len(INDEX), list(range(len(INDEX)))
    samples = folder.read_samples()
    folder.prepare(run_info(3, LENGTHS), [samples], overwrite=False, allow_changed=frozenset())
    assert (folder.path / "verification.json").exists()
    folder.prepare(run_info(1, LENGTHS), [sample_table(INDEX, LENGTHS, *order)], overwrite=True, allow_changed=frozenset())
    assert not (folder.path / "verification.json").exists()
    assert isinstance(samples, pa.Table)


@given(n=st.integers(1, 20))
def test_a_refusal_shows_five_failures_and_counts_the_rest(n):
    failures = [f"sample {i} is wrong" for i in range(n)]
    failed = verdict("mine", passed=False, failures=failures, n_failures=n)
    with pytest.raises(VerificationError) as error:
        refuse_failed(RunFolder("somewhere"), failed)
    message = str(error.value)
    assert [failure in message.splitlines()[i + 1] for i, failure in enumerate(failures[:5])] == [True] * min(n, 5)
    assert (f"and {n - 5} more" in message) == (n > 5)
    assert "--overwrite" in message and "exactivations verify somewhere" in message
    refuse_failed(RunFolder("somewhere"), verdict("mine"))


@pytest.mark.parametrize(("drawn", "at_random"), [(2, 1), (10, 5), (16, 11), (300, 295)])
def test_the_share_that_can_hide_is_what_a_binomial_test_says(drawn, at_random):
    """scipy's exact interval: no wrong one among so many, one-sided, 95%."""
    share = verdict("run", samples=list(range(drawn))).largest_hidden_share(10**6)
    assert share == pytest.approx(binomtest(0, at_random, alternative="less").proportion_ci(0.95, "exact").high, abs=1e-12)


def test_no_share_can_hide_where_every_sample_was_computed_again():
    assert verdict("run", samples=[0, 1, 2]).largest_hidden_share(3) == 0
    assert verdict("run", samples=[0]).largest_hidden_share(2) == 1  # one that was not drawn at random says nothing of the other


def test_no_more_samples_are_drawn_for_being_extreme_than_the_verdict_allows_for():
    lengths = np.array([9, 8, 8, 7, 5, 4, 4, 3, 2, 1] * 4)
    planned = plan(lengths, PlanOptions(token_budget=16, padding="tail", max_padded_share=0.5))
    assert len(draw._extremes(planned, np.arange(len(lengths)))) <= MOST_EXTREMES
