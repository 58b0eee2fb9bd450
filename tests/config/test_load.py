from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar.config import load_config
from sidecar.config.load import Loaded
from sidecar.config.schema import Config, TargetSettings, TeamSettings, UpstreamSettings
from sidecar.errors import ConfigError

if TYPE_CHECKING:
    from conftest import Place

HOW_TO = "write env:NAME or file:PATH; a secret never stands in the file"
NO_PROGRAMS = "`exec:` is refused, a configuration never runs programs: write env:NAME or file:PATH"


def test_the_smallest_configuration_has_the_defaults(place: Place) -> None:
    loaded = place.load('upstreams: {mock: {dialect: openai, base_url: "mock:"}}')
    assert loaded.config.listen == "127.0.0.1:8080"
    assert loaded.config.upstreams["mock"].timeouts.connect_s == 5.0
    assert loaded.teams == ()
    assert loaded.files == (place.directory / "config.yaml",)
    assert loaded.warnings == []


def test_a_list_is_short_for_a_models_targets(place: Place) -> None:
    loaded = place.load(place.SMALLEST + "models: {a: [mock], b: {targets: [{upstream: mock}]}}")
    assert loaded.config.models["a"] == loaded.config.models["b"]


def test_every_file_that_was_read_is_listed(place: Place) -> None:
    key = place.write("secrets/key", "key-of-search")
    ca = place.write("ca.pem", "PEM")
    loaded = place.load(
        'upstreams: {a: {dialect: openai, base_url: "https://h", tls: {ca_file: ca.pem}}}\n'
        "teams: teams/*.yaml",
        search="team: search\nkeys: [file:../secrets/key]",
        ads="team: ads\nkeys: ['sha256:" + "a" * 64 + "']",
    )
    assert [team.team for team in loaded.teams] == ["ads", "search"]
    assert loaded.config.upstreams["a"].tls.ca_file == str(ca)
    assert {path.resolve() for path in loaded.files} == {
        place.directory / "config.yaml",
        place.directory / "teams/ads.yaml",
        place.directory / "teams/search.yaml",
        key,
        ca,
    }


def test_a_file_that_is_not_there_is_named(place: Place) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(place.directory / "none.yaml")
    assert (
        str(caught.value)
        == f"{place.directory}/none.yaml: cannot be read: No such file or directory"
    )


def test_a_file_over_one_mebibyte_is_refused(place: Place) -> None:
    assert place.problems("#" + " " * 1024 * 1024) == ["config.yaml: is larger than 1 MiB"]


def test_an_unknown_key_comes_with_the_one_that_was_meant(place: Place) -> None:
    assert place.problems(place.SMALLEST + "listn: x\nhttp: {max_bodybytes: 1}\nlog: {zzz: 1}") == [
        'config.yaml:5:1: listn: unknown key, did you mean "listen"?',
        'config.yaml:6:8: http.max_bodybytes: unknown key, did you mean "max_body_bytes"?',
        "config.yaml:7:7: log.zzz: unknown key; known here: access, level",
    ]


def test_a_filters_settings_outside_of_filters_are_told_their_place(place: Place) -> None:
    text = place.SMALLEST.replace("{call: [],", "{limit: {}, call: [],")
    text += "limit: {burst: 2}\nbreaker: {}\nmodels: {a: {targets: [mock], limit: {}}}\n"
    text += "http: {limit: 1}\n"
    under = "unknown key: it goes under `filters`"
    problems = place.problems(text + "teams: teams/*.yaml\n", a="team: a\nlimit: {burst: 2}\n")
    assert [each.partition(": ")[2] for each in problems] == [
        f"chains.default.limit: {under}",
        f"limit: {under}",
        "breaker: unknown key: it goes into the section `breaker` of an upstream",
        f"models.a.limit: {under}",
        problems[4].partition(": ")[2],
        f"limit: {under}",
    ]
    assert "http.limit: unknown key; known here: " in problems[4]


def test_an_unknown_key_in_a_short_target_comes_with_the_one_that_was_meant(place: Place) -> None:
    assert place.problems(place.SMALLEST + "models:\n  a: [{upstream: mock, modl: x}]") == [
        'config.yaml:6:24: models.a[0].modl: unknown key, did you mean "model"?',
    ]


def test_a_missing_key_is_named(place: Place) -> None:
    assert place.problems("upstreams:\n  a: {base_url: 'mock:'}\n  b: {dialct: openai}") == [
        "config.yaml:2:6: upstreams.a.dialect: is missing: add it",
        'config.yaml:3:6: upstreams.b.dialect: is missing: did you mean it by "dialct"?',
        "config.yaml:3:6: upstreams.b.base_url: is missing: add it",
    ]


