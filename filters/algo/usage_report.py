"""What calls used, as people ask for it: which columns, since when, as a table, CSV or JSON.

Where the sums come from is the business of `filters.stores.ledger`. Money is `Decimal` throughout
and added without rounding. `tabulate` and `rich` were considered for the table: neither makes
control characters in a caller's text harmless, and that is most of what there is to do here.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime, tzinfo
from decimal import Context, Decimal
from typing import NamedTuple
from unicodedata import east_asian_width

from filters.algo.pricing import plain

NAMES = (
    *("team", "model", "upstream", "upstream_model", "endpoint", "key", "day", "hour"),
    *("cached", "status"),
)
"""What calls may be grouped by."""
TIMES = ("day", "hour")
SLOT_S = 900
"""Times are told to that: the offsets of all time zones are multiples of it."""

BASIC = ("calls", "cached_calls", "input_tokens", "output_tokens")
DETAILS = (
    *("cached_input_tokens", "cache_write_tokens", "cache_write_1h_tokens", "reasoning_tokens"),
    *("estimated_calls", "saved_input_tokens", "saved_output_tokens"),
    *("reported_input_tokens", "reported_output_tokens"),
    *("lost_input_tokens", "lost_output_tokens"),
    *("side_calls", "side_input_tokens", "side_output_tokens"),
)
MEASURES = (*BASIC, *DETAILS)
"""What is added up, in the order of `Line.sums`."""

EXACT = Context(prec=1000)
"""Adds money of any size without rounding."""
NOTHING = Decimal(0)

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_SPAN = re.compile(r"([0-9]{1,9})([smhdw])").fullmatch
_RUN_BY_SPREADSHEETS = re.compile(
    r"[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]|\s+[=+\-@\uff1d\uff0b\uff0d\uff20]"
).match
"""What a field must not begin with (OWASP, CSV injection): as it is, behind white space that a
spreadsheet drops, and in the wide form of Chinese and Japanese keyboards."""

Name = str | int


class Query(NamedTuple):
    """Which calls, and what they are grouped by."""

    by: tuple[str, ...]
    """Of `NAMES`; at least one."""
    since_s: float
    """Unix seconds; inclusive."""
    until_s: float
    """Unix seconds; exclusive."""
    team: str | None = None
    model: str | None = None


class Line(NamedTuple):
    """Calls that are alike, added up."""

    names: tuple[Name, ...]
    """As `Query.by`; of a day or hour the Unix seconds at which their slot begins."""
    currency: str | None
    """None: their price is not known."""
    cost: Decimal
    sums: tuple[int, ...]
    """As `MEASURES`."""


class Row(NamedTuple):
    """One group of calls, as it is shown."""

    names: tuple[Name, ...]
    sums: tuple[int, ...]
    cost: Decimal | None
    """None, with the currency: not known."""
    currency: str | None


class Report(NamedTuple):
    """An answer to a query."""

    columns: tuple[str, ...]
    """Of every row: its names, its sums, `cost`, `currency`."""
    rows: list[Row]


# The question


def parse_by(text: str) -> tuple[str, ...]:
    """The names in a list such as `team,model`. Raises ValueError that says what may be written."""
    by = tuple(dict.fromkeys(each.strip() for each in text.split(",")))
    for each in by:
        if each not in NAMES:
            raise ValueError(f'"{each}" is none of {", ".join(NAMES)}')
    return by


def parse_time(text: str, now_s: float, zone: tzinfo | None = None) -> float:
    """Unix seconds of `30m`, `1h`, `7d` or `2w` before `now_s`, or of an ISO 8601 date or time.

    Without an offset it is in `zone`; None: the machine's. Raises ValueError that says how to
    write it.
    """
    text = text.strip()
    span = _SPAN(text)
    try:
        if span is not None:
            found_s = now_s - int(span[1]) * _UNITS_S[span[2]]
        else:
            found = datetime.fromisoformat(text)
            found_s = (found if found.tzinfo else found.replace(tzinfo=zone)).timestamp()
        datetime.fromtimestamp(found_s, zone)  # one that calendars know
    except (ValueError, OverflowError, OSError):
        how_to = "write 30m, 1h, 7d, 2026-01-31 or 2026-01-31T08:00"
        raise ValueError(f'"{text}" is no time: {how_to}') from None
    return found_s


# The answer


def report(
    lines: Iterable[Line], query: Query, *, details: bool = False, zone: tzinfo | None = None
) -> Report:
    """A row for each group and currency: the dearest first, or by time when that is asked first.

    Days and hours are those of `zone`; None: the machine's.
    """
    costs: dict[tuple[tuple[Name, ...], str | None], Decimal] = {}
    sums: dict[tuple[tuple[Name, ...], str | None], list[int]] = {}
    has_times = any(each in TIMES for each in query.by)
    for line in lines:
        names = _with_times(line.names, query.by, zone) if has_times else line.names
        key = (names, line.currency)
        if key in sums:
            costs[key] = EXACT.add(costs[key], line.cost)
            sums[key] = [one + other for one, other in zip(sums[key], line.sums, strict=True)]
        else:
            costs[key], sums[key] = line.cost, list(line.sums)
    measures = MEASURES if details else BASIC
    rows = [
        Row(names, tuple(values[: len(measures)]), costs[names, currency], currency)
        if currency is not None
        else Row(names, tuple(values[: len(measures)]), None, None)
        for (names, currency), values in sums.items()
        # Side calls are in the details alone: they are paid for by the calls they were made for.
        if details or values[0]
    ]
    rows.sort(key=_by_time if query.by[0] in TIMES else _by_cost)
    return Report((*query.by, *measures, "cost", "currency"), rows)


def _with_times(names: Sequence[Name], by: Sequence[str], zone: tzinfo | None) -> tuple[Name, ...]:
    return tuple(
        _time_of(int(name), what, zone) if what in TIMES else name
        for name, what in zip(names, by, strict=True)
    )


def _time_of(slot_s: int, what: str, zone: tzinfo | None) -> str:
    found = datetime.fromtimestamp(slot_s, zone).astimezone(zone)
    if what == "day":
        return found.date().isoformat()
    # With its offset: when clocks are put back, an hour comes twice.
    return found.replace(minute=0).isoformat(timespec="minutes")


def _by_cost(row: Row) -> tuple[bool, Decimal, list[str], str]:
    dearest_first = NOTHING if row.cost is None else EXACT.minus(row.cost)
    return row.cost is None, dearest_first, [str(name) for name in row.names], row.currency or ""


def _by_time(row: Row) -> tuple[str, tuple[bool, Decimal, list[str], str]]:
    return str(row.names[0]), _by_cost(row)


# How it looks


def as_json(found: Report) -> str:
    """An array with one object a line. Money is a number with all its digits, never a float's.

    Characters that cannot be seen are written as `\\u001b` and the like.
    """
    objects = (
        ", ".join(
            f"{json.dumps(name)}: {_json(value)}"
            for name, value in zip(found.columns, _values(row), strict=True)
        )
        for row in found.rows
    )
    return "[" + ",\n ".join(f"{{{each}}}" for each in objects) + "]"


def as_csv(found: Report) -> str:
    """RFC 4180 with the columns in the first line, and nothing that a spreadsheet would run.

    Control characters but tabs and line feeds are written as `\\x1b` and the like.
    """
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(found.columns)
    writer.writerows([_csv(value) for value in _values(row)] for row in found.rows)
    return out.getvalue().removesuffix("\r\n")


def as_table(found: Report) -> str:
    """For people: aligned, with a sum for each currency at the end."""
    columns = found.columns
    head = [name.replace("_", " ") for name in columns]
    body = [[_cell(value) for value in _values(row)] for row in found.rows]
    foot = [_total(found, currency) for currency in _currencies(found)]
    widths = [max(map(_width, column)) for column in zip(head, *body, *foot, strict=True)]
    rule = ["-" * width for width in widths]
    is_number = [name in MEASURES or name == "cost" for name in columns]
    return "\n".join(
        "  ".join(map(_padded, line, widths, is_number)).rstrip()
        for line in (head, rule, *body, *([rule, *foot] if foot else []))
    )


def _values(row: Row) -> tuple[Name | Decimal | None, ...]:
    return (*row.names, *row.sums, row.cost, row.currency)


def _json(value: Name | Decimal | None) -> str:
    if isinstance(value, Decimal):
        return plain(value)
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else "".join(map(_json_char, text))


def _json_char(char: str) -> str:
    """A caller's text: none of it moves the cursor, or turns the direction of what is read."""
    return char if char.isprintable() else json.dumps(char)[1:-1]


