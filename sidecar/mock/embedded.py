"""The embedded provider on a private unix socket: what `base_url: "mock:"` means."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from sidecar.mock.provider import MockProvider


class EmbeddedProvider:
    """Starts once, on first use; the data path to it is a real socket."""

    def __init__(self) -> None:
        self.provider = MockProvider(keep_requests=0)
        self._directory: str | None = None
        self._path = ""

    async def start(self) -> str:
        """The path of its socket, in a directory that only we can enter."""
        if self._directory is None:
            self._directory = tempfile.mkdtemp(prefix="sidecar-mock-")
            self._path = str(Path(self._directory) / "provider.sock")
            await self.provider.start(unix_path=self._path)
        return self._path

    async def close(self) -> None:
        await self.provider.stop()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
