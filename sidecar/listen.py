"""Addresses to listen on: what stands in the way, and how to say it."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any


def remove_stale_socket(path: Path) -> None:
    """Remove a socket file that nobody listens on; anything else stays and raises OSError."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise OSError(f"{path} exists and is no socket: remove it or choose another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its queue is full: somebody listens
    raise OSError(f"{path} is in use by another process")


def why_not(error: OSError) -> str:
    """The reason of a failed listen in the system's words, without the address it repeats."""
    if error.errno is None or isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    return os.strerror(error.errno)


def shown_address(name: tuple[Any, ...]) -> str:
    """`host:port` of a TCP socket's name, an IPv6 host in brackets."""
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
