"""What calls used, as it is asked for and shown: exact money, safe text, honest times."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.algo.usage_report import (
    BASIC,
    MEASURES,
    NAMES,
    Line,
    Query,
    as_csv,
    as_json,
    as_table,
    parse_by,
    parse_time,
    plain,
    report,
)

NOW_S = datetime(2026, 1, 31, 12, 0, tzinfo=UTC).timestamp()
BERLIN, KATHMANDU = ZoneInfo("Europe/Berlin"), ZoneInfo("Asia/Kathmandu")


def query(*by: str) -> Query:
    return Query(by, 0.0, NOW_S)


def line(*names: str | int, cost: str | None = "0", calls: int = 1, **sums: int) -> Line:
    found = {"calls": calls, **sums}
    return Line(
        names,
        "USD" if cost is not None else None,
        Decimal(cost or 0),
        tuple(found.get(each, 0) for each in MEASURES),
    )


# by


def test_names_are_taken_in_their_order_and_once() -> None:
    assert parse_by("team, model,team") == ("team", "model")
    assert parse_by(",".join(NAMES)) == NAMES


@pytest.mark.parametrize("text", ["", "team,", "teams", "team;model"])
def test_a_wrong_name_is_named_with_all_right_ones(text: str) -> None:
    with pytest.raises(ValueError, match=r"is none of team, model, upstream, .*, status"):
        parse_by(text)


# since and until


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("1h", 3600), ("7d", 604_800), ("2w", 1_209_600)],
)
def test_a_span_is_so_long_ago(text: str, seconds: int) -> None:
    assert parse_time(text, NOW_S) == NOW_S - seconds


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2026-01-31", "2026-01-30T23:00+00:00"),
        ("2026-01-31T08:00", "2026-01-31T07:00+00:00"),
        ("2026-07-31 08:00:30", "2026-07-31T06:00:30+00:00"),
        ("2026-01-31T08:00Z", "2026-01-31T08:00+00:00"),
        ("2026-01-31T08:00-05:00", "2026-01-31T13:00+00:00"),
    ],
)
def test_a_date_or_time_is_local_unless_it_says_otherwise(text: str, utc: str) -> None:
    assert parse_time(text, NOW_S, BERLIN) == datetime.fromisoformat(utc).timestamp()


@pytest.mark.parametrize("text", ["", "1", "1y", "-1h", "h", "1.5h", "31.01.2026", "999999999w"])
def test_what_is_no_time_is_refused_with_what_may_be_written(text: str) -> None:
    with pytest.raises(ValueError, match="write 30m, 1h, 7d, 2026-01-31 or 2026-01-31T08:00"):
        parse_time(text, NOW_S)


# Rows


def test_lines_of_one_group_are_added() -> None:
    lines = [
        line("gpt", cost="0.1", calls=2, input_tokens=20),
        line("gpt", cost="0.2", calls=1, input_tokens=5, cached_calls=1),
        line("claude", cost="0.05"),
    ]
    found = report(lines, query("model"))
    assert found.columns == ("model", *BASIC, "cost", "currency")
    assert [(row.names, row.sums, row.cost) for row in found.rows] == [
        (("gpt",), (3, 1, 25, 0), Decimal("0.3")),
        (("claude",), (1, 0, 0, 0), Decimal("0.05")),
    ]


@given(st.lists(st.decimals(0, 10**9, places=12), min_size=1, max_size=50))
def test_money_is_added_without_rounding(amounts: list[Decimal]) -> None:
    (row,) = report([line("gpt", cost=str(each)) for each in amounts], query("model")).rows
    assert row.cost is not None
    assert int(row.cost * 10**12) == sum(int(each.scaleb(12)) for each in amounts)


def test_tiny_and_huge_amounts_add_up_to_the_last_digit() -> None:
    lines = [line("gpt", cost="1e-30"), line("gpt", cost="1e30")]
    (row,) = report(lines, query("model")).rows
    assert row.cost is not None
    assert plain(row.cost) == f"1{'0' * 30}.{'0' * 29}1"


def test_unknown_price_has_a_row_of_its_own_behind_all_known_ones() -> None:
    lines = [line("gpt", cost=None, calls=5), line("gpt", cost="0"), line("claude", cost="1")]
    rows = report(lines, query("model")).rows
    assert [(row.names[0], row.sums[0], row.cost, row.currency) for row in rows] == [
        ("claude", 1, Decimal(1), "USD"),
        ("gpt", 1, Decimal(0), "USD"),
        ("gpt", 5, None, None),
    ]


def test_currencies_are_never_added_to_each_other() -> None:
    lines = [line("gpt", cost="1"), line("gpt", cost="7")._replace(currency="CNY")]
    rows = report(lines, query("model")).rows
    assert [(row.cost, row.currency) for row in rows] == [(Decimal(7), "CNY"), (Decimal(1), "USD")]


def test_side_calls_alone_make_a_row_in_the_details_only() -> None:
    lines = [line("embed", calls=0, side_calls=2, side_input_tokens=9)]
    assert report(lines, query("model")).rows == []
    (row,) = report(lines, query("model"), details=True).rows
    assert dict(zip(MEASURES, row.sums, strict=True))["side_input_tokens"] == 9


def test_days_are_local_and_come_in_order() -> None:
    slots = [datetime(2026, 1, 30, hour, 45, tzinfo=UTC).timestamp() for hour in (22, 23)]
    lines = [line(int(slots[1]), cost="1"), line(int(slots[0]), cost="2")]
    rows = report(lines, query("day"), zone=BERLIN).rows
    assert [row.names for row in rows] == [("2026-01-30",), ("2026-01-31",)]
    assert len(report(lines, query("day"), zone=UTC).rows) == 1


def test_an_hour_that_comes_twice_is_told_apart_by_its_offset() -> None:
    slots = [datetime(2026, 10, 25, hour, 30, tzinfo=UTC).timestamp() for hour in (0, 1)]
    rows = report([line(int(each)) for each in slots], query("hour"), zone=BERLIN).rows
    assert [row.names[0] for row in rows] == ["2026-10-25T02:00+01:00", "2026-10-25T02:00+02:00"]


def test_hours_of_a_zone_of_odd_offset_begin_where_its_clocks_say() -> None:
    slots = [datetime(2026, 1, 1, 0, minute, tzinfo=UTC).timestamp() for minute in (0, 15)]
    rows = report([line(int(each)) for each in slots], query("hour"), zone=KATHMANDU).rows
    assert [row.names[0] for row in rows] == ["2026-01-01T05:00+05:45", "2026-01-01T06:00+05:45"]


# How it looks


def test_json_has_money_as_numbers_with_all_digits() -> None:
    lines = [
        line("gpt", cost="0.000012300", calls=3, cached_calls=1, input_tokens=30, output_tokens=36),
        line("模型", cost=None),
    ]
    text = as_json(report(lines, query("model")))
    assert '"cost": 0.0000123,' in text
    first, second = json.loads(text, parse_float=Decimal)
    assert first == {
        "model": "gpt",
        "calls": 3,
        "cached_calls": 1,
        "input_tokens": 30,
        "output_tokens": 36,
        "cost": Decimal("0.0000123"),
        "currency": "USD",
    }
    assert (second["model"], second["cost"], second["currency"]) == ("模型", None, None)
    assert list(first) == ["model", *BASIC, "cost", "currency"]
    assert as_json(report([], query("model"))) == "[]"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "=1+1",
            "+1",
            "-1",
            "@SUM(A1)",
            "\tx",
            "\rx",
            "\nx",
            "\n=1",
            " =1",
            "\u3000=1",
            "\u00a0+1",
        ),
        *("\uff1d1+1", "\uff0b1", "\uff0d1", "\uff20x", " \uff1d1"),
    ],
)
def test_csv_holds_nothing_that_a_spreadsheet_would_run(name: str) -> None:
    text = as_csv(report([line(name, cost="0.5")], query("model")))
    head, row = csv.reader(io.StringIO(text))
    assert head == ["model", *BASIC, "cost", "currency"]
    shown = "".join(ascii(each)[1:-1] if each in "\r\u3000\u00a0" else each for each in name)
    assert row[0] == f"'{shown}"
    assert row[1:] == ["1", "0", "0", "0", "0.5", "USD"]


def test_csv_keeps_commas_quotes_and_lines_in_their_field() -> None:
    text = as_csv(report([line('a,"b"\nc', cost=None)], query("model")))
    _, row = csv.reader(io.StringIO(text))
    assert row == ['a,"b"\nc', "1", "0", "0", "0", "", ""]


def test_table_is_aligned_and_has_a_sum_for_each_currency() -> None:
    lines = [
        line("gpt", cost="12.5", calls=12, input_tokens=3000),
        line("模型", cost="0.25"),
        line("new", cost=None, calls=2),
    ]
    assert as_table(report(lines, query("model"))).splitlines() == [
        "model  calls  cached calls  input tokens  output tokens     cost  currency",
        "-----  -----  ------------  ------------  -------------  -------  --------",
        "gpt       12             0          3000              0     12.5  USD",
        "模型       1             0             0              0     0.25  USD",
        "new        2             0             0              0  unknown  unknown",
        "-----  -----  ------------  ------------  -------------  -------  --------",
        "total     13             0          3000              0    12.75  USD",
        "total      2             0             0              0  unknown  unknown",
    ]


def test_table_of_nothing_is_its_head() -> None:
    assert len(as_table(report([], query("team", "model"))).splitlines()) == 2


def test_table_makes_control_characters_harmless() -> None:
    text = as_table(report([line("\x1b[2Jgpt\n\u202e", cost="1")], query("model")))
    assert r"\x1b[2Jgpt\n\u202e" in text
    assert "\x1b" not in text


CONTROLS = "\r\x1b[2J\x07\x7f\x9b31m\u202e\u2066\u200b\ufeff\u2028\U000e0041"


def test_json_writes_characters_that_cannot_be_seen_as_escapes() -> None:
    text = as_json(report([line(f"模型{CONTROLS}", cost="1")], query("model")))
    assert text.isprintable()
    assert r"模型\r\u001b[2J\u0007\u007f\u009b31m\u202e\u2066" in text
    assert json.loads(text)[0]["model"] == f"模型{CONTROLS}"


def test_csv_writes_control_characters_as_escapes() -> None:
    text = as_csv(report([line(f"模型{CONTROLS}", cost="1")], query("model")))
    _, row = csv.reader(io.StringIO(text))
    assert text.replace("\r\n", "").isprintable()
    assert row[0].startswith(r"模型\r\x1b[2J\x07\x7f\x9b31m\u202e\u2066")
