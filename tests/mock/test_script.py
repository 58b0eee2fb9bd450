"""Settings and scripts: what is accepted, what is refused, and which rule answers."""

from collections import Counter
from pathlib import Path

import pytest

from sidecar.mock import Script, ScriptError, SettingError, Settings
from sidecar.mock.script import BEFORE_HEAD, ScriptRun, merge, parse_headers


def _settings(*headers: tuple[str, str]) -> Settings:
    return merge((), parse_headers(headers))


def test_each_header_sets_its_field() -> None:
    settings = _settings(
        ("x-mock-status", "429"),
        ("x-mock-retry-after", "2"),
        ("x-mock-error-code", "quota"),
        ("x-mock-hang", "events:3"),
        ("x-mock-split", "7"),
        ("x-mock-delay-ms", "0.5"),
        ("x-mock-usage", "none"),
        ("x-mock-trailer", "1"),
        ("x-mock-continue", "1"),
        ("x-mock-text", "a%20b%E4%BD%A0"),
    )
    assert settings == Settings(
        status=429,
        retry_after="2",
        error_code="quota",
        hang=3,
        split=7,
        delay_ms=0.5,
        usage="none",
        trailer=True,
        early_hints=True,
        text="a b你",
    )


def test_head_as_stop_point_is_before_any_event() -> None:
    assert _settings(("x-mock-die", "head")).die == BEFORE_HEAD


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("status", "199"),
        ("status", "4e2"),
        ("status", "٤٢٩"),  # digits, but not ours
        ("retry-after", "soon"),
        ("hang", "tail"),
        ("hang", "events:-1"),
        ("die", "events:"),
        ("split", "0"),
        ("delay-ms", "-1"),
        ("delay-ms", "nan"),
        ("delay-ms", "1.2.3"),
        ("events", "many"),
        ("event-bytes", "0"),
        ("usage", "some"),
        ("body", "short"),
        ("encoding", "br"),
        ("trailer", "yes"),
        ("text", "%ff"),
        ("error-code", ""),
    ],
)
def test_bad_value_is_refused_by_the_headers_name(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=f"^x-mock-{name}"):
        _settings((f"x-mock-{name}", value))


def test_unknown_setting_lists_the_known_ones() -> None:
    with pytest.raises(SettingError, match="x-mock-delay: unknown setting, known are: status"):
        _settings(("x-mock-delay", "1"))


def test_header_given_twice_is_refused() -> None:
    with pytest.raises(SettingError, match="given twice"):
        _settings(("x-mock-split", "1"), ("x-mock-split", "2"))


