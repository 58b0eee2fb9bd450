import copy
import json
import pickle

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

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
