"""verify-alignment and import-masks, called as the command line calls them."""

import re

import pytest

from exactivations.scripts import main as command_line
from exactivations.scripts.import_masks import import_masks
from exactivations.scripts.verify_alignment import verify_alignment
from exactivations.store import ActivationStore
from exactivations.store.errors import InvalidInputError, StoreError
from exactivations.store.masks import read_masks
from tests.store.mask_folders import POOLED, foreign, store_of
from tests.store.stores import WIDTHS, mask_of

LENGTHS = [3, 5, 1, 4, 2, 5, 7]


@pytest.fixture
def run(tmp_path):
    return str(store_of(tmp_path / "run", LENGTHS))


@pytest.fixture
def commands(monkeypatch):
    added = {"verify-alignment": verify_alignment, "import-masks": import_masks}
    monkeypatch.setattr(command_line, "COMMANDS", command_line.COMMANDS | added)


def test_import_then_read_gives_each_sample_its_mask(run, tmp_path, capsys, commands):
    masks, out = str(foreign(tmp_path / "masks", LENGTHS, [3, 3, 1], side="left")), str(tmp_path / "masks.parquet")
    command_line.main(["import-masks", masks, "--store", run, "--out", out])
    told = capsys.readouterr().out
    assert "7 masks from 3 batches, padded on the left, by sample index" in told
    assert "all of them are their samples' own, by token hash" in told
    found = read_masks(out, ActivationStore(run, allow_unverified=True))
    assert [found[i].tolist() for i in range(7)] == [mask_of(i, n) for i, n in enumerate(LENGTHS)]


def test_an_import_without_ids_says_that_only_lengths_were_checked(run, tmp_path, capsys):
    masks = foreign(tmp_path / "masks", LENGTHS, [7], with_ids=False, masks=[[True] * n for n in LENGTHS])
    import_masks(str(masks), store=run, out=str(tmp_path / "masks.parquet"))
    assert "only their lengths were checked" in capsys.readouterr().out
    assert not read_masks(tmp_path / "masks.parquet", ActivationStore(run, allow_unverified=True)).hash_checked.any()


