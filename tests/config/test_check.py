from __future__ import annotations

import pickle
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

import filters
from filters.rate_limit import RateLimit
from sidecar.config.registry import find_filter
from sidecar.errors import ConfigError

if TYPE_CHECKING:
    from conftest import Place

    Chain = Callable[..., str]

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64
REAL = dict(filters.BUILTIN)
CANARY = "canary-0123456789"
TEAMS = "teams: teams/*.yaml\n"


def team(name: str, more: str = "", key: str = A) -> str:
    return f"team: {name}\nkeys: ['{key}']\n{more}"


# Policies


def test_without_team_files_there_is_one_team_that_may_use_everything(
    place: Place, chain: Chain
) -> None:
    bound = place.bind(chain("plain", "sign"))
    (policy,) = bound.policies
    assert (policy.team.team, policy.team.models, policy.team.upstreams) == (
        "default",
        ["*"],
        ["mock"],
    )
    assert [spec.name for spec in policy.call] == ["plain"]
    assert [spec.filter_class.__name__ for spec in policy.attempt] == ["Sign"]
    assert bound.teams == ()


def test_the_implicit_team_has_the_configured_name(place: Place, chain: Chain) -> None:
    assert place.bind(chain(more="team: search")).policies[0].team.team == "search"


def test_each_team_file_is_a_policy_with_its_chain(place: Place, chain: Chain) -> None:
    bound = place.bind(
        chain("plain", more="  fast: {call: [], attempt: [sign]}\n" + TEAMS),
        a=team("a", "chain: fast"),
        b=team("b", key=B),
    )
    assert [
        (policy.team.team, [spec.name for spec in policy.call + policy.attempt])
        for policy in bound.policies
    ] == [("a", ["sign"]), ("b", ["plain"])]
    assert [each.team for each in bound.teams] == ["a", "b"]


def test_a_teams_settings_of_a_filter_lie_over_the_configurations(
    place: Place, chain: Chain
) -> None:
    bound = place.bind(
        chain(
            "limit", more="filters: {limit: {per_minute: 1, burst: 2, backend: {x: 1}}}\n" + TEAMS
        ),
        a=team("a", "filters: {limit: {per_minute: 9, backend: {y: 2}}}"),
        b=team("b", key=B),
    )
    assert [policy.call[0].config.model_dump() for policy in bound.policies] == [
        {"per_minute": 9, "burst": 2, "backend": {"y": 2}},
        {"per_minute": 1, "burst": 2, "backend": {"x": 1}},
    ]


def test_a_wrong_setting_is_shown_in_the_file_it_stands_in(place: Place, chain: Chain) -> None:
    assert place.problems(
        chain("limit", more="filters: {limit: {per_minute: 1, brust: 2}}\n" + TEAMS),
        a=team("a", "filters: {limit: {per_minute: many}}"),
        b=team("b", key=B),
    ) == [
        'config.yaml:5:34: filters.limit.brust: unknown key, did you mean "burst"?',
        "teams/a.yaml:3:31: filters.limit.per_minute: expected a whole number, found text",
    ]


def test_a_missing_setting_is_shown_where_it_belongs(place: Place, chain: Chain) -> None:
    assert place.problems(chain("plain, limit")) == [
        "config.yaml:4:27: chains.default.call[1]: needs settings: filters.limit.per_minute "
        "is missing: add it"
    ]
    assert place.problems(chain("limit", more="filters: {limit: {}}")) == [
        "config.yaml:5:18: filters.limit.per_minute: is missing: add it"
    ]
    assert place.problems(
        chain("limit", more=TEAMS), a=team("a", "filters: {limit: {burst: 1}}")
    ) == ["teams/a.yaml:3:18: filters.limit.per_minute: is missing: add it"]


def test_settings_of_a_chain_that_no_team_uses_are_checked_too(place: Place, chain: Chain) -> None:
    assert place.problems(
        chain(more="  idle: {call: [limit], attempt: []}\nfilters: {limit: {per_minute: x}}")
    ) == ["config.yaml:6:31: filters.limit.per_minute: expected a whole number, found text"]


