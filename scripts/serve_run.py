"""Around the app: what it needs to be installed, its key, its address, and uvicorn, which runs it."""

import contextlib
import importlib.util
import os
import signal
import socket
from pathlib import Path
from typing import Any

from exactivations.store.errors import InvalidInputError

LIBRARIES = ("fastapi", "uvicorn", "prometheus_client")
KEY_VARIABLE = "EXACTIVATIONS_API_KEY"


def checked_libraries() -> None:
    """Refuses to go on without what only a server needs.

    Raises:
        InvalidInputError: Saying what to install.
    """
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInputError(
            f"serving needs {', '.join(missing)}: install exactivations with its extra, pip install '.[serve]' in the clone"
        )


def api_key_from(file: str | None) -> str | None:
    """Returns the API key, from the file's first line or the environment; None if there is none.

    Raises:
        InvalidInputError: If the file cannot be read, or the key is empty.
    """
    if file is None:
        key = os.environ.get(KEY_VARIABLE)
        key = None if key is None else key.strip()  # as what is presented is
        source = f"the environment's {KEY_VARIABLE}"
    else:
        source = file
        try:
            key = Path(file).read_text().partition("\n")[0].strip()
        except OSError as error:
            raise InvalidInputError(f"the API key cannot be read: {error}") from error
    if key is not None and not key:
        raise InvalidInputError(f"the API key in {source} is empty: expected one, or none at all")
    return key


def listening(host: str, port: int) -> socket.socket:
    """Returns a socket that listens, before anything is loaded.

    Raises:
        InvalidInputError: If the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InvalidInputError(
            f"cannot listen on {address(host, port)}: {error.strerror}; give another --port, or 0 for a free one"
        ) from error


def address(host: str, port: int) -> str:
    """Returns both as they stand in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def run(app: Any, listener: socket.socket, grace_seconds: int) -> None:
    """Serves until Ctrl-C or SIGTERM. Then nothing new is accepted, and what is under way has grace_seconds to be completed."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=grace_seconds)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it has ended in order
        uvicorn.Server(config).run(sockets=[listener])
    print("the server has ended", flush=True)
