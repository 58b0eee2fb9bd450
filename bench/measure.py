"""Reads what a process tree has used: CPU nanoseconds, memory; and what machine this is."""

import os
import platform
from collections.abc import Iterable, Iterator
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
    return sum(used for used, _ in threads(process_tree(pid)).values())


Threads = dict[int, tuple[int, int]]
"""By thread: nanoseconds it ran, and nanoseconds it was ready to run and had no core."""


def threads(processes: Iterable[int]) -> Threads:
    """All threads of these processes, as they are now."""
    found: Threads = {}
    for member in processes:
        for task in Path(f"/proc/{member}/task").glob("*/schedstat"):
            try:
                used, waited, _ = task.read_text().split()
            except OSError:
                continue  # the thread ended while we looked
            found[int(task.parent.name)] = int(used), int(waited)
    return found


def kept_waiting_ns(before: Threads, after: Threads) -> int:
    """How long the busiest of these threads waited for its core, because of other processes.

    They share that core: what the others of them used is taken off.
    """
    used = {each: ran - before.get(each, (0, 0))[0] for each, (ran, _) in after.items()}
    if not used:
        return 0
    busiest = max(used, key=lambda each: used[each])
    waited = after[busiest][1] - before.get(busiest, (0, 0))[1]
    return max(0, waited - (sum(used.values()) - used[busiest]))


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