STORE_HOW_TO = (
    'write "memory", "redis://host:port/db", "rediss://host:port/db", "unix:///path.sock", '
    "env:NAME or file:PATH"
)


def test_wrong_types_say_what_was_expected_and_found(place: Place) -> None:
    assert place.problems(
        "listen: 8080\nworkers: '2'\ndrain_s: [1]\nallow_anyone: on\nhttp: text\nlog: {level: 3}\n"
        "store: redsi\nadmin: {}\nteam: true\nfilters: {a: null}\nupstreams: {}\nmodels: {m: 1}\n"
        "chains: {default: {call: sign, attempt: [1.5]}}\n"
    ) == [
        "config.yaml:1:9: listen: expected text, found a whole number; write it in quotes",
        "config.yaml:2:10: workers: expected a whole number, found text",
        "config.yaml:3:10: drain_s: expected a number, found a list",
        "config.yaml:4:15: allow_anyone: expected true or false, found text",
        "config.yaml:5:7: http: expected a mapping, found text",
        'config.yaml:6:14: log.level: expected "debug", "info", "warning" or "error", '
        "found a whole number",
        f"config.yaml:7:8: store: {STORE_HOW_TO}",
        "config.yaml:8:8: admin: expected text, found a mapping",
        "config.yaml:9:7: team: expected text, found true; write it in quotes",
        "config.yaml:10:14: filters.a: expected a mapping, found nothing",
        "config.yaml:11:12: upstreams: needs at least 1 entry",
        "config.yaml:12:13: models.m: expected a mapping, found a whole number",
        "config.yaml:13:26: chains.default.call: expected a list, found text; write a list in "
        "brackets: [a, b]",
        "config.yaml:13:42: chains.default.attempt[0]: expected text, found a number; "
        "write it in quotes",
    ]


def test_a_file_that_is_no_mapping_is_refused(place: Place) -> None:
    assert place.problems("[1]") == ["config.yaml:1:1: expected a mapping, found a list"]


def test_limits_are_named(place: Place) -> None:
    assert place.problems(
        place.SMALLEST + "workers: 0\ndrain_s: -1\nhttp: {keepalive_s: .inf, body_silence_s: .nan}"
    ) == [
        "config.yaml:5:10: workers: must be greater than 0",
        "config.yaml:6:10: drain_s: must be at least 0",
        "config.yaml:7:21: http.keepalive_s: must be a finite number",
        "config.yaml:7:43: http.body_silence_s: must be a finite number",
    ]


@pytest.mark.parametrize(
    "address", ["8080", ":8080", "h:x", "h:70000", "::1:80", "unix:a", "[::1:1"]
)
def test_an_address_that_is_none_is_refused(place: Place, address: str) -> None:
    (problem,) = place.problems(f"{place.SMALLEST}listen: '{address}'")
    assert problem.startswith("config.yaml:5:9: listen: write ")


@pytest.mark.parametrize(
    "url", ["ftp://h", "https://u:p@h", "https://h?x", "h", "mock", "unix:rel.sock", "https://h/#x"]
)
def test_a_base_url_that_is_none_is_refused(place: Place, url: str) -> None:
    (problem,) = place.problems(f"upstreams: {{a: {{dialect: openai, base_url: '{url}'}}}}")
    assert problem.startswith('config.yaml:1:44: upstreams.a.base_url: write "https://host')


def test_names_that_are_not_safe_are_refused_at_their_key(place: Place) -> None:
    assert place.problems('upstreams:\n  "a b": {dialect: openai, base_url: "mock:"}') == [
        'config.yaml:2:3: upstreams["a b"]: write a name of letters, digits, ".", "_" and "-", '
        "up to 100"
    ]


def test_filters_are_named_by_a_name_or_by_module_and_class(place: Place) -> None:
    text = place.SMALLEST.replace("call: []", "call: ['a b', 'x:', 'pkg.mod:Class']")
    assert place.problems(text) == [
        'config.yaml:4:20: chains.default.call[0]: write a name of letters, digits, ".", "_" and '
        '"-", up to 100',
        'config.yaml:4:27: chains.default.call[1]: write a filter\'s name or "module:Class"',
    ]


