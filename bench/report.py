"""Turns results into the page that is printed and written: tables, ratios, targets, remarks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.economy import CACHE_ROWS, ECONOMY_ROWS
from bench.figures import BODY_SIZES, DISTURBED_SHARE, Plan, Results
from bench.proxies import LIMITS, Proxy
from bench.signing import SETTINGS


@dataclass(frozen=True)
class Figure:
    """One line of the main table: a key in the results, and how to show it."""

    key: str
    title: str
    form: str  # of the value times `factor`
    factor: float = 1.0
    has_ratio: bool = False


FIGURES = (
    Figure("call_us", "CPU µs a call, busy (closed loop)", "{:.1f}", has_ratio=True),
    Figure("slow_call_us", "CPU µs a call at 1,000 calls/s", "{:.1f}", has_ratio=True),
    Figure("chunk_us", "CPU µs an SSE chunk, busy", "{:.1f}", has_ratio=True),
    Figure("slow_chunk_us", "CPU µs an SSE chunk at 1,000/s", "{:.1f}", has_ratio=True),
    Figure("reads_per_chunk", "client reads a chunk", "{:.3f}"),
    Figure("stream_bytes", "kB an open idle stream (PSS)", "{:.1f}", 1e-3, has_ratio=True),
    Figure("p50_ms", "time to first byte, p50 added ms", "{:.3f}"),
    Figure("p99_ms", "time to first byte, p99 added ms", "{:.3f}"),
    Figure("calls_per_s", "calls/s, 64 connections", "{:,.0f}"),
    Figure("busy", "proxy core busy meanwhile, %", "{:.0f}", 100.0),
    Figure("ready_ms", "start to ready, ms", "{:.0f}"),
    Figure("idle_rss_bytes", "idle RSS, MB", "{:.0f}", 1e-6),
    Figure("leave_p50_ms", "client leaves → upstream closed, p50 ms", "{:.3f}"),
    Figure("leave_p99_ms", "… p99 ms", "{:.3f}"),
    Figure("leave_max_ms", "… max ms", "{:.3f}"),
    Figure("streams_open", "streams open at once", "{:,.0f}"),
    Figure("streams_complete", "… complete", "{:,.0f}"),
    Figure("streams_lost_bytes", "… bytes lost", "{:,.0f}"),
    Figure("streams_wall_s", "… wall s", "{:.1f}"),
    Figure("streams_cpu_s", "… CPU s", "{:.1f}"),
)


@dataclass(frozen=True)
class Target:
    """A promise: `proxy`'s `figure` is at most `limit` (times Envoy's, if `is_ratio`), or at least
    (if `is_floor`)."""

    title: str
    proxy: str
    figure: str
    limit: float
    unit: str
    is_ratio: bool = False
    is_floor: bool = False
    factor: float = 1.0


def _against_envoy(title: str, proxy: str, figure: str, limit: float) -> Target:
    return Target(title, proxy, figure, limit, "× Envoy", is_ratio=True)


TARGETS = (
    _against_envoy("a call, empty chain, busy", "sidecar-empty", "call_us", 0.9),
    _against_envoy("a call, empty chain, at 1,000/s", "sidecar-empty", "slow_call_us", 0.9),
    _against_envoy("a chunk, empty chain, busy", "sidecar-empty", "chunk_us", 0.8),
    _against_envoy("a chunk, empty chain, at 1,000/s", "sidecar-empty", "slow_chunk_us", 0.8),
    _against_envoy("a call, default chain, busy", "sidecar-default", "call_us", 1.2),
    _against_envoy("a call, default chain, at 1,000/s", "sidecar-default", "slow_call_us", 1.2),
    _against_envoy("a chunk, default chain, busy", "sidecar-default", "chunk_us", 0.9),
    _against_envoy("a chunk, default chain, at 1,000/s", "sidecar-default", "slow_chunk_us", 0.9),
    _against_envoy("an open stream, default chain", "sidecar-default", "stream_bytes", 0.5),
    Target("added p50 to first byte at 1,000 calls/s", "sidecar-default", "p50_ms", 0.3, "ms"),
    Target("added p99 to first byte at 1,000 calls/s", "sidecar-default", "p99_ms", 1.5, "ms"),
    Target("start to ready", "sidecar-default", "ready_ms", 0.5, "s", factor=1e-3),
    Target("idle RSS", "sidecar-default", "idle_rss_bytes", 60.0, "MB", factor=1e-6),
    Target("client leaves → upstream closed, max", "sidecar-default", "leave_max_ms", 5.0, "ms"),
    Target(
        "retry, circuit, limits and queue together, a call",
        "limits-all",
        "limits_added_us",
        25.0,
        "µs",
    ),
    Target(
        "a hit in memory, calls/s per core",
        "cache-hit",
        "hit_against_mock",
        2.0,
        "× a pass-through to the mock",
        is_floor=True,
    ),
    Target(
        "a hit in memory, calls/s per core",
        "cache-hit",
        "hit_against_litellm",
        20.0,
        "× LiteLLM's hit",
        is_floor=True,
    ),
    Target("signing an attempt, dearest HMAC scheme", "signing", "sign_us", 60.0, "µs"),
    Target("bytes lost on many open streams", "sidecar-default", "streams_lost_bytes", 0.0, "B"),
)


def page(
    results: Results,
    rows: Sequence[Proxy],
    plan: Plan,
    *,
    when: str,
    machine: str,
    versions: Sequence[tuple[str, str]],
    command: str,
) -> str:
    """The whole report, as Markdown."""
    shown = ", ".join(f"{name} {version}" for name, version in versions)
    parts = [
        "# What the sidecar costs, measured",
        f"Written by `{command}` on {when}; how it measures is in [README.md](README.md).",
        f"- Machine: {machine}\n- Versions: {shown}\n- One core for the proxy, one for the clients"
        " and the upstream. Medians of interleaved rounds.",
    ]
    main = _main_table(results, rows)
    if main:
        parts.append("## Side by side\n\n" + main)
    if results.get("direct", "p50_ms") is not None:
        parts.append("Direct's times to first byte are its own, the others' are added to them.")
    ratios = _ratio_table(results, rows)
    if ratios:
        parts.append("## Against Envoy in the same run\n\n" + ratios)
    if any(results.get(target.proxy, target.figure) is not None for target in TARGETS):
        parts.append("## Targets\n\n" + _target_table(results))
    for title, table in (
        ("## Body size: CPU µs a KB", _body_table(results, rows)),
        ("## Many models, many teams: CPU µs a call", _scale_table(results, plan)),
        ("## Resilience and limits: CPU µs a call, busy", _limits_table(results)),
        ("## Cache: what a hit saves, busy", _cache_table(results)),
        ("## Accounting, costs, budgets and cache: CPU µs a call, busy", _economy_table(results)),
        ("## Signing an attempt with a body of 1 KB", _signing_table(results)),
    ):
        if table:
            parts.append(f"{title}\n\n{table}")
    remarks = list(results.notes)
    if results.disturbed:
        remarks.append(
            "measured while other work of the machine had the core for more than "
            f"{DISTURBED_SHARE:.0%} of the time, so less sure: {', '.join(results.disturbed)}"
        )
    if remarks:
        parts.append("## Remarks\n\n" + "\n".join(f"- {remark}" for remark in remarks))
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def _cells(rows: Sequence[Proxy], show: Callable[[Proxy], str | None]) -> list[str]:
    return [show(row) or "–" for row in rows]


def _main_table(results: Results, rows: Sequence[Proxy]) -> str:
    lines = []
    for figure in FIGURES:

        def show(row: Proxy, figure: Figure = figure) -> str | None:
            value = results.get(row.name, figure.key)
            return None if value is None else figure.form.format(value * figure.factor)

        cells = _cells(rows, show)
        if any(cell != "–" for cell in cells):
            lines.append([figure.title, *cells])
    return _table(["", *(row.title for row in rows)], lines) if lines else ""


def _ratio(results: Results, proxy: str, figure: str) -> float | None:
    own, envoy = results.get(proxy, figure), results.get("envoy", figure)
    return own / envoy if own is not None and envoy else None


def _ratio_table(results: Results, rows: Sequence[Proxy]) -> str:
    lines = []
    for figure in FIGURES:

        def show(row: Proxy, figure: Figure = figure) -> str | None:
            ratio = _ratio(results, row.name, figure.key)
            return None if ratio is None else f"{ratio:.2f}×"

        cells = _cells(rows, show)
        if figure.has_ratio and any(cell != "–" for cell in cells):
            lines.append([figure.title, *cells])
    return _table(["", *(row.title for row in rows)], lines) if lines else ""


def _target_table(results: Results) -> str:
    lines = []
    for target in TARGETS:
        if target.is_ratio:
            value = _ratio(results, target.proxy, target.figure)
        else:
            value = results.get(target.proxy, target.figure)
        limit = f"{'≥' if target.is_floor else '≤'} {target.limit:g} {target.unit}"
        if value is None:
            lines.append([target.title, limit, "not measured", "–"])
            continue
        value *= target.factor
        is_met = value >= target.limit if target.is_floor else value <= target.limit
        met = "yes" if is_met else "**no**"
        lines.append([target.title, limit, f"{value:.3g} {target.unit}", met])
    complete = results.get("sidecar-default", "streams_complete")
    size = results.get("sidecar-default", "streams_open")
    if complete is not None and size is not None:
        met = "yes" if complete == size else "**no**"
        lines.append(
            ["streams open at once, all complete", f"{size:,.0f}", f"{complete:,.0f}", met]
        )
    return _table(["", "target", "measured", "met"], lines)


def _body_table(results: Results, rows: Sequence[Proxy]) -> str:
    lines = []
    for way in ("answer", "request"):
        for size, _, _ in BODY_SIZES:
            key = f"{way}_{size // 1024}_kb"

            def show(row: Proxy, key: str = key) -> str | None:
                value = results.get(row.name, key)
                return None if value is None else f"{value:.3f}"

            cells = _cells(rows, show)
            if any(cell != "–" for cell in cells):
                lines.append([f"{way} of {size // 1024:,} KB", *cells])
    return _table(["", *(row.title for row in rows)], lines) if lines else ""


def _scale_table(results: Results, plan: Plan) -> str:
    lines = []
    for models, teams in ((1, 0), (plan.scale_count, 0), (1, 1), (1, plan.scale_count)):
        value = results.get(f"scale-{models}-{teams}", "scale_call_us")
        if value is not None:
            lines.append([f"{models:,}", f"{teams:,}", f"{value:.1f}"])
    return _table(["models", "teams", "µs a call"], lines) if lines else ""


def _limits_table(results: Results) -> str:
    rows = [
        [proxy.title, f"{each:.1f}", "–" if added is None else f"{added:.1f}"]
        for proxy in LIMITS
        if (each := results.get(proxy.name, "limits_call_us")) is not None
        for added in [results.get(proxy.name, "limits_added_us")]
    ]
    return _table(["chain", "µs a call", "added"], rows) if rows else ""


def _cache_table(results: Results) -> str:
    pass_through = results.get("cache-none", "cache_per_core")
    lines = []
    for name, row in CACHE_ROWS.items():
        each = results.get(name, "cache_us")
        if each is None:
            continue
        per_core, per_s, busy, calls, asked = (
            results.values[name, f"cache_{figure}"]
            for figure in ("per_core", "per_s", "busy", "calls", "asked")
        )
        ratio = f"{per_core / pass_through:.2f}×" if pass_through else "–"
        said = f"`{row.said}`" if row.said else "–"
        cells = [f"{each:.1f}", f"{per_core:,.0f}", ratio, f"{per_s:,.0f}", f"{busy:.0%}"]
        # Of the embedded mock's calls the bench's upstream knows nothing.
        seen = f"{asked:,.0f} of {calls:,.0f}" if row.said or row.asks_upstream else "–"
        lines.append([row.title, *cells, said, seen])
    header = ["", "CPU µs a call", "calls/s per core", "against the first", "calls/s seen"]
    header += ["core busy", "every reply said", "upstream asked"]
    return _table(header, lines) if lines else ""


def _economy_table(results: Results) -> str:
    lines = []
    for name, row in ECONOMY_ROWS.items():
        each, added = (results.get(name, f"economy_{part}") for part in ("us", "added_us"))
        if each is None:
            continue
        shown = "–" if added is None else f"{added:+.1f}"
        base = ECONOMY_ROWS[row.against].title if added is not None else "–"
        asked, calls = (results.values[name, f"economy_{part}"] for part in ("asked", "calls"))
        said = f"`{row.said}`" if row.said else "–"
        lines.append([row.title, f"{each:.1f}", shown, base, said, f"{asked:,.0f} of {calls:,.0f}"])
    header = ["chain", "µs a call", "added", "to", "every reply said", "upstream asked"]
    return _table(header, lines) if lines else ""


def _signing_table(results: Results) -> str:
    lines = []
    for scheme in SETTINGS:
        value = results.get(scheme, "sign_us")
        if value is not None:
            lines.append([scheme, f"{value:.1f}"])
    return _table(["`sign.scheme`", "CPU µs an attempt"], lines) if lines else ""
