import copy
import dataclasses
import json
import logging
import pickle
import pprint
import traceback
from collections.abc import Callable
from typing import Any

import orjson
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sidecar.config.references import References
from sidecar.config.secret import Secret, TeamKey

CANARY = "canary-0123456789"


class Holder(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)
    key: Secret
    more: list[Secret] = []


def test_only_reveal_shows_the_value() -> None:
    secret = Secret(CANARY, "env:KEY")
    holder = Holder(key=secret, more=[secret])
    shown = [
        str(secret),
        repr(secret),
        f"{secret}",
        f"{secret:>30}",
        "%s %r" % (secret, secret),  # noqa: UP031
        repr([secret]),
        str(holder),
        repr(holder),
        holder.model_dump_json(),
        str(holder.model_dump()),
        json.dumps(holder.model_dump(mode="json")),
        json.dumps(holder.model_dump(), default=str),
        str(pickle.dumps(secret)),
        str(pickle.dumps(holder)),
        str(copy.deepcopy(holder)),
    ]
    assert secret.reveal() == CANARY
    assert not [text for text in shown if CANARY in text]
    assert holder.model_dump_json() == '{"key":"***","more":["***"]}'


@dataclasses.dataclass
class Keeper:
    key: Secret


def traceback_of(error: BaseException) -> str:
    """With the variables of its frames, as reporters of errors write it."""
    report = traceback.TracebackException.from_exception(error, capture_locals=True)
    return "".join(report.format())


def failing_with(secret: Secret) -> str:
    try:
        raise RuntimeError(f"{secret}", secret)
    except RuntimeError as error:
        return traceback_of(error)


@pytest.mark.parametrize(
    "show",
    [
        failing_with,
        pprint.pformat,
        lambda secret: repr(Keeper(secret)),
        lambda secret: repr(dataclasses.asdict(Keeper(secret))),
        lambda secret: repr({secret: [secret]}),
        lambda secret: f"{secret} {secret!r} {secret!s} {secret!a} {secret:s} {secret:40}",
        lambda secret: "".join(["%10s" % secret, "%a" % secret]),  # noqa: UP031
        lambda secret: logging.makeLogRecord({"msg": "%s", "args": (secret,)}).getMessage(),
        lambda secret: orjson.dumps({"key": secret}, default=str).decode(),
        lambda secret: yaml.dump({"key": secret}),
    ],
)
def test_a_secret_stays_hidden_in_whatever_holds_it(show: Callable[[Secret], str]) -> None:
    for secret in (Secret(CANARY, "env:KEY"), Secret(CANARY), TeamKey(CANARY, "file:key")):
        shown = show(secret)
        assert "***" in shown
        assert CANARY not in shown


@pytest.mark.parametrize(
    "write",
    [
        lambda secret: json.dumps({"key": secret}),
        lambda secret: orjson.dumps({"key": secret}),
        lambda secret: yaml.safe_dump({"key": secret}),
        lambda secret: "".join([secret]),
        lambda secret: "key " + secret,
        lambda secret: bytes(secret),
        lambda secret: int(secret),
        lambda secret: secret["key"],
        lambda secret: secret.strip(),
    ],
)
def test_whoever_cannot_use_a_secret_does_not_show_it(write: Callable[[Any], object]) -> None:
    with pytest.raises((TypeError, AttributeError, yaml.YAMLError)) as caught:
        write(Secret(CANARY))
    assert CANARY not in f"{caught.value!r} {traceback_of(caught.value)}"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [Secret, TeamKey])
def test_no_protocol_pickles_a_value(protocol: int, kind: type[Secret]) -> None:
    data = pickle.dumps({"key": kind(CANARY, "env:KEY")}, protocol)
    assert CANARY.encode() not in data
    assert pickle.loads(data)["key"].reference == "env:KEY"


class Strict(BaseModel):
    """Settings of somebody who has not thought of hiding what was given."""

    key: Secret
    count: int = Field(gt=0)


def test_a_validation_error_beside_a_secret_does_not_show_it(references: References) -> None:
    for values in (
        {"key": "env:KEY", "count": 0},
        {"key": Secret(CANARY), "count": "x"},
        {"key": [Secret(CANARY)], "count": 1},
        {"count": {"key": Secret(CANARY)}},
    ):
        with pytest.raises(ValidationError) as caught:
            Strict.model_validate(values, context=references)
        error = caught.value
        shown = [str(error), repr(error), repr(error.errors()), traceback_of(error)]
        assert not [text for text in shown if CANARY in text]


def test_a_pickled_secret_has_lost_its_value() -> None:
    assert pickle.loads(pickle.dumps(Secret(CANARY, "env:KEY"))).reveal() == "***"


def test_a_copy_keeps_its_value() -> None:
    holder = Holder(key=Secret(CANARY))
    assert copy.deepcopy(holder).key.reveal() == CANARY
    assert holder.model_copy(deep=True).key.reveal() == CANARY
    assert copy.copy(holder.key).reveal() == CANARY


def test_secrets_are_equal_by_value() -> None:
    assert Secret(CANARY, "env:A") == Secret(CANARY, "env:B")
    assert hash(Secret(CANARY)) == hash(Secret(CANARY, "x"))
    assert Secret(CANARY) != Secret("another-value")
    assert Secret(CANARY) != CANARY


def test_without_references_text_is_refused_and_not_shown() -> None:
    with pytest.raises(ValidationError) as caught:
        Holder.model_validate({"key": CANARY})
    (error,) = caught.value.errors(include_input=False)
    assert error["msg"] == (
        "Value error, write env:NAME or file:PATH; a secret never stands in the file"
    )


def test_a_field_resolves_its_reference(references: References) -> None:
    holder = Holder.model_validate({"key": "env:KEY", "more": ["env:KEY"]}, context=references)
    assert holder.key.reveal() == CANARY
    assert holder.key.reference == "env:KEY"
    assert holder.more == [holder.key]


def test_the_digest_is_that_of_the_value_or_the_given_one(references: References) -> None:
    digest = Secret(CANARY).sha256()
    key = TeamKey.refer(f"sha256:{digest.upper()}", references)
    assert key.sha256() == digest == TeamKey.refer("env:KEY", references).sha256()
    assert key.reference == f"sha256:{digest[:8]}…"


@pytest.mark.parametrize("digest", ["", "abc", "g" * 64, "a" * 65])
def test_a_digest_that_is_none_is_refused(digest: str, references: References) -> None:
    with pytest.raises(
        ValueError, match="write sha256: and the 64 hex digits of the key's SHA-256"
    ):
        TeamKey.refer(f"sha256:{digest}", references)


def test_only_team_keys_can_be_digests(references: References) -> None:
    with pytest.raises(ValueError, match="write env:NAME or file:PATH"):
        Secret.refer("sha256:" + "a" * 64, references)


@pytest.fixture
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(tmp_path_factory.mktemp("config"), {"KEY": CANARY})