def test_a_mistake_that_all_teams_share_is_told_once(place: Place, chain: Chain) -> None:
    assert place.problems(
        chain("limit", more="filters: {limit: {per_minute: x}}\n" + TEAMS),
        a=team("a"),
        b=team("b", key=B),
    ) == ["config.yaml:5:31: filters.limit.per_minute: expected a whole number, found text"]


def test_members_of_a_union_are_told_in_one_sentence(place: Place, chain: Chain) -> None:
    place.environ["KEY"] = CANARY
    more = "filters: {webhook: {token: env:KEY, label: [x]}}"
    assert place.problems(chain("webhook", more=more)) == [
        "config.yaml:5:44: filters.webhook.label: expected text or a whole number, found a list"
    ]


def test_settings_of_a_filter_in_no_chain_are_refused(place: Place, chain: Chain) -> None:
    assert place.problems(chain("limit", more="filters: {limt: {per_minute: 1}, webhook: {}}"))[
        1:
    ] == [
        'config.yaml:5:11: filters.limt: this filter is in no chain, did you mean "limit"?',
        "config.yaml:5:34: filters.webhook: this filter is in no chain: remove the section, or add "
        "it there",
    ]


def test_settings_of_a_filter_that_is_not_in_the_teams_chain_are_refused(
    place: Place, chain: Chain
) -> None:
    more = "  fast: {call: [plain], attempt: []}\n" + TEAMS
    assert place.problems(chain(more=more), a=team("a", "filters: {plain: {}}")) == [
        'teams/a.yaml:3:11: filters.plain: this filter is not in the chain "default": remove the '
        "section, or add it there"
    ]


# Secrets in sections of filters


def test_secrets_in_filters_settings_are_resolved(place: Place, chain: Chain) -> None:
    place.environ["KEY"] = CANARY
    key = place.write("teams/secret", "key-of-the-team")
    bound = place.bind(
        chain("webhook", more="filters: {webhook: {token: env:KEY}}\n" + TEAMS),
        a=team("a", "filters: {webhook: {token: file:secret}}"),
        b=team("b", key=B),
    )
    assert [policy.call[0].config.token.reveal() for policy in bound.policies] == [
        "key-of-the-team",
        CANARY,
    ]
    assert key in bound.files
    assert place.directory / "config.yaml" in bound.files


def test_secrets_in_upstreams_sections_are_resolved(place: Place) -> None:
    place.write("key", CANARY)
    bound = place.bind(
        "upstreams:\n"
        "  a: {dialect: openai, base_url: 'mock:', sign: {scheme: bearer, key: file:key}}\n"
        "  b: {dialect: openai, base_url: 'mock:'}\n"
        "chains: {default: {call: [], attempt: [breaker, sign]}}"
    )
    assert list(bound.upstream_sections) == ["breaker", "sign"]
    assert list(bound.upstream_sections["sign"]) == ["a"]
    assert bound.upstream_sections["sign"]["a"].key.reveal() == CANARY
    assert bound.upstream_sections["breaker"] == {}
    assert place.directory / "key" in bound.files
    assert CANARY not in repr(bound)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (CANARY, "write env:NAME or file:PATH; a secret never stands in the file"),
        (
            "exec:x",
            "`exec:` is refused, a configuration never runs programs: write env:NAME or file:PATH",
        ),
        ("env:NONE", "the environment variable NONE is not set"),
        ("env:EMPTY", "the environment variable EMPTY is empty"),
        ("env:SHORT", "the environment variable SHORT has less than 8 characters"),
        ("file:none", "there is no file none"),
        ("sha256:" + "a" * 64, "write env:NAME or file:PATH; a secret never stands in the file"),
    ],
)
def test_a_wrong_secret_of_an_upstream_is_refused_with_its_place(
    place: Place, key: str, message: str
) -> None:
    place.environ |= {"EMPTY": "", "SHORT": "1234567"}
    assert place.problems(
        "upstreams:\n  a:\n    dialect: openai\n    base_url: 'mock:'\n"
        f"    sign:\n      scheme: bearer\n      key: {key}\n"
        "chains: {default: {call: [], attempt: [sign]}}"
    ) == [f"config.yaml:7:12: upstreams.a.sign.key: {message}"]