def _csv(value: Name | Decimal | None) -> Name:
    if isinstance(value, Decimal):
        return plain(value)
    if isinstance(value, str):
        text = _harmless(value, keep="\t\n")
        return f"'{text}" if _RUN_BY_SPREADSHEETS(value) else text
    return "" if value is None else value


def _cell(value: Name | Decimal | None) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, Decimal):
        return plain(value)
    if isinstance(value, int):
        return str(value)
    return _harmless(value) or "-"


def _harmless(text: str, keep: str = "") -> str:
    """A caller's text: none of it moves the cursor or colours a terminal, but for `keep`."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in keep else ascii(each)[1:-1] for each in text
    )


def _currencies(found: Report) -> list[str | None]:
    return list(dict.fromkeys(row.currency for row in found.rows))


def _total(found: Report, currency: str | None) -> list[str]:
    rows = [row for row in found.rows if row.currency == currency]
    cost = NOTHING if currency is not None else None
    for row in rows:
        if cost is not None and row.cost is not None:
            cost = EXACT.add(cost, row.cost)
    sums = [sum(each) for each in zip(*(row.sums for row in rows), strict=True)]
    names = ["total", *[""] * (len(rows[0].names) - 1)]
    return [*names, *map(_cell, (*sums, cost, currency))]


def _width(text: str) -> int:
    """Columns on a terminal: a Chinese character takes two."""
    return sum(2 if east_asian_width(each) in "WF" else 1 for each in text)


def _padded(text: str, width: int, is_number: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if is_number else text + space
