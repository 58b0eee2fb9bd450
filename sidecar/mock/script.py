"""What the mock provider is told to do: settings, from `x-mock-*` headers or from a script file.

This module reads and checks; it serves nothing. Every value is parsed strictly, because a test
whose misspelt setting is ignored passes for the wrong reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Literal
from urllib.parse import unquote_to_bytes

import yaml

HEADER_PREFIX = "x-mock-"

#: A stop point that lies before the response head; others are a number of events.
BEFORE_HEAD = -1

Usage = Literal["right", "wrong", "none"]
Framing = Literal["close", "length", "chunked"]
Value = str | int | float | bool


class SettingError(ValueError):
    """A setting that is unknown, has a bad value, or contradicts another one."""


class ScriptError(ValueError):
    """A script file that cannot be used; the message names the rule and the fix."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How one call is answered. Frozen and hashable, so that built answers can be kept by it.

    An "event" is every server-sent event of a stream, the first and `[DONE]` included. A body
    that is not a stream counts as two events, its halves, for `hang` and `die`.
    """

    status: int | None = None  # 2xx: the normal answer with that status; others: an error body
    retry_after: str | None = None  # seconds or an HTTP date, sent as it stands
    error_code: str | None = None
    error_type: str | None = None
    hang: int | None = None  # BEFORE_HEAD or a number of events
    die: int | None = None  # BEFORE_HEAD or a number of events
    split: int | None = None  # bytes a write
    delay_ms: float = 0.0  # before every event
    first_delay_ms: float = 0.0  # before the head
    events: int | None = None  # content events, one output token each
    event_bytes: int | None = None  # approximate size of a content event
    error_event: int | None = None  # an error event after that many events
    usage: Usage = "right"
    body: Framing | None = None  # default: chunked for streams, length for the rest
    encoding: Literal["gzip"] | None = None
    trailer: bool = False
    early_hints: bool = False  # a 103 before the head
    text: str | None = None

    def __post_init__(self) -> None:
        if self.hang is not None and self.die is not None:
            raise SettingError("hang and die: choose one of the two")
        if self.trailer and self.body not in (None, "chunked"):
            raise SettingError(f"trailer: needs a chunked body, not body: {self.body}")


# Parsing one value...


def _integer(low: int, high: int) -> Callable[[str], object]:
    def parse(text: str) -> object:
        if not (text.isascii() and text.isdigit() and len(text) <= 12):
            raise SettingError(f"{text!r} is not a whole number")
        if not low <= int(text) <= high:
            raise SettingError(f"{text} is not between {low} and {high}")
        return int(text)

    return parse


def _milliseconds(text: str) -> object:
    if not text.isascii() or not text.replace(".", "", 1).isdigit():
        raise SettingError(f"{text!r} is not a number of milliseconds")
    if (value := float(text)) > 3_600_000:
        raise SettingError(f"{text} ms is more than an hour")
    return value


def _stop_point(text: str) -> object:
    if text == "head":
        return BEFORE_HEAD
    kind, _, number = text.partition(":")
    if kind != "events":
        raise SettingError(f'{text!r} is neither "head" nor "events:N"')
    return _integer(0, 1_000_000)(number)


def _one_of(*words: str) -> Callable[[str], object]:
    def parse(text: str) -> object:
        if text not in words:
            raise SettingError(f"{text!r} is not one of: {', '.join(words)}")
        return text

    return parse


def _flag(text: str) -> object:
    return _one_of("0", "1")(text) == "1"


def _token(text: str) -> object:
    if not text or not text.isascii() or not text.isprintable():
        raise SettingError(f"{text!r} is not plain printable text")
    return text


def _retry_after(text: str) -> object:
    if text.isascii() and text.replace(".", "", 1).isdigit():
        return text
    try:
        parsedate_to_datetime(text)
    except ValueError:
        raise SettingError(f"{text!r} is neither seconds nor an HTTP date") from None
    return _token(text)


#: Name in a script (in a header: with `x-mock-`, and dashes) -> field of Settings, parser.
_KNOWN: Mapping[str, tuple[str, Callable[[str], object]]] = {
    "status": ("status", _integer(200, 599)),
    "retry_after": ("retry_after", _retry_after),
    "error_code": ("error_code", _token),
    "error_type": ("error_type", _token),
    "hang": ("hang", _stop_point),
    "die": ("die", _stop_point),
    "split": ("split", _integer(1, 1_048_576)),
    "delay_ms": ("delay_ms", _milliseconds),
    "first_delay_ms": ("first_delay_ms", _milliseconds),
    "events": ("events", _integer(0, 1_000_000)),
    "event_bytes": ("event_bytes", _integer(1, 1_048_576)),
    "error_event": ("error_event", _integer(0, 1_000_000)),
    "usage": ("usage", _one_of("right", "wrong", "none")),
    "body": ("body", _one_of("close", "length", "chunked")),
    "encoding": ("encoding", _one_of("gzip")),
    "trailer": ("trailer", _flag),
    "continue": ("early_hints", _flag),
    "text": ("text", str),
}

#: Settings as given, before defaults: pairs of field and value, hashable.
Given = tuple[tuple[str, object], ...]


def _parse(name: str, text: str, label: str) -> tuple[str, object]:
    if name not in _KNOWN:
        raise SettingError(f"{label}: unknown setting, known are: {', '.join(_KNOWN)}")
    field, parse = _KNOWN[name]
    try:
        return field, parse(text)
    except SettingError as error:
        raise SettingError(f"{label}: {error}") from None


@lru_cache(maxsize=256)
def parse_headers(headers: tuple[tuple[str, str], ...]) -> Given:
    """Settings from `x-mock-*` headers, names in lower case. Raises SettingError."""
    given: dict[str, object] = {}
    for header, text in headers:
        name = header.removeprefix(HEADER_PREFIX).replace("-", "_")
        text = text.strip()
        if name == "text":
            # Only a header needs the percent-encoding: YAML can say any text.
            try:
                text = unquote_to_bytes(text).decode("utf-8")
            except UnicodeDecodeError:
                raise SettingError(f"{header}: is not percent-encoded UTF-8") from None
        field, value = _parse(name, text, header)
        if field in given:
            raise SettingError(f"{header}: given twice")
        given[field] = value
    return tuple(given.items())


@lru_cache(maxsize=1024)
def merge(rule: Given, headers: Given) -> Settings:
    """One call's settings: the script's, with the request's headers on top.

    Raises SettingError where the two together contradict each other.
    """
    values = dict(rule) | dict(headers)
    return Settings(**values)  # type: ignore[arg-type]  # the parsers above give each field's type


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a script: which calls it fits, how often it may answer, and with what."""

    path: str = "*"  # shell pattern on the path, without the query
    model: str = "*"  # shell pattern on the request's model; "" when there is none
    nth: int | None = None  # only the n-th call (from 1) that fits path and model
    times: int | None = None  # answers at most that many calls
    share: float | None = None  # answers that part of the calls, drawn by chance
    given: Given = ()

    def fits(self, path: str, model: str) -> bool:
        """Whether path and model are this rule's; the rest needs a count, or a draw."""
        return fnmatchcase(path, self.path) and fnmatchcase(model, self.model)