def test_a_literal_secret_is_not_even_in_the_traceback(place: Place) -> None:
    config = upstream(f"sign: {{scheme: bearer, key: {CANARY}}}") + f"\nfilters: {{x: {CANARY}}}"
    for text in (config, config.partition("\nfilters")[0]):  # refused by loading, and by binding
        with pytest.raises(ConfigError) as caught:
            place.bind(text)
        assert CANARY not in "".join(traceback.format_exception(caught.value))
        assert CANARY not in str(pickle.dumps(caught.value.problems))


# Sections of upstreams


def upstream(more: str, attempt: str = "sign") -> str:
    return (
        f"upstreams:\n  a: {{dialect: openai, base_url: 'https://h', {more}}}\n"
        f"chains: {{default: {{call: [], attempt: [{attempt}]}}}}"
    )


def test_a_section_that_is_wrong_is_refused(place: Place) -> None:
    assert place.problems(upstream("sign: {scheme: bearr, keey: env:X}")) == [
        'config.yaml:2:53: upstreams.a.sign.key: is missing: did you mean it by "keey"?',
        'config.yaml:2:62: upstreams.a.sign.scheme: expected "bearer" or "header", did you mean '
        '"bearer"?',
        'config.yaml:2:69: upstreams.a.sign.keey: unknown key, did you mean "key"?',
    ]
    assert place.problems(upstream("sign: text")) == [
        "config.yaml:2:53: upstreams.a.sign: expected a mapping, found text"
    ]


def test_a_section_nobody_reads_is_refused(place: Place) -> None:
    assert place.problems(upstream("sing: {}, timeout: 1, zzz: 1")) == [
        'config.yaml:2:47: upstreams.a.sing: unknown key, did you mean "sign"?',
        'config.yaml:2:57: upstreams.a.timeout: unknown key, did you mean "timeouts"?',
        "config.yaml:2:69: upstreams.a.zzz: unknown key, and no filter in use has settings of that "
        "name",
    ]


@pytest.mark.parametrize(
    "name", ["api_key", "api-key", "apiKey", "key", "auth", "token", "Authorization", "x-api-key"]
)
def test_a_key_beside_the_section_sign_is_told_where_it_belongs(place: Place, name: str) -> None:
    assert place.problems(upstream(f"{name}: env:KEY")) == [
        f"config.yaml:2:47: upstreams.a.{name}: unknown key: a key for the upstream stands in its "
        "section `sign`, such as `sign: {scheme: bearer, key: env:NAME}`"
    ]


def test_a_chain_without_the_filter_of_a_section_is_noted(place: Place) -> None:
    place.environ["KEY"] = CANARY
    text = (
        "upstreams:\n"
        "  a: {dialect: openai, base_url: 'mock:', sign: {scheme: bearer, key: env:KEY}}\n"
        "  b: {dialect: openai, base_url: 'mock:', breaker: {}}\n"
        "chains:\n"
        "  default: {call: [], attempt: [breaker]}\n"
        "  idle: {call: [], attempt: []}\n"
    )
    (note,) = place.bind(text).notes
    assert note.replace(f"{place.directory}/", "") == (
        "config.yaml:5:3: chains.default: lacks the filter `sign`: its calls do without the "
        "section `sign` of a"
    )
    assert place.bind(text.replace("[breaker]", "[breaker, sign]")).notes == []


def test_a_team_s_chain_without_the_filter_of_a_section_is_noted(place: Place) -> None:
    place.environ["KEY"] = CANARY
    text = (
        upstream("sign: {scheme: bearer, key: env:KEY}").replace("https", "http")
        + "\nteams: teams/*.yaml\n"
    )
    text = text.replace("chains: {", "chains: {plain: {call: [], attempt: []}, ")
    assert place.bind(text, a=team("a")).notes == []
    (note,) = place.bind(text, a=team("a", "chain: plain")).notes
    assert "chains.plain: lacks the filter `sign`" in note


