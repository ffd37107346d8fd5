"""What all tests share: a home of their own, no network, and the sparse model."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CACHE = Path(__file__).parent.parent / ".cache"

os.environ["HF_HUB_OFFLINE"] = "1"
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # what runs in the background inherits a Ctrl-C that is ignored
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the program does, before torch is loaded


@pytest.fixture(scope="session", autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's files, meets the user's settings or leaves this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        for name in os.environ.keys() & {"XDG_CACHE_HOME", "XDG_CONFIG_HOME"}:
            patch.delenv(name)
        for name in [n for n in os.environ if n.startswith("POWERINFER_") and n != "POWERINFER_LIB"]:
            patch.delenv(name)
        patch.setattr(socket.socket, "connect", _local_only(socket.socket.connect))
        yield


def _local_only(connect: Callable[[socket.socket, Any], None]) -> Callable[[socket.socket, Any], None]:
    def connect_locally(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test connects to {address}")
        connect(self, address)

    return connect_locally


@pytest.fixture(scope="session")
def sparse_model() -> Path:
    """Folder of the really sparse ReLU model; trained in a minute or two when it is first needed, then cached."""
    from tests.sparse_model import cached

    CACHE.mkdir(exist_ok=True)
    with exclusive(CACHE / "sparse-model.lock"):
        return cached(CACHE)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Waits until no other process holds the file `path`."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