def test_yaml_mistakes_and_wrong_values_are_told_together_in_the_order_of_lines(
    place: Place,
) -> None:
    assert place.problems("workers: x\n" + place.SMALLEST + "drain_s: 1\ndrain_s: 2\nteam: 1") == [
        "config.yaml:1:10: workers: expected a whole number, found text",
        "config.yaml:7:1: drain_s: duplicate key, first in line 6",
        "config.yaml:8:7: team: expected text, found a whole number; write it in quotes",
    ]


def test_the_problems_of_all_files_are_told_together(place: Place) -> None:
    assert place.problems(
        place.SMALLEST + "teams: teams/*.yaml\nworkers: 0",
        a="team: a\nkeys: [env:NONE]",
        b="team: [",
        c="prioriti: high",
    ) == [
        "config.yaml:6:10: workers: must be greater than 0",
        "teams/a.yaml:2:8: keys[0]: the environment variable NONE is not set",
        "teams/b.yaml:2:1: is not YAML: while parsing a flow node, did not find expected node "
        "content",
        "teams/c.yaml:1:1: team: is missing: add it",
        'teams/c.yaml:1:1: prioriti: unknown key, did you mean "priority"?',
    ]


@pytest.mark.parametrize("pattern", ["teams/*.yaml", "none.yaml", '""', '"a\\0b"'])
def test_a_glob_that_matches_no_file_is_refused(place: Place, pattern: str) -> None:
    assert place.problems(f"{place.SMALLEST}teams: {pattern}") == [
        "config.yaml:5:8: teams: no file matches: nobody could call"
    ]


def test_a_directory_with_brackets_in_its_name_is_no_pattern(place: Place) -> None:
    place = place.at("a[b]")
    key = "sha256:" + "a" * 64
    loaded = place.load(place.SMALLEST + "teams: teams/*", t=f"team: t\nkeys: ['{key}']")
    assert [team.team for team in loaded.teams] == ["t"]


# Secrets

CANARY = "canary-0123456789"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (CANARY, HOW_TO),
        ("exec:cat " + CANARY, NO_PROGRAMS),
        ("${" + CANARY + "}", HOW_TO),
    ],
)
def test_a_literal_secret_is_refused_and_not_shown(place: Place, value: str, message: str) -> None:
    assert place.problems(
        place.SMALLEST + "teams: teams/*.yaml", a=f'team: a\nkeys:\n  - "{value}"'
    ) == [f"teams/a.yaml:3:5: keys[0]: {message}"]


def test_a_literal_secret_of_another_type_is_refused(place: Place) -> None:
    assert place.problems(
        place.SMALLEST + "teams: teams/*.yaml", a="team: a\nkeys: [12345678, [x], null]"
    ) == [
        f"teams/a.yaml:2:8: keys[0]: {HOW_TO}",
        f"teams/a.yaml:2:18: keys[1]: {HOW_TO}",
        f"teams/a.yaml:2:23: keys[2]: {HOW_TO}",
    ]


@pytest.mark.parametrize(
    ("proxy", "value"),
    [
        ("http://proxy:3128", "http://proxy:3128"),
        ("http://[::1]:3128/", "http://[::1]:3128/"),
        ("env:PROXY", f"http://u:{CANARY}@proxy:1"),
    ],
)
def test_a_proxy_is_a_url_or_a_reference_to_one(place: Place, proxy: str, value: str) -> None:
    place.environ["PROXY"] = f"http://u:{CANARY}@proxy:1"
    loaded = place.load(
        f"upstreams: {{a: {{dialect: openai, base_url: 'mock:', proxy: '{proxy}'}}}}"
    )
    found = loaded.config.upstreams["a"].proxy
    assert not isinstance(found, str)
    assert (found.reveal(), str(found)) == (value, "***")


@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        (
            f"http://u:{CANARY}@h:1",
            "a password never stands in the file: put the whole URL behind env:NAME or file:PATH",
        ),
        ("socks://h", 'write "env", "none", "http://host:port", env:NAME or file:PATH'),
        ("env:WRONG", "env:WRONG must hold http://[user:password@]host:port"),
        ("env:NONE", "the environment variable NONE is not set"),
    ],
)
def test_a_proxy_that_is_none_is_refused(place: Place, proxy: str, message: str) -> None:
    place.environ["WRONG"] = CANARY
    assert place.problems(
        f"upstreams: {{a: {{dialect: openai, base_url: 'mock:', proxy: '{proxy}'}}}}"
    ) == [f"config.yaml:1:60: upstreams.a.proxy: {message}"]