def test_a_section_of_a_built_in_filter_may_wait_for_it_but_must_be_right(place: Place) -> None:
    assert place.problems(upstream("breaker: {failures: 2}")) == []
    assert place.problems(upstream("breaker: {failures: x}")) == [
        "config.yaml:2:67: upstreams.a.breaker.failures: expected a whole number, found text"
    ]


def test_a_section_of_a_filter_without_settings_for_upstreams_is_refused(place: Place) -> None:
    assert place.problems(upstream("plain: {}")) == [
        'config.yaml:2:47: upstreams.a.plain: the filter "plain" has no settings for an upstream: '
        "remove the section"
    ]


def test_a_section_of_a_filter_under_an_upstream_that_has_none_there_is_told_its_place(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = 'upstreams.a.limit: the filter "limit" has no settings for an upstream: '
    assert place.problems(upstream("limit: {per_minute: 1}")) == [
        f"config.yaml:2:47: {beside}it goes under `filters`"
    ]
    limit = find_filter("limit", place.directory)
    monkeypatch.setattr(limit, "Config", RateLimit.Config)
    assert place.problems(upstream("limit: {per_minute: 1}")) == [
        f"config.yaml:2:47: {beside}it goes under `filters`; with `per: [upstream]` it counts for "
        "each upstream"
    ]


def test_a_setting_for_an_upstream_under_filters_is_told_its_place(
    place: Place, chain: Chain
) -> None:
    assert place.problems(chain("", "breaker", more="filters: {breaker: {failures: 3}}")) == [
        "config.yaml:5:21: filters.breaker.failures: unknown key: it goes into the section "
        "`breaker` of an upstream"
    ]


def test_a_setting_of_all_upstreams_in_a_section_of_one_is_told_its_place(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, breaker = (find_filter(name, place.directory) for name in ("limit", "breaker"))
    monkeypatch.setattr(breaker, "Config", limit.Config)
    assert place.problems(upstream("breaker: {burst: 3}")) == [
        "config.yaml:2:57: upstreams.a.breaker.burst: unknown key: it goes under `filters.breaker`"
    ]


# References


def test_names_that_do_not_exist_come_with_the_ones_that_were_meant(place: Place) -> None:
    assert place.problems(
        place.SMALLEST
        + "models: {m: [mok], n: [{upstream: moc}], o: {targets: [zzz, {upstream: z}]}}\n"
        + TEAMS
        + "team: serch",
        a=team("search", "chain: defalt\nupstreams: [mock, mck]\nmodels: [m, mm]"),
    ) == [
        'config.yaml:5:14: models.m[0]: there is no upstream "mok", did you mean "mock"?',
        'config.yaml:5:35: models.n[0].upstream: there is no upstream "moc", did you mean "mock"?',
        'config.yaml:5:56: models.o.targets[0]: there is no upstream "zzz"; there are: mock',
        'config.yaml:5:72: models.o.targets[1].upstream: there is no upstream "z"; there are: mock',
        'config.yaml:7:7: team: there is no team "serch", did you mean "search"?',
        'teams/a.yaml:3:8: chain: there is no chain "defalt", did you mean "default"?',
        'teams/a.yaml:4:19: upstreams[1]: there is no upstream "mck", did you mean "mock"?',
        'teams/a.yaml:5:13: models[1]: no model is called "mm", did you mean "m"?',
    ]


def test_without_a_default_chain_the_implicit_team_has_none(place: Place) -> None:
    assert place.problems(place.SMALLEST.replace("default:", "fast:")) == [
        'config.yaml:3:1: chains: there is no chain "default"; there are: fast'
    ]


@pytest.mark.parametrize("pattern", ["gpt-4o", "gpt-*", "*-mini", "qwen-max", "*", "gpt-4?"])
def test_a_teams_models_may_be_patterns_and_meet_patterns(place: Place, pattern: str) -> None:
    models = "models: {gpt-4o: [mock], 'qwen-*': [mock], o3-mini: [mock]}\n"
    assert (
        place.problems(place.SMALLEST + models + TEAMS, a=team("a", f"models: ['{pattern}']")) == []
    )


def test_a_teams_models_that_meet_no_model_are_refused(place: Place) -> None:
    models = "models: {gpt-4o: [mock], 'qwen-*': [mock]}\n"
    config = place.SMALLEST + models + TEAMS
    assert place.problems(config, a=team("a", "models: [gpt-4, 'llama-*']")) == [
        'teams/a.yaml:3:10: models[0]: no model is called "gpt-4", did you mean "gpt-4o"?',
        'teams/a.yaml:3:17: models[1]: no model is called "llama-*": add it to `models`',
    ]


def test_two_files_for_one_team_are_refused(place: Place) -> None:
    assert place.problems(place.SMALLEST + TEAMS, a=team("x"), b=team("x", key=B)) == [
        "teams/b.yaml:1:7: team: teams/a.yaml is this team's file already"
    ]


def test_a_key_that_two_teams_share_is_refused_whatever_its_form(place: Place) -> None:
    place.environ["KEY"] = "a-key-of-a-team"
    place.write("key", "a-key-of-a-team\n")
    assert place.problems(
        place.SMALLEST + TEAMS, a=team("a", key="env:KEY"), b=team("b", key="file:../key")
    ) == ["teams/b.yaml:2:8: keys[0]: the same key as in teams/a.yaml:2: a key tells one team"]


def test_a_team_that_nobody_can_be_is_refused(place: Place) -> None:
    config = place.SMALLEST + TEAMS
    assert place.problems(config, a="team: a\nkeys: []", b=team("b")) == [
        "teams/a.yaml:1:1: nobody can be team a: add `keys`"
    ]
    assert place.problems(config + "team: a", a="team: a", b=team("b")) == []


# Ports


@pytest.mark.parametrize(
    "listen",
    ["127.0.0.1:1", "127.9.9.9:1", "localhost:1", "'[::1]:1'", "unix:/run/x.sock"],
)
def test_a_loopback_port_needs_no_keys(place: Place, listen: str) -> None:
    assert place.problems(place.SMALLEST + f"listen: {listen}") == []


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "'[::]:1'", "10.0.0.1:1", "gateway.local:1"])
def test_a_port_for_all_needs_keys_or_the_word(place: Place, listen: str) -> None:
    config = place.SMALLEST + f"listen: {listen}\n"
    assert place.problems(config) == [
        "config.yaml:5:9: listen: everybody who reaches this address could call: listen on "
        "127.0.0.1, give the teams keys, or say `allow_anyone: true`"
    ]
    assert place.problems(config + "allow_anyone: true") == []
    assert place.problems(config + TEAMS, a=team("a")) == []


