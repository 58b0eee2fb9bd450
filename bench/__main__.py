"""`python -m bench`: starts every proxy, measures side by side, prints and writes the report.

A whole run writes bench/RESULTS.md. One that is quick or partial only prints, unless --output
names a file, so that it cannot replace the published figures. The exit status is 0 when the
measurement ran: figures are figures, not a test.
"""

import argparse
import asyncio
import gc
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import uvloop

from bench import economy, figures, measure, report, signing
from bench.figures import QUICK, Plan, Results, tell
from bench.load import RunFailed
from bench.proxies import BENCH_CORE, PROXIES, Lane, Missing, pin_to_core

RESULTS_PAGE = Path(__file__).parent / "RESULTS.md"
FIGURES = {
    "calls": figures.calls,
    "chunks": figures.chunks,
    "rate": figures.rate,
    "latency": figures.latency,
    "slow-chunks": figures.slow_chunks,
    "leave": figures.leave,
    "bodies": figures.bodies,
    "memory": figures.memory,
    "start": figures.start,
    "scale": figures.scale,
    "limits": figures.limits,
    "cache": economy.cache,
    "economy": economy.economy,
    "streams": figures.streams,
    "signing": signing.signing,
}
WITHOUT_ROWS = {"scale", "limits", "cache", "economy", "signing"}
"""Figures of proxies of their own, or of none."""


def _names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
        return names

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description="Measures the sidecar's cost.")
    every_proxy = [proxy.name for proxy in PROXIES]
    parser.add_argument("--quick", action="store_true", help="a minute; fewer and smaller rounds")
    parser.add_argument(
        "--only", type=_names(list(FIGURES)), metavar="FIGURE,…", help="some figures"
    )
    parser.add_argument("--proxies", type=_names(every_proxy), metavar="NAME,…", help="some rows")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the report goes")
    parser.add_argument(
        "--first", action="store_true", help="go before other work of the machine (root only)"
    )
    options = parser.parse_args()

    output: Path | None = options.output
    if output is None and not (options.quick or options.only or options.proxies):
        output = RESULTS_PAGE
    if options.first:
        os.setpriority(os.PRIO_PROCESS, 0, -15)  # the proxies inherit it
    words = ["python -m bench", *(["--quick"] if options.quick else [])]
    words += [f"--only {','.join(options.only)}"] if options.only else []
    words += [f"--proxies {','.join(options.proxies)}"] if options.proxies else []

    words += ["--first"] if options.first else []

    proxies = ["sidecar-default"] if {*(options.only or FIGURES)} <= WITHOUT_ROWS else every_proxy
    try:
        text = uvloop.run(
            run(
                plan=QUICK if options.quick else Plan(),
                wanted_figures=options.only or list(FIGURES),
                wanted_proxies=options.proxies or proxies,
                command=" ".join(words),
            )
        )
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise SystemExit("stopped before the end; nothing was written") from None
    tell("\n" + text)
    if output is not None:
        output.write_text(text)
        tell(f"written to {output}")


async def run(
    plan: Plan, wanted_figures: Sequence[str], wanted_proxies: Sequence[str], command: str
) -> str:
    """Measures what is wanted and returns the report."""
    this_task = asyncio.current_task()
    assert this_task is not None
    # Ends like Ctrl-C, so that the proxies are stopped.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this_task.cancel)
    machine = measure.machine()
    began = perf_counter()
    pin_to_core(BENCH_CORE)
    _, open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_files = min(open_files, 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))

    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        results = Results(folder, plan.repeat_s)
        versions = [(package, version(package)) for package in ("aiohttp", "uvloop")]
        lanes: list[Lane] = []
        try:
            await _start_lanes(lanes, results, wanted_proxies, versions)
            gc.collect()
            gc.disable()  # a collection in the load generator is no property of a proxy
            for figure in wanted_figures:
                tell(f"{figure}  ({perf_counter() - began:.0f} s)")
                await FIGURES[figure](lanes, plan, results)
        finally:
            for lane in lanes:
                await lane.stop()
    tell(f"done  ({perf_counter() - began:.0f} s)")
    return report.page(
        results,
        [lane.proxy for lane in lanes],
        plan,
        when=datetime.now(UTC).strftime("%Y-%m-%d"),
        machine=machine,
        versions=versions,
        command=command,
    )


async def _start_lanes(
    lanes: list[Lane], results: Results, wanted: Sequence[str], versions: list[tuple[str, str]]
) -> None:
    """Starts the wanted proxies; one that cannot run leaves a note, and the others go on."""
    for proxy in PROXIES:
        if proxy.name not in wanted:
            continue
        try:
            found = proxy.prepare()
            lane = Lane(proxy, results.folder / proxy.name)
            await lane.start()
        except (Missing, RunFailed) as error:
            results.note(f"no figures for {proxy.title}: {error}")
            continue
        tell(f"started {proxy.title} ({found})")
        lanes.append(lane)
        name = {"plain": "Python", "nginx": "nginx", "envoy": "Envoy"}.get(proxy.name)
        if name:
            versions.append((name, found))


if __name__ == "__main__":
    main()