@pytest.mark.parametrize("proxy", ["env", "none"])
def test_a_proxy_may_be_the_environments_or_none(place: Place, proxy: str) -> None:
    loaded = place.load(f"upstreams: {{a: {{dialect: openai, base_url: 'mock:', proxy: {proxy}}}}}")
    assert loaded.config.upstreams["a"].proxy == proxy


# The store


@pytest.mark.parametrize(
    ("store", "url"),
    [
        ("memory", None),
        ("{}", None),
        ("{url: null}", None),
        ("{url: memory}", None),
        ("redis://store", "redis://store"),
        ("redis://store:6379/0", "redis://store:6379/0"),
        ("redis://127.0.0.1:6379", "redis://127.0.0.1:6379"),
        ("'redis://[::1]:6379/15'", "redis://[::1]:6379/15"),
        ("rediss://store.example:6380/2", "rediss://store.example:6380/2"),
        ("unix:///run/valkey.sock", "unix:///run/valkey.sock"),
        ("'unix:///run/valkey.sock?db=3'", "unix:///run/valkey.sock?db=3"),
        ("env:STORE", f"rediss://user:{CANARY}@store:6380/2"),
        ("file:store_url", f"unix://:{CANARY}@/run/valkey.sock?db=1"),
        ("{url: env:STORE}", f"rediss://user:{CANARY}@store:6380/2"),
    ],
)
def test_a_store_is_memory_or_a_redis_url_or_a_reference_to_one(
    place: Place, store: str, url: str | None
) -> None:
    place.environ["STORE"] = f"rediss://user:{CANARY}@store:6380/2"
    place.write("store_url", f"unix://:{CANARY}@/run/valkey.sock?db=1\n")
    found = place.load(f"{place.SMALLEST}store: {store}").config.store
    assert (found.url.reveal() if found.url else None) == url
    assert found.prefix == "sidecar"
    assert CANARY not in repr(found)


def test_without_a_word_state_lives_in_memory(place: Place) -> None:
    assert place.load().config.store.url is None


def test_a_stores_keys_may_have_another_prefix(place: Place) -> None:
    store = place.load(place.SMALLEST + "store: {url: redis://h, prefix: team-a}").config.store
    assert store.url is not None
    assert (store.url.reveal(), store.prefix) == ("redis://h", "team-a")


@pytest.mark.parametrize(
    ("store", "message"),
    [
        *[
            (text, STORE_HOW_TO)
            for text in (
                *("redsi", "''", "redis", "'redis:'", "redis://", "redis:///0", "http://h:6379"),
                *("redis://h:x", "redis://h:1/db", "redis://h/0/1", "redis://h/1234"),
                *("'redis://h?db=1'", "'redis://h:1/0#x'", "'redis://h 1'", "exec:x"),
                *("unix:/run/a.sock", "unix://run/a.sock", "'unix:///a?x=1'", "REDIS://h"),
            )
        ],
        (
            f"redis://:{CANARY}@h:1",
            "a password never stands in the file: put the whole URL behind env:NAME or file:PATH",
        ),
        (
            f"redis://user:{CANARY}@h",
            "a password never stands in the file: put the whole URL behind env:NAME or file:PATH",
        ),
        ("env:NONE", "the environment variable NONE is not set"),
        ("file:none", "there is no file none"),
        ("env:WRONG", "env:WRONG must hold redis://[user:password@]host[:port][/db]"),
        ("5", "expected a mapping, found a whole number"),
        ("[a]", "expected a mapping, found a list"),
        ("null", "expected a mapping, found nothing"),
    ],
)
def test_a_store_that_is_none_is_refused_and_not_shown(
    place: Place, store: str, message: str
) -> None:
    place.environ["WRONG"] = CANARY
    problems = place.problems(f"{place.SMALLEST}store: {store}")
    assert problems == [f"config.yaml:5:8: store: {message}"]
    assert CANARY not in problems[0]


@pytest.mark.parametrize(
    ("store", "problem"),
    [
        ("{url: 5}", f"config.yaml:5:14: store.url: {STORE_HOW_TO}"),
        ("{url: [x]}", f"config.yaml:5:14: store.url: {STORE_HOW_TO}"),
        (
            "{ulr: redis://h}",
            'config.yaml:5:9: store.ulr: unknown key, did you mean "url"?',
        ),
        (
            "{prefix: 'a b'}",
            'config.yaml:5:17: store.prefix: write a name of letters, digits, ".", "_" and "-", '
            "up to 100",
        ),
        (
            "{prefix: 1}",
            "config.yaml:5:17: store.prefix: expected text, found a whole number; write it in "
            "quotes",
        ),
    ],
)
def test_a_stores_settings_are_refused_at_their_place(
    place: Place, store: str, problem: str
) -> None:
    assert place.problems(f"{place.SMALLEST}store: {store}") == [problem]