def test_a_fixed_team_on_a_port_for_all_needs_the_word(place: Place) -> None:
    config = place.SMALLEST + "listen: 0.0.0.0:80\nteam: a\n" + TEAMS
    assert place.problems(config, a=team("a")) == [
        "config.yaml:5:9: listen: everybody who reaches this address would be team a: listen on "
        "127.0.0.1, or say `allow_anyone: true`"
    ]
    assert place.problems(config + "allow_anyone: true") == []


@pytest.mark.parametrize(
    ("listen", "admin", "collide"),
    [
        ("127.0.0.1:80", "127.0.0.1:80", True),
        ("127.0.0.1:80", "localhost:80", True),
        ("127.0.0.1:80", "0.0.0.0:80", True),
        ("unix:/a", "unix:/a", True),
        ("unix:/a", "unix:/b", False),
        ("127.0.0.1:80", "127.0.0.1:81", False),
        ("127.0.0.1:0", "127.0.0.1:0", False),
        ("127.0.0.1:80", "127.0.0.2:80", False),
        ("unix:/a", "127.0.0.1:80", False),
    ],
)
def test_the_admin_port_is_another_one(
    place: Place, listen: str, admin: str, collide: bool
) -> None:
    message = "config.yaml:6:8: admin: is the address of `listen`: give it a port of its own"
    assert place.problems(f"{place.SMALLEST}listen: {listen}\nadmin: {admin}") == (
        [message] if collide else []
    )


