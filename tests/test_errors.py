"""The tree of errors: what is told to whom."""

from __future__ import annotations

import inspect

import pytest

from sidecar import errors
from sidecar.errors import (
    CallError,
    ConfigError,
    Phase,
    Problem,
    Rejected,
    Retry,
    SidecarError,
    UpstreamError,
)


def test_every_error_stands_in_the_drawing() -> None:
    drawing = inspect.getdoc(errors) or ""
    for name, found in vars(errors).items():
        if isinstance(found, type) and issubclass(found, SidecarError):
            assert name in drawing


@pytest.mark.parametrize(
    ("child", "parent"),
    [
        (ConfigError, SidecarError),
        (CallError, SidecarError),
        (Rejected, CallError),
        (UpstreamError, CallError),
    ],
)
def test_tree(child: type[Exception], parent: type[Exception]) -> None:
    assert issubclass(child, parent)
    assert not issubclass(Rejected, UpstreamError)
    assert not issubclass(ConfigError, CallError)


def test_problem_names_file_line_column_path_and_fix() -> None:
    problem = Problem("config.yaml", 3, 7, "upstreams.a", 'did you mean "b"?')
    assert str(problem) == 'config.yaml:3:7: upstreams.a: did you mean "b"?'
    assert str(Problem("config.yaml", 0, 0, "", "empty")) == "config.yaml: empty"


def test_config_error_holds_every_problem() -> None:
    problems = [Problem("a", 1, 1, "x", "one"), Problem("b", 2, 2, "y", "two")]
    error = ConfigError(problems)
    assert error.problems == tuple(problems)
    assert str(error) == "a:1:1: x: one\nb:2:2: y: two"


def test_rejection_has_status_code_and_when_to_come_back() -> None:
    error = Rejected(429, "rate_limited", "slow down", retry_after_s=1.5, headers={"x-a": "1"})
    assert (error.status, error.code, error.message) == (429, "rate_limited", "slow down")
    assert (error.retry_after_s, error.headers) == (1.5, {"x-a": "1"})
    assert str(error) == "slow down"
    assert repr(error) == "<Rejected 429 rate_limited: slow down>"
    assert Rejected(400, "x", "y").headers == {}
    assert Rejected(400, "x", "y").retry_after_s is None


def test_errors_headers_are_a_copy() -> None:
    headers = {"x-a": "1"}
    error = Rejected(400, "x", "y", headers=headers)
    error.headers["x-b"] = "2"
    assert headers == {"x-a": "1"}


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("retry", list(Retry))
def test_upstream_error_says_where_and_whether_to_try_again(phase: Phase, retry: Retry) -> None:
    error = UpstreamError(phase, retry, "upstream_closed", "closed", retry_after_s=2.0)
    assert (error.phase, error.retry, error.status) == (phase, retry, 502)
    assert error.retry_after_s == 2.0
    assert error.provider_code == ""
    assert repr(error) == f"<UpstreamError {phase.value} upstream_closed retry={retry.value}>"


@pytest.mark.parametrize("phase", list(Phase))
def test_phases_before_anything_was_sent_by_our_own_decision_are_ours(phase: Phase) -> None:
    assert phase.is_ours is (phase in {Phase.ADMIT, Phase.SIGN, Phase.POOL})


def test_upstream_error_keeps_the_providers_own_word() -> None:
    error = UpstreamError(
        *(Phase.FIRST_EVENT, Retry.SAME, "upstream_error_event", "busy"), provider_code="overloaded"
    )
    assert (error.code, error.provider_code) == ("upstream_error_event", "overloaded")