def test_a_file_with_a_stores_url_is_watched(place: Place) -> None:
    place.write("store_url", "redis://:password@h")
    bound = place.bind(place.SMALLEST + "store: file:store_url")
    assert place.directory / "store_url" in bound.files


def test_a_certificate_that_is_not_there_is_refused(place: Place) -> None:
    assert place.problems(
        'upstreams: {a: {dialect: openai, base_url: "https://h", tls: {ca_file: ca.pem}}}'
    ) == ["config.yaml:1:72: upstreams.a.tls.ca_file: there is no file ca.pem"]


# Warnings


def test_an_upstream_without_verification_is_worth_a_warning(place: Place) -> None:
    loaded = place.load(
        "upstreams:\n  a:\n    dialect: openai\n    base_url: https://h\n"
        "    tls: {insecure_skip_verify: true}"
    )
    assert loaded.warnings == [
        f"{place.directory}/config.yaml:5:33: upstreams.a.tls.insecure_skip_verify: the upstream's "
        "certificate is not verified: anyone on the way can read and answer"
    ]


def test_a_model_with_several_targets_is_worth_a_warning(place: Place) -> None:
    loaded = place.load(place.SMALLEST + "models:\n  a: [mock, mock]\n  b: [mock]")
    assert loaded.warnings == [
        f"{place.directory}/config.yaml:6:6: models.a: only the first target is used, unless a "
        "filter chooses another"
    ]


# Everything

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["mock:", "openai", "env:X", "file:/", "sign", "default", "a:b", "*"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=5)
            | st.integers()
            | st.sampled_from(
                [
                    *(*Config.model_fields, *UpstreamSettings.model_fields),
                    *(*TeamSettings.model_fields, *TargetSettings.model_fields),
                    *("default", "call", "attempt", "targets", "limit", "sign", "scheme", "key"),
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=25,
)


def outcome(place: Place, config: Any, team: Any) -> None:
    """Neither loads nor binds it, or does: anything but another exception."""
    config_text, team_text = (yaml.dump(each, Dumper=yaml.CSafeDumper) for each in (config, team))
    with contextlib.suppress(ConfigError):
        place.bind(config_text, junk=team_text)


FEW = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FEW
@given(config=JUNK, team=JUNK)
def test_any_junk_is_a_config_error_or_loads(place: Place, config: Any, team: Any) -> None:
    outcome(place, config, team)


@FEW
@given(
    junk=st.dictionaries(
        st.sampled_from(
            sorted(
                [
                    "listen",
                    "admin",
                    "upstreams",
                    "models",
                    "filters",
                    "chains",
                    "team",
                    "allow_anyone",
                ]
            )
        ),
        JUNK,
    ),
    team=JUNK,
)
def test_a_good_configuration_with_some_junk_is_a_config_error_or_loads(
    place: Place, junk: Any, team: Any
) -> None:
    good = yaml.safe_load(place.SMALLEST)
    outcome(place, {**good, "teams": "teams/*.yaml", **junk}, {"team": "a", "filters": team})


@FEW
@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_config_error_or_load(place: Place, content: bytes) -> None:
    with contextlib.suppress(ConfigError):
        load_config(place.write("config.yaml", content), {})


def test_loading_needs_no_server_and_no_metrics_library() -> None:
    code = (
        "import sys, sidecar.config\n"
        "unwanted = {'aiohttp', 'uvloop', 'prometheus_client', 'httptools'} & {*sys.modules}\n"
        "sys.exit(', '.join(unwanted))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr.strip() == ""


def test_loading_and_binding_is_a_matter_of_milliseconds(place: Place) -> None:
    models = "".join(f"  model-{i}: [mock]\n" for i in range(50))
    config = place.SMALLEST + "models:\n" + models
    place.bind(config)  # imports
    times = []
    for _ in range(5):
        start = time.perf_counter()
        place.bind(config)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.015


def test_the_loaded_configuration_shows_no_secret(place: Place) -> None:
    place.environ["KEY"] = CANARY
    loaded: Loaded = place.load(
        place.SMALLEST + "teams: teams/*.yaml", a="team: a\nkeys: [env:KEY]"
    )
    assert loaded.teams[0].keys[0].reveal() == CANARY
    assert CANARY not in repr(loaded)