@pytest.mark.parametrize(
    "headers",
    [
        (("x-mock-hang", "head"), ("x-mock-die", "head")),
        (("x-mock-trailer", "1"), ("x-mock-body", "length")),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    headers: tuple[tuple[str, str], ...],
) -> None:
    with pytest.raises(SettingError):
        _settings(*headers)


def test_headers_win_over_the_script() -> None:
    script = Script.parse("[{status: 500, delay_ms: 5}]")
    given = ScriptRun(script).next("/v1/messages", "m")
    settings = merge(given, parse_headers((("x-mock-status", "503"),)))
    assert (settings.status, settings.delay_ms) == (503, 5.0)


def _statuses(script: str, *calls: tuple[str, str]) -> list[int | None]:
    run = ScriptRun(Script.parse(script))
    return [merge(run.next(path, model), ()).status for path, model in calls]


def test_first_rule_that_fits_and_has_times_left_answers() -> None:
    script = """
    - {match: {path: /v1/messages}, status: 529, times: 2}
    - {match: {model: "gpt-*"}, status: 429, times: 1}
    - {status: 500}
    """
    messages, chat = ("/v1/messages", "claude"), ("/v1/chat/completions", "gpt-4o")
    assert _statuses(script, messages, chat, messages, messages, chat) == [529, 429, 529, 500, 500]


def test_nth_counts_the_calls_that_fit_also_when_another_rule_answers() -> None:
    script = """
    - {match: {model: a, nth: 1}, status: 401}
    - {match: {model: a, nth: 3}, status: 403}
    """
    calls = [("/x", "a"), ("/x", "b"), ("/x", "a"), ("/x", "a"), ("/x", "a")]
    assert _statuses(script, *calls) == [401, None, None, 403, None]


def _counts(script: str, calls: int, seed: int = 0) -> Counter[int | None]:
    run = ScriptRun(Script.parse(script), seed)
    return Counter(merge(run.next("/", "m"), ()).status for _ in range(calls))


def test_shares_of_rules_add_up_and_the_rest_is_answered() -> None:
    counts = _counts("[{share: 0.3, status: 500}, {share: 0.1, status: 529}]", 20_000)
    assert counts[500] == pytest.approx(6000, rel=0.05)
    assert counts[529] == pytest.approx(2000, rel=0.1)
    assert counts[None] == pytest.approx(12_000, rel=0.05)


def test_shares_that_make_a_whole_leave_nothing() -> None:
    counts = _counts("[{share: 0.7, status: 500}, {share: 0.1, status: 503}, {share: 0.2}]", 1000)
    assert set(counts) == {500, 503, None}
    assert _counts("[{share: 1, status: 500}]", 1000) == {500: 1000}


def test_shares_of_other_models_are_drawn_apart() -> None:
    script = """
    - {match: {model: other}, share: 1.0, status: 500}
    - {match: {model: m}, share: 1.0, status: 503}
    """
    assert _counts(script, 100) == {503: 100}


def test_same_seed_draws_the_same_and_another_does_not() -> None:
    script = Script.parse("[{share: 0.5, status: 500}]")

    def drawn(seed: int) -> list[object]:
        run = ScriptRun(script, seed)
        return [run.next("/", "m") for _ in range(100)]

    assert drawn(1) == drawn(1) != drawn(2)


def test_share_that_has_no_times_left_goes_to_the_rules_below() -> None:
    script = "[{share: 1, times: 3, status: 500}, {status: 503}]"
    assert _counts(script, 10) == {500: 3, 503: 7}


def test_two_runs_of_one_script_count_apart() -> None:
    script = Script.parse("[{status: 500, times: 1}]")
    assert [ScriptRun(script).next("/", "") for _ in range(2)] == [(("status", 500),)] * 2


def test_script_text_is_taken_as_it_stands() -> None:
    assert _settings_of('[{text: "100% 你", trailer: true}]') == Settings(
        text="100% 你", trailer=True
    )


def _settings_of(script: str) -> Settings:
    return merge(Script.parse(script).rules[0].given, ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b", "a script is a list of rules"),
        ("[5]", "rule 1: a rule is a mapping"),
        ("[{status: 500}, {sttus: 500}]", "rule 2: sttus: unknown setting"),
        ("[{status: 99}]", "rule 1: status: 99 is not between"),
        ("[{status: [1]}]", "rule 1: .* is not a plain value"),
        ("[{match: {modle: x}}]", "rule 1: match"),
        ("[{match: {model: 4}}]", "rule 1: match.model"),
        ("[{match: {nth: 0}}]", "rule 1: match.nth"),
        ("[{times: true}]", "rule 1: times"),
        ("[{share: 0}]", "rule 1: share: 0 is not a number above 0"),
        ("[{share: 1.1}]", "rule 1: share: 1.1 is not"),
        ("[{share: true}]", "rule 1: share: True is not"),
        ("[{share: .nan}]", "rule 1: share: nan is not"),
        ("[{share: half}]", "rule 1: share: 'half' is not"),
        ("[{share: 0.5, match: {nth: 1}}]", "rule 1: share and match.nth"),
        ("[{share: 0.6}, {share: 0.6}]", "rule 2: share: rules with this match sum to more than 1"),
        ("[{hang: head, die: head}]", "rule 1: hang and die"),
        ("[", "not YAML"),
    ],
)
def test_bad_script_names_the_rule(text: str, message: str) -> None:
    with pytest.raises(ScriptError, match=message):
        Script.parse(text)


def test_script_file_is_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "script.yaml"
    path.write_text("[{delay: 1}]")
    with pytest.raises(ScriptError, match=r"script\.yaml: rule 1: delay"):
        Script.load(path)
    with pytest.raises(ScriptError, match=r"absent\.yaml"):
        Script.load(tmp_path / "absent.yaml")


def test_empty_script_has_no_rules() -> None:
    assert Script.parse("# nothing yet") == Script()
