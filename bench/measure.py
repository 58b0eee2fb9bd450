"""Reads what a process tree has used: CPU nanoseconds, memory; and what machine this is."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path


def process_tree(pid: int) -> list[int]:
    """`pid` and all its living descendants."""
    found = [pid]
    for known in found:
        found += _children(known)
    return found


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            yield from (int(word) for word in task.read_text().split())
        except OSError:
            continue  # the thread ended while we looked


def cpu_ns(pid: int) -> int:
    """User and system time of every thread of the tree, in nanoseconds.

    This is the scheduler's own account; utime and stime in /proc/PID/stat count ticks of 10 ms.
    A thread that has ended is missing, so compare only within one run.
    """
    return _schedstat_ns(pid, 0)


def waited_ns(pid: int) -> int:
    """How long threads of the tree were ready to run and had no core, in nanoseconds."""
    return _schedstat_ns(pid, 1)


def _schedstat_ns(pid: int, column: int) -> int:
    total = 0
    for member in process_tree(pid):
        for task in Path(f"/proc/{member}/task").glob("*/schedstat"):
            try:
                total += int(task.read_text().split()[column])
            except OSError:
                continue  # the thread ended while we looked
    return total


def memory_bytes(pid: int, kind: str) -> int:
    """Memory of the tree; `kind` is `Pss` (shared pages divided) or `Rss`."""
    total = 0
    for member in process_tree(pid):
        for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
            if line.startswith(kind + ":"):
                total += int(line.split()[1]) * 1024
    return total


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def machine() -> str:
    """One line: processor, cores, kernel, how busy the machine was."""
    busy = os.getloadavg()[0]
    return (
        f"{cpu_model()}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"load average {busy:.2f} at the start"
    )