@pytest.mark.parametrize(
    ("lengths", "samples", "message"),
    [
        (LENGTHS[:-1], None, "there are 6 masks, expected 7: the store has 7 samples"),
        ([*LENGTHS, 2], None, "there are 8 masks, expected 7: .* pass --more-rows"),
        (LENGTHS, [0, 1, 2, 3, 4, 5, 9], r"sample 6: token_mask belongs to other tokens \(token hash differs\)"),
        ([*LENGTHS[:-1], 6], None, r"sample 6: token_mask has 6 positions, activations have 7; it belongs to other tokens"),
    ],
)
def test_an_import_that_does_not_fit_is_refused_and_writes_nothing(run, tmp_path, lengths, samples, message):
    masks = foreign(tmp_path / "masks", lengths, [2] * (len(lengths) // 2) + [1] * (len(lengths) % 2), samples=samples)
    with pytest.raises(InvalidInputError, match=message):
        import_masks(str(masks), store=run, out=str(tmp_path / "masks.parquet"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks", "run"]


def test_more_rows_are_imported_if_the_user_says_so(run, tmp_path):
    masks = str(foreign(tmp_path / "masks", [*LENGTHS, 2], [4, 4]))
    import_masks(masks, store=run, out=str(tmp_path / "masks.parquet"), more_rows=True)
    assert len(read_masks(tmp_path / "masks.parquet", ActivationStore(run, allow_unverified=True))) == 7


def test_a_file_is_not_replaced_unless_asked_for_and_a_store_is_no_folder_of_masks(run, tmp_path):
    masks, out = str(foreign(tmp_path / "masks", LENGTHS, [7])), str(tmp_path / "masks.parquet")
    import_masks(masks, store=run, out=out)
    with pytest.raises(InvalidInputError, match="is there already: name another file, or pass --overwrite"):
        import_masks(masks, store=run, out=out)
    import_masks(masks, store=run, out=out, overwrite=True)
    with pytest.raises(InvalidInputError, match="is a store, which keeps its masks by sample index already"):
        import_masks(run, store=run, out=str(tmp_path / "other.parquet"))
    with pytest.raises(StoreError, match="cannot write"):
        import_masks(masks, store=run, out=str(tmp_path / "gone" / "masks.parquet"))


def test_verify_alignment_prints_and_fails_only_if_something_is_misaligned_by_sample(run, tmp_path, capsys, commands):
    masks = foreign(tmp_path / "masks", LENGTHS, [3, 3, 1])
    command_line.main(["verify-alignment", run, str(masks)])
    told = capsys.readouterr().out
    assert "WRONG   divided by 64: 4 of 7" in told and "every mask is its sample's own" in told
    swapped = foreign(tmp_path / "swapped", [5, 3, *LENGTHS[2:]], [3, 3, 1], samples=[1, 0, 2, 3, 4, 5, 6])
    with pytest.raises(SystemExit) as stop:
        command_line.main(["verify-alignment", run, str(swapped), "--divisor", "3", "--batch-size", "2"])
    assert stop.value.code == 1
    told = capsys.readouterr()
    assert "another order: 2 of 7 are not in their place" in told.out
    assert f"{swapped} is not aligned with {run}: by token hash" in told.err
    command_line.main(["verify-alignment", run, run])


LONG = [12, 9, 15, 10]


@pytest.mark.parametrize(
    ("names", "masks", "message"),
    [
        (POOLED, [[True] * 5 + [False] * 10] * 4, "sample 0: token_mask is a padding mask of 5 tokens, activations have 12; laid"),
        (WIDTHS, [[True] * 5 + [False] * 10] * 4, "sample 0: token_mask is a padding mask of 5 tokens, activations have 12; laid"),
        (
            POOLED,
            [[True] * 12, [True] * 9, [False] * 15, [True] * 10],
            "sample 2: token_mask marks nothing: none of its sample's 15",
        ),
        (
            WIDTHS,
            [[k != 4 for k in range(n)] for n in LONG],
            r"no mask marks the tokens that the store's own token_mask does \(0 of 4\)",
        ),
    ],
)
def test_masks_of_the_right_shape_that_cannot_be_right_are_refused_by_both_commands(
    tmp_path, capsys, commands, names, masks, message
):
    run, out = str(store_of(tmp_path / "run", LONG, names=names)), tmp_path / "masks.parquet"
    folder = str(foreign(tmp_path / "masks", LONG, [4], masks=masks, with_ids=False))
    for arguments in (["verify-alignment", run, folder], ["import-masks", folder, "--store", run, "--out", str(out)]):
        with pytest.raises(SystemExit) as stop:
            command_line.main(arguments)
        assert stop.value.code == 1 and re.search(message, capsys.readouterr().err)
    assert not out.exists()


def test_what_cannot_be_told_is_said_by_both_commands_and_decides_nothing(tmp_path, capsys, commands):
    run, out = str(store_of(tmp_path / "run", LONG, names=POOLED)), tmp_path / "masks.parquet"
    masks = [[True] * (n - 1) + [False] for n in LONG]
    folder = str(foreign(tmp_path / "masks", LONG, [4], masks=masks, with_ids=False))
    for arguments in (["verify-alignment", run, folder], ["import-masks", folder, "--store", run, "--out", str(out)]):
        command_line.main(arguments)
        told = " ".join(capsys.readouterr().out.split())
        assert "4 of 4 masks leave out tokens at the end where padding is: all leave out 1" in told
        assert "not counted as a fault" in told and "warning" in told.lower()
    assert out.exists()


def test_the_help_has_a_line_for_every_option(capsys, commands):
    for command in ("verify-alignment", "import-masks"):
        with pytest.raises(SystemExit):
            command_line.main([command, "--help"])
        told = capsys.readouterr().out
        for option in ("--mask-name", "--padding-side", "--rows", "--more-rows"):
            assert option in told