def test_there_need_not_be_an_admin_port(place: Place) -> None:
    assert place.problems(place.SMALLEST + "admin: null") == []


# Upstreams


@pytest.mark.parametrize("name", ["v1", "v1beta", "v2", "v1beta2", "healthz", "metrics"])
def test_an_upstream_cannot_have_the_name_of_an_api_path(place: Place, name: str) -> None:
    assert place.problems(place.SMALLEST.replace("mock:", f"{name}:", 1)) == [
        f"config.yaml:2:3: upstreams.{name}: the name is taken by the API's own paths: choose "
        "another"
    ]


def test_a_key_file_needs_a_certificate(place: Place) -> None:
    place.write("k.pem", "PEM")
    assert place.problems(upstream("tls: {key_file: k.pem}")) == [
        "config.yaml:2:53: upstreams.a.tls.key_file: a key without a certificate: add `cert_file`"
    ]


@pytest.mark.parametrize("url", ["http://h", "mock:", "unix:/run/x.sock"])
def test_tls_settings_need_https(place: Place, url: str) -> None:
    text = upstream("tls: {server_name: x}").replace("https://h", url)
    (problem,) = place.problems(text)
    assert problem.endswith(
        ": upstreams.a.tls: `base_url` is not https: remove the section or change the address"
    )


OWN = "this header is set for each request: remove it"
CREDENTIALS = "credentials belong into the section `sign`: move it there"
NAME = "no header can have this name"
VALUE = "no header can have this value: use visible Latin-1 characters"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bad name", "x", NAME),
        ("", "x", NAME),
        ("x:y", "x", NAME),
        ("Connection", "x", OWN),
        ("transfer-encoding", "x", OWN),
        ("Host", "x", OWN),
        ("Content-Length", "1", OWN),
        ("Authorization", "x", CREDENTIALS),
        ("X-Api-Key", "x", CREDENTIALS),
        ("x-line", "a\\nb", VALUE),
        ("x-line", "a\\r", VALUE),
        ("x-padded", " a", VALUE),
        ("x-wide", "€", VALUE),
        ("x-empty", "", VALUE),
    ],
)
def test_a_header_that_is_impossible_or_not_the_upstreams_is_refused(
    place: Place, name: str, value: str, message: str
) -> None:
    (problem,) = place.problems(upstream(f'headers: {{"{name}": "{value}"}}'))
    assert problem.startswith("config.yaml:2:57: upstreams.a.headers")
    assert problem.endswith(f": {message}")


def test_other_headers_are_the_upstreams(place: Place) -> None:
    assert place.problems(upstream("headers: {x-good: 'yes - é', OpenAI-Project: p}")) == []


# Chains


def test_filters_of_a_chain_must_exist(place: Place, chain: Chain) -> None:
    assert place.problems(chain("plain, plian", "zign")) == [
        'config.yaml:4:27: chains.default.call[1]: there is no filter "plian", did you mean '
        '"plain"?',
        'config.yaml:4:45: chains.default.attempt[0]: there is no filter "zign", did you mean '
        '"sign"?',
    ]


def test_a_filter_of_a_local_file_is_found_beside_the_configuration(
    place: Place, chain: Chain
) -> None:
    place.write(
        "local_check.py",
        "from sidecar.api import CallFilter, FilterConfig\n"
        "class Shout(CallFilter):\n"
        "    class Config(FilterConfig):\n"
        "        volume: int = 1\n",
    )
    try:
        bound = place.bind(
            chain("'local_check:Shout'", more="filters: {'local_check:Shout': {volume: 3}}")
        )
    finally:
        sys.modules.pop("local_check", None)
    (spec,) = bound.policies[0].call
    assert (spec.name, spec.filter_class.__name__) == ("local_check:Shout", "Shout")
    assert spec.config.model_dump() == {"volume": 3}


