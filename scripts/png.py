"""Pictures as PNG files that are there whole or not at all; the same figure gives the same bytes."""

from pathlib import Path

from matplotlib.figure import Figure

from exactivations.store.errors import InvalidInputError, StoreError
from exactivations.store.shard import publishing


def png_path(path: str | Path) -> Path:
    """Returns the path of a picture.

    Raises:
        InvalidInputError: If it does not end in .png.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise InvalidInputError(f"pictures are drawn as PNG: {path} must end in .png")
    return path


def write_png(figure: Figure, path: Path) -> None:
    """Writes a figure; a file that is there is replaced.

    Raises:
        StoreError: If it cannot be written.
    """
    try:
        with publishing(path) as temporary:
            # Without a name of its own, the software would write its version into the file.
            figure.savefig(temporary, format="png", backend="agg", metadata={"Software": None})
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}; see that its folder is there and has room, and draw it again") from error