@dataclass(frozen=True, slots=True)
class Script:
    """Rules in order: the first that fits, is drawn and has `times` left decides."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Script:
        """A script from YAML: a list of rules. Raises ScriptError."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ScriptError(f"not YAML: {error}") from error
        if data is None:
            return cls()
        if not isinstance(data, list):
            raise ScriptError("a script is a list of rules, each starting with '- '")
        rules = tuple(_rule(number, item) for number, item in enumerate(data, 1))
        _check_shares(rules)
        return cls(rules)

    @classmethod
    def load(cls, path: Path) -> Script:
        """A script from a file. Raises ScriptError, also when it cannot be read."""
        try:
            return cls.parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ScriptError(f"{path}: {error}") from error
        except ScriptError as error:
            raise ScriptError(f"{path}: {error}") from error


class ScriptRun:
    """A script being played: remembers how often each rule has fitted and answered.

    A call is drawn once for all rules with a `share`, each of which has its own piece of the range
    from 0 to 1: shares of rules that fit the same calls add up. The same seed draws the same.
    """

    def __init__(self, script: Script, seed: int = 0) -> None:
        self._rules = script.rules
        self._chance = Random(seed)
        self._fitted = [0] * len(script.rules)
        self._answered = [0] * len(script.rules)

    def next(self, path: str, model: str) -> Given:
        """The settings for this call, which counts as made. Empty when no rule applies."""
        chosen: Given | None = None
        drawn, shares = self._chance.random(), 0.0
        for index, rule in enumerate(self._rules):
            if not rule.fits(path, model):
                continue
            # Counted for every rule, also after one was chosen: `nth` speaks about the calls,
            # not about what the rules above did with them.
            self._fitted[index] += 1
            if chosen is not None or rule.nth not in (None, self._fitted[index]):
                continue
            if rule.share is not None:
                low, shares = shares, shares + rule.share
                if not low <= drawn < shares:
                    continue
            if rule.times is not None and self._answered[index] >= rule.times:
                continue
            self._answered[index] += 1
            chosen = rule.given
        return () if chosen is None else chosen