def test_a_filter_twice_in_one_list_is_refused(place: Place, chain: Chain) -> None:
    assert place.problems(chain("plain, gives, plain")) == [
        'config.yaml:4:34: chains.default.call[2]: "plain" is in this list already: remove one'
    ]


def test_a_chain_in_a_wrong_order_is_refused(place: Place, chain: Chain) -> None:
    assert place.problems(chain("needs, gives, sign", "sign, breaker")) == [
        "config.yaml:4:20: chains.default.call[0]: needs needs fact: put gives before it",
        "config.yaml:4:34: chains.default.call[2]: sign is an attempt filter: move it to the list "
        "`attempt`",
        "config.yaml:4:51: chains.default.attempt[0]: sign must be the last of the list "
        "`attempt`: move it there",
    ]


def test_a_chain_that_nobody_gives_what_is_read_is_refused(place: Place, chain: Chain) -> None:
    assert place.problems(chain("plain, reads")) == [
        "config.yaml:4:27: chains.default.call[1]: reads reads fact: add gives, which gives it, "
        "to the list `call`",
    ]
    assert place.problems(chain("plain", more="  other: {call: [reads], attempt: []}\n")) == [
        "config.yaml:5:18: chains.other.call[0]: reads reads fact: add gives, which gives it, "
        "to the list `call`",
    ]


def test_a_fact_that_no_known_filter_gives_is_told_without_a_name(
    place: Place, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(filters.BUILTIN, "gives")
    assert place.problems(chain("reads")) == [
        "config.yaml:4:20: chains.default.call[0]: reads reads fact: put a filter that gives it "
        "into the chain",
    ]


@pytest.mark.parametrize("call", ["reads, plain, gives", "gives, reads"])
def test_what_is_read_may_be_given_anywhere_in_the_chain(
    place: Place, chain: Chain, call: str
) -> None:
    assert place.problems(chain(call)) == []


def test_the_order_is_left_aside_while_filters_of_the_chain_are_missing(
    place: Place, chain: Chain
) -> None:
    assert len(place.problems(chain("givs, needs"))) == 1


def test_warnings_and_files_of_loading_are_kept(place: Place) -> None:
    config = place.SMALLEST + "models: {a: [mock, mock]}"
    bound = place.bind(config)
    assert len(bound.warnings) == 1
    assert bound.files == (place.directory / "config.yaml",)


# What filters need of the rest


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    """The filters that come with the sidecar, and no stand-ins."""
    monkeypatch.setattr(filters, "BUILTIN", REAL)


@pytest.mark.parametrize(
    ("lines", "place_and_fix"),
    [
        ("cache: {backend: disk}", "filters.cache.backend: disk keeps answers in `data_dir`"),
        ("cache: {backend: redis}", "filters.cache.backend: redis keeps answers in the `store`"),
        ("ledger: {where: disk}", "filters.ledger.where: disk keeps records in `data_dir`"),
        ("ledger: {where: redis}", "filters.ledger.where: redis keeps records in the `store`"),
        (
            "budget: {limits: [{usd: 1, per: day, then: degrade, to: cheep}]}",
            'filters.budget.limits[0].to: "cheep" is not among `models`',
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("real")
def test_setting_that_needs_what_is_not_configured_is_refused_at_load(
    place: Place, lines: str, place_and_fix: str
) -> None:
    config = (
        'upstreams: {mock: {dialect: openai, base_url: "mock:"}}\n'
        f"models: {{cheap: [mock]}}\nfilters:\n  {lines}\n"
    )
    (problem,) = place.problems(config)
    assert place_and_fix in problem
    assert ":4:" in problem


@pytest.mark.usefixtures("real")
def test_model_of_another_dialect_has_no_embeddings(place: Place) -> None:
    config = (
        'upstreams: {mock: {dialect: anthropic, base_url: "mock:"}}\n'
        "models: {embed: [mock]}\n"
        "filters: {semantic_cache: {embedding_model: embed}}\n"
        "chains: {default: {call: [token_counter, semantic_cache]}}\n"
    )
    (problem,) = place.problems(config)
    assert "filters.semantic_cache.embedding_model" in problem
    assert "anthropic dialect" in problem
