"""Two heat maps: a PNG that opens, on one scale, the same bytes every time; nothing of pyplot is touched."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from exactivations.scripts.heat_map import LONGEST_LABEL, MOST_LABELS, heat_maps
from exactivations.store.errors import InvalidInputError, StoreError
from exactivations.store.similarity import pairwise_cosine

TITLES = ("as they are", "minus the mean")


def pair(n, seed=0):
    """Cosines of rows that share a direction, and of the same rows without it."""
    rows = torch.from_numpy(np.random.default_rng(seed).normal(1, 1, (n, 16)))
    return pairwise_cosine(rows), pairwise_cosine(rows - rows.mean(0))


def is_colour(pixels, rgb):
    return (np.abs(pixels.astype(int) - np.array(rgb)) <= 3).all(axis=2)


@pytest.mark.parametrize("n", [2, 8, MOST_LABELS, MOST_LABELS + 1, 300])
def test_it_is_a_picture_of_a_sensible_size(tmp_path, n):
    heat_maps(*pair(n), tmp_path / "x.png", titles=TITLES)
    with Image.open(tmp_path / "x.png") as image:
        image.load()
        width, height = image.size
    assert image.format == "PNG"
    assert 800 < width < 3000 and 400 < height < 2000 and 1.4 < width / height < 2.4


@pytest.mark.parametrize("labels", [None, ["a", "b$", "c$^", "d_{", "\N{GREEK SMALL LETTER ALPHA}\n\tb"]])
def test_the_same_matrices_give_the_same_bytes(tmp_path, labels):
    for name in ("a.png", "b.png"):
        heat_maps(*pair(5), tmp_path / name, titles=TITLES, labels=labels)
    first = (tmp_path / "a.png").read_bytes()
    assert first == (tmp_path / "b.png").read_bytes()
    assert b"Software" not in first and b"Creation" not in first and b"tEXt" not in first
    heat_maps(*pair(5, seed=1), tmp_path / "c.png", titles=TITLES, labels=labels)
    assert (tmp_path / "c.png").read_bytes() != first


def test_both_are_on_the_scale_from_minus_one_to_one(tmp_path):
    """Of a matrix of 0 alone nothing but the scale can tell which colour it is; white is also the page, so 1 and -1 are counted."""
    n = 4
    heat_maps(torch.ones(n, n), -torch.ones(n, n), tmp_path / "x.png", titles=TITLES)
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    ends = [np.array(matplotlib.colormaps["RdBu_r"](end)[:3]) * 255 for end in (1.0, 0.0)]
    middle = pixels.shape[1] // 2
    left = [is_colour(pixels[:, : middle - 60], end).sum() for end in ends]
    right = [is_colour(pixels[:, middle + 60 :], end).sum() for end in ends]
    assert left[0] > 50_000 and left[1] == 0
    assert right[1] > 50_000 and right[0] < 2_000  # the colour bar holds a little of either


@pytest.mark.parametrize("n", [6, 40])
def test_drawing_touches_no_state_of_pyplot(tmp_path, n):
    code = (
        "import sys, torch, matplotlib; before = matplotlib.rcParams.copy()\n"
        "from exactivations.scripts.heat_map import heat_maps\n"
        f"heat_maps(torch.eye({n}), torch.eye({n}), {str(tmp_path / 'x.png')!r}, titles=('a', 'b'))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert list(before.items()) == list(matplotlib.rcParams.copy().items())\n"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""


def test_long_labels_leave_the_maps_their_room(tmp_path):
    sizes = []
    for length in (LONGEST_LABEL, 500):
        heat_maps(*pair(9), tmp_path / "x.png", titles=TITLES, labels=["x" * length] * 9)
        sizes.append(Image.open(tmp_path / "x.png").size)
    assert sizes[0] == sizes[1]


def test_what_is_no_pair_of_cosines_is_refused(tmp_path):
    before, after = pair(4)
    path = tmp_path / "x.png"
    with pytest.raises(InvalidInputError, match=r"the same rows: got shapes \[4, 4\] and \[3, 3\]"):
        heat_maps(before, after[:3, :3], path, titles=TITLES)
    with pytest.raises(InvalidInputError, match="and 3 labels"):
        heat_maps(before, after, path, titles=TITLES, labels=["a", "b", "c"])
    with pytest.raises(InvalidInputError, match=r"n at least 2"):
        heat_maps(before[:1, :1], after[:1, :1], path, titles=TITLES)
    for value in (1.5, float("nan")):
        wrong = after.clone()
        wrong[1, 2] = value
        with pytest.raises(InvalidInputError, match="'minus the mean' is no matrix of cosines"):
            heat_maps(before, wrong, path, titles=TITLES)
    with pytest.raises(InvalidInputError, match=r"must end in \.png"):
        heat_maps(before, after, tmp_path / "x.pdf", titles=TITLES)
    with pytest.raises(StoreError, match="cannot write"):
        heat_maps(before, after, tmp_path / "nowhere" / "x.png", titles=TITLES)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_text("mine")

    def no_room(temporary, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("exactivations.store.shard.publish", no_room)
    with pytest.raises(StoreError, match="No space left"):
        heat_maps(*pair(3), path, titles=TITLES)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]