# Reading a rule...


def _rule(number: int, item: object) -> Rule:
    label = f"rule {number}"
    if not isinstance(item, dict):
        raise ScriptError(f"{label}: a rule is a mapping of settings")
    data = dict(item)
    match = data.pop("match", {})
    if not isinstance(match, dict) or not set(match) <= {"path", "model", "nth"}:
        raise ScriptError(f"{label}: match: a mapping with path, model and nth only")
    times, share = data.pop("times", None), data.pop("share", None)
    for name, count in (("match.nth", match.get("nth")), ("times", times)):
        if count is not None and (type(count) is not int or count < 1):
            raise ScriptError(f"{label}: {name}: {count!r} is not a whole number from 1")
    if share is not None and (type(share) not in (int, float) or not 0 < share <= 1):
        raise ScriptError(f"{label}: share: {share!r} is not a number above 0 and up to 1")
    if share is not None and "nth" in match:
        raise ScriptError(f"{label}: share and match.nth: choose one of the two")
    for name in ("path", "model"):
        if not isinstance(match.get(name, "*"), str):
            raise ScriptError(f"{label}: match.{name}: is not text")
    try:
        given = tuple(_parse(str(key), _as_text(value), str(key)) for key, value in data.items())
        merge(given, ())
    except SettingError as error:
        raise ScriptError(f"{label}: {error}") from None
    return Rule(
        path=match.get("path", "*"),
        model=match.get("model", "*"),
        nth=match.get("nth"),
        times=times,
        share=share,
        given=given,
    )


def _check_shares(rules: Sequence[Rule]) -> None:
    """Refuse shares that leave a later rule less than it says."""
    sums: dict[tuple[str, str], float] = {}
    for number, rule in enumerate(rules, 1):
        match = rule.path, rule.model
        sums[match] = sums.get(match, 0.0) + (rule.share or 0.0)
        if sums[match] > 1 + 1e-9:
            raise ScriptError(f"rule {number}: share: rules with this match sum to more than 1")


def _as_text(value: object) -> str:
    """A YAML scalar as a header would spell it."""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, str | int | float):
        return str(value)
    raise SettingError(f"{value!r} is not a plain value")


def split_settings(headers: Iterable[tuple[bytes, bytes]]) -> tuple[tuple[str, str], ...]:
    """The `x-mock-*` headers among raw ones, names in lower case, in order."""
    return tuple(
        (name.decode("ascii", "replace").lower(), value.decode("utf-8", "replace"))
        for name, value in headers
        # A cheap test first: nearly every header of nearly every call is not ours.
        if name[:7].lower() == b"x-mock-"
    )
