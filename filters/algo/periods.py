"""Days, weeks and months as people in a time zone have them.

They are stretches of time that follow one another without a gap, whatever the clocks do: a day in
spring has 23 hours, one in autumn 25. A period begins with the first midnight of its first day; in
a zone whose clocks go forward at midnight, at the moment when they do.

`dateutil.rrule` knows repetitions, but not which one an instant is in, and `pandas.Period` weighs
fifty megabytes; `zoneinfo` and a dozen lines do.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, tzinfo
from difflib import get_close_matches
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo, available_timezones

Unit = Literal["day", "week", "month"]
Weekday = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]

WEEKDAYS: tuple[Weekday, ...] = (
    *("monday", "tuesday", "wednesday", "thursday", "friday"),
    *("saturday", "sunday"),
)
UNITS: tuple[Unit, ...] = ("day", "week", "month")
DAY = timedelta(days=1)


class Period(NamedTuple):
    """One day, week or month. Times are seconds since the Unix epoch."""

    name: str
    """Its unit and first day: `week 2026-05-04`."""
    starts_at: int
    ends_at: int
    """The first second of the next one."""


class Calendar:
    """The days, weeks or months of one time zone."""

    __slots__ = ("_unit", "_week_starts", "_zone", "first_of")

    def __init__(self, unit: Unit, zone: tzinfo, *, week_starts: Weekday = "monday") -> None:
        self._unit = unit
        self._zone = zone
        self._week_starts = week_starts
        first_weekday = WEEKDAYS.index(week_starts)
        self.first_of: Callable[[date], date]
        """The first day of the period that a day is in."""
        if unit == "day":
            self.first_of = lambda day: day
        elif unit == "week":
            self.first_of = lambda day: day - DAY * ((day.weekday() - first_weekday) % 7)
        else:
            self.first_of = lambda day: day.replace(day=1)

    def at(self, wall: float) -> Period:
        """The period that this moment is in, in seconds since the Unix epoch."""
        first = self.first_of(datetime.fromtimestamp(wall, self._zone).date())
        # The date says it but for clocks that jump across a midnight: then a neighbour is meant.
        while self._starts_at(first) > wall:
            first = self.first_of(first - DAY)
        while self._starts_at(self._after(first)) <= wall:
            first = self._after(first)
        name = f"{self._unit} {first.isoformat()}"
        return Period(name, self._starts_at(first), self._starts_at(self._after(first)))

    def key_of(self, period: Period) -> str:
        """Its name, and whose it is where that is not said by it: days of different time zones are
        not the same, nor are weeks that begin on different days."""
        key = period.name
        if self._zone is not UTC:
            key += f" {self._zone}"
        if self._unit == "week" and self._week_starts != "monday":
            key += f" from {self._week_starts}"
        return key

    def _after(self, first: date) -> date:
        """The first day of the next period."""
        days = {"day": 1, "week": 7, "month": 31}[self._unit]
        return self.first_of(first + DAY * days)

    def _starts_at(self, day: date) -> int:
        # fold=0: the first of two midnights, and the old offset where there is none (PEP 495).
        return int(datetime(day.year, day.month, day.day, tzinfo=self._zone).timestamp())


def zone_of(name: str) -> tzinfo:
    """The time zone of an IANA name. Raises ValueError, which says what to write.

    UTC is there without the zone files of the system.
    """
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # not there; no path inside the folder; a folder
        pass
    known = available_timezones()
    if not known:
        hint = "this system has no time zone data (the package tzdata): only UTC is known"
    elif near := get_close_matches(name, known, 1):
        hint = f'did you mean "{near[0]}"?'
    else:
        hint = "write an IANA name, such as Europe/Berlin or Asia/Shanghai"
    raise ValueError(f'unknown time zone "{name[:60]}"; {hint}')


def clock_text(at: float, zone: tzinfo) -> str:
    """A moment for people, in their zone: `2026-05-04 00:00 CEST`."""
    return f"{datetime.fromtimestamp(at, zone):%Y-%m-%d %H:%M %Z}"
