"""Periods: without a gap, whatever the clocks do, and with the days that people have."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from filters.algo.periods import UNITS, WEEKDAYS, Calendar, Unit, Weekday, clock_text, zone_of

HOUR = 3600
# Clocks that go forward or back at midnight, across it, by half an hour, or by a whole day.
ZONES = (
    *("UTC", "Europe/Berlin", "Asia/Shanghai", "Asia/Kathmandu", "Australia/Lord_Howe"),
    *("America/Sao_Paulo", "Asia/Beirut", "America/St_Johns", "Pacific/Apia", "America/Toronto"),
)


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone_of(zone)).timestamp()


@pytest.mark.parametrize(
    ("unit", "name", "starts", "ends"),
    [
        ("day", "day 2026-05-06", "2026-05-06", "2026-05-07"),
        ("week", "week 2026-05-04", "2026-05-04", "2026-05-11"),
        ("month", "month 2026-05-01", "2026-05-01", "2026-06-01"),
    ],
)
def test_period_has_the_name_of_its_first_day(
    unit: Unit, name: str, starts: str, ends: str
) -> None:
    found = Calendar(unit, UTC).at(at("2026-05-06T13:14:15"))
    assert found == (name, at(starts), at(ends))


def test_day_is_that_of_the_zone() -> None:
    now = at("2026-05-06T23:30")
    assert Calendar("day", zone_of("Asia/Shanghai")).at(now).name == "day 2026-05-07"
    assert Calendar("day", zone_of("America/Toronto")).at(now).name == "day 2026-05-06"


@pytest.mark.parametrize(("first", "name"), [("sunday", "2026-05-03"), ("thursday", "2026-04-30")])
def test_week_begins_when_it_is_said_to(first: Weekday, name: str) -> None:
    found = Calendar("week", UTC, week_starts=first).at(at("2026-05-06"))
    assert found.name == f"week {name}"


def test_key_tells_apart_days_of_other_zones_and_weeks_of_other_beginnings() -> None:
    def key(unit: Unit, zone: str = "UTC", first: Weekday = "monday") -> str:
        calendar = Calendar(unit, zone_of(zone), week_starts=first)
        return calendar.key_of(calendar.at(at("2026-05-06T12:00")))

    assert key("day") == "day 2026-05-06"
    assert key("day", "Europe/Berlin") == "day 2026-05-06 Europe/Berlin"
    assert key("week", first="monday") == "week 2026-05-04"
    assert key("week", first="sunday") == "week 2026-05-03 from sunday"
    assert key("month", "Asia/Shanghai", "sunday") == "month 2026-05-01 Asia/Shanghai"


def test_border_belongs_to_the_period_that_begins() -> None:
    calendar = Calendar("month", UTC)
    border = at("2026-06-01")
    assert calendar.at(border).name == "month 2026-06-01"
    assert calendar.at(border - 0.001).name == "month 2026-05-01"


@pytest.mark.parametrize(
    ("day", "hours"), [("2026-03-29", 23), ("2026-10-25", 25), ("2026-05-05", 24)]
)
def test_day_has_as_many_hours_as_its_clocks_say(day: str, hours: int) -> None:
    found = Calendar("day", zone_of("Europe/Berlin")).at(at(f"{day}T12:00", "Europe/Berlin"))
    assert found.ends_at - found.starts_at == hours * HOUR


def test_day_without_a_midnight_begins_when_the_clocks_go_forward() -> None:
    # 2018-11-04, 00:00 was 01:00 in São Paulo.
    found = Calendar("day", zone_of("America/Sao_Paulo")).at(at("2018-11-04T15:00"))
    assert (found.name, found.starts_at) == ("day 2018-11-04", at("2018-11-04T03:00"))


def test_day_that_a_country_left_out_has_no_length() -> None:
    zone = zone_of("Pacific/Apia")  # from the 29th to the 31st of December 2011
    calendar = Calendar("day", zone)
    before = calendar.at(at("2011-12-30T09:59"))
    after = calendar.at(at("2011-12-30T10:00"))
    assert (before.name, after.name) == ("day 2011-12-29", "day 2011-12-31")
    assert before.ends_at == after.starts_at


def test_clocks_that_go_back_across_midnight_do_not_begin_the_day_twice() -> None:
    # 2006-10-29, 00:01 was 23:01 of the day before in St. John's.
    calendar = Calendar("day", zone_of("America/St_Johns"))
    midnight = at("2006-10-29", "America/St_Johns")
    assert calendar.at(midnight + 30).name == "day 2006-10-29"
    assert calendar.at(midnight + 90).name == "day 2006-10-29"
    assert calendar.at(midnight - 1).name == "day 2006-10-28"


moments = st.integers(0, 4_000_000_000)


@example("America/St_Johns", "day", "monday", 1_162_092_690)
@example("Pacific/Apia", "day", "monday", 1_325_239_200)
@given(st.sampled_from(ZONES), st.sampled_from(UNITS), st.sampled_from(WEEKDAYS), moments)
def test_periods_follow_one_another_without_a_gap(
    zone: str, unit: Unit, first: Weekday, now: int
) -> None:
    calendar = Calendar(unit, ZoneInfo(zone), week_starts=first)
    found = calendar.at(now)
    assert found.starts_at <= now < found.ends_at
    assert calendar.at(found.starts_at) == calendar.at(found.ends_at - 1) == found
    after = calendar.at(found.ends_at)
    assert after.starts_at == found.ends_at
    day = date.fromisoformat(found.name.split()[1])
    assert calendar.first_of(day) == day
    days = (found.ends_at - found.starts_at) / (24 * HOUR)
    assert (
        {"day": 0.9, "week": 6, "month": 27}[unit] <= days <= {"day": 1.1, "week": 8}.get(unit, 32)
    )


@given(st.sampled_from(ZONES), moments)
def test_a_day_is_the_date_on_the_wall_but_for_clocks_that_jump_across_midnight(
    zone: str, now: int
) -> None:
    found = Calendar("day", ZoneInfo(zone)).at(now)
    shown = datetime.fromtimestamp(now, ZoneInfo(zone)).date()
    named = date.fromisoformat(found.name.split()[1])
    assert abs(named - shown) <= timedelta(days=1)
    if zone not in ("America/St_Johns", "America/Toronto"):
        assert named == shown


# Zones


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Europe/Berln", 'did you mean "Europe/Berlin"?'),
        ("Nowhere", "such as Europe/Berlin"),
        ("../etc/passwd", "such as Europe/Berlin"),
        ("Europe", 'unknown time zone "Europe"'),
        ("", "unknown time zone"),
    ],
)
def test_unknown_zone_says_what_to_write(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match="unknown time zone") as caught:
        zone_of(name)
    assert hint in str(caught.value)


def test_without_zone_files_there_is_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("filters.algo.periods.available_timezones", set)
    assert zone_of("UTC") is UTC
    with pytest.raises(ValueError, match="only UTC is known"):
        zone_of("Nowhere/AtAll")


def test_clock_text_is_of_the_zone() -> None:
    assert clock_text(at("2026-05-05T22:00"), zone_of("Europe/Berlin")) == "2026-05-06 00:00 CEST"
