"""A provider that believes no request: it makes each signature itself, from what came on the wire.

Wherever a provider's SDK has a signer that one is asked, the rest is written from the provider's
documentation with the standard library; nothing here comes from the signers that are tested. What
the SDKs get is the request rebuilt from its very bytes, and the time that it claims.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol
from unittest.mock import patch
from urllib.parse import parse_qsl, quote, unquote, unquote_to_bytes, urlsplit

from aiohttp import web
from alibabacloud_tea_openapi.utils import Utils as AlibabaUtils
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as AwsCredentials
from tencentcloud.common.sign import Sign as TencentSign
from volcengine.auth.SignerV4 import SignerV4
from volcengine.auth.SignParam import SignParam
from volcengine.Credentials import Credentials as VolcengineCredentials
from xfyunsdkcore.signature import Signature as IflytekSignature

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "invalid escape sequence")  # when it is compiled
    from baidubce.auth import bce_v1_signer
    from baidubce.auth.bce_credentials import BceCredentials
    from baidubce.utils import normalize_string

TOLERANCE_S = 300.0
"""The strictest provider's."""

CLIENT_SECRET = "client-canary"
"""Stands in everything that a client sends as a credential; none of it may arrive."""

LONG_AGO = (
    *("19990101T000000Z", "1999-01-01T00:00:00Z", "915148800", "Fri, 01 Jan 1999 00:00:00 GMT"),
    "Fri%2C%2001%20Jan%201999%2000%3A00%3A00%20GMT",
)
"""One time as each scheme writes it, for what a client signed itself; it may not arrive either."""

BASIC_DATE_TIME = "%Y%m%dT%H%M%SZ"
DATE_TIME = "%Y-%m-%dT%H:%M:%SZ"
RFC_1123 = "%a, %d %b %Y %H:%M:%S GMT"


class MovingClock:
    """A wall clock on which each reading is a second after the one before.

    It starts right before a year ends: between the attempts of a test, every part of a date turns.
    """

    def __init__(self) -> None:
        self.now = datetime(2026, 12, 31, 23, 59, 57, 250_000, UTC).timestamp()

    def wall(self) -> float:
        self.now += 1.0
        return self.now


class Refused(Exception):
    """A provider would not believe this request; the message says why."""


class Proof(NamedTuple):
    """What a verified request showed beside its key; both empty where a scheme has neither."""

    at: float | None = None
    """When it was signed, in Unix seconds."""
    once: str = ""
    """What no second request may show: a nonce, or a signature over a time."""


@dataclass(frozen=True)
class Received:
    """A request as it came, undecoded but for names in lower case."""

    method: str
    target: str
    fields: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        return self.target.partition("?")[2]

    @property
    def parameters(self) -> list[tuple[str, str]]:
        return parse_qsl(self.query, keep_blank_values=True)

    @property
    def body_hash(self) -> str:
        return hashlib.sha256(self.body).hexdigest()

    def all(self, name: str) -> list[str]:
        return [value.strip() for each, value in self.fields if each == name]

    def one(self, name: str) -> str:
        """The value of a field that has to be there, once."""
        values = self.all(name)
        if len(values) != 1:
            raise Refused(f"{name} came {len(values)} times")
        return values[0]

    def one_parameter(self, name: str) -> str:
        values = [value for each, value in self.parameters if each == name]
        if len(values) != 1:
            raise Refused(f"parameter {name} came {len(values)} times")
        return values[0]

    def named(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """The fields with these names, each of which has to be there."""
        for name in names:
            if not self.all(name):
                raise Refused(f"{name} was signed, but did not come")
        return [(name, value) for name, value in self.fields if name in names]


class Verifier(Protocol):
    """One scheme with one key."""

    def verify(self, request: Received) -> Proof:
        """Raises `Refused`."""
        ...


class Pairs(list[tuple[Any, Any]]):
    """Names and values for an SDK that takes a mapping, with repeated names."""

    def items(self) -> Iterator[tuple[Any, Any]]:
        return iter(self)


def check(theirs: object, came: object, what: str) -> None:
    if theirs != came:
        raise Refused(f"{what}: expected {theirs!r}, came {came!r}")


def seconds(text: str, form: str) -> float:
    try:
        return datetime.strptime(text, form).replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise Refused(f"{text!r} is no time") from None


def are_signed(names: Sequence[str], request: Received, *required: str, prefix: str = "") -> None:
    """Refuses when a field that has to be signed is not, or the list is no list of names."""
    check(sorted(set(names)), list(names), "the signed names")
    present = {each for each, value in request.fields if value}
    wanted = set(required) | {each for each in present if prefix and each.startswith(prefix)}
    if "content-type" in present:
        wanted.add("content-type")
    if missing := wanted - set(names):
        raise Refused(f"not signed: {', '.join(sorted(missing))}")


def read_authorization(text: str, algorithm: str, separator: str) -> dict[str, str]:
    """`ALGORITHM Credential=…,SignedHeaders=…,Signature=…`."""
    found, _, rest = text.partition(" ")
    check(algorithm, found, "the algorithm")
    parts = dict(part.partition("=")[::2] for part in rest.split(separator))
    check(["Credential", "SignedHeaders", "Signature"], list(parts), "the parts of authorization")
    return parts


# Keys that are sent as they are


@dataclass(frozen=True)
class Fixed:
    """Fields and query parameters with these values, each once."""

    fields: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)

    def verify(self, request: Received) -> Proof:
        for name, value in self.fields.items():
            check(value, request.one(name), name)
        for name, value in self.parameters.items():
            check(value, request.one_parameter(name), f"parameter {name}")
        return Proof()


def bearer(key: str) -> Fixed:
    return Fixed({"authorization": f"Bearer {key}"})


def basic(username: str, password: str) -> Fixed:
    pair = base64.b64encode(f"{username}:{password}".encode()).decode()
    return Fixed({"authorization": f"Basic {pair}"})


# Signatures


@dataclass(frozen=True)
class Aws:
    """AWS Signature Version 4, by botocore."""

    key_id: str
    key: str
    region: str
    service: str
    token: str | None = None

    def verify(self, request: Received) -> Proof:
        at = seconds(request.one("x-amz-date"), BASIC_DATE_TIME)
        if self.token is not None:
            check(self.token, request.one("x-amz-security-token"), "x-amz-security-token")
        if request.all("x-amz-content-sha256"):  # botocore believes it
            check(request.body_hash, request.one("x-amz-content-sha256"), "x-amz-content-sha256")
        url = f"http://{request.one('host')}{request.target}"
        theirs = AWSRequest(method=request.method, url=url, data=request.body)
        for name, value in request.fields:
            theirs.headers.add_header(name, value)
        credentials = AwsCredentials(self.key_id, self.key, self.token)
        clock = datetime.fromtimestamp(at, UTC)
        with patch("botocore.auth.get_current_datetime", lambda: clock):
            SigV4Auth(credentials, self.service, self.region).add_auth(theirs)
        came = request.one("authorization")
        check(theirs.headers["authorization"], came, "authorization")
        return Proof(at, came)


@dataclass(frozen=True)
class Bce:
    """Baidu's bce-auth-v1, by its SDK."""

    key_id: str
    key: str
    token: str | None = None

    def verify(self, request: Received) -> Proof:
        came = request.one("authorization")
        parts = came.split("/")
        check(6, len(parts), "the parts of authorization")
        _, _, time, lifetime_s, names, _ = parts
        signed = names.split(";") if names else []
        if signed:  # none stands for the provider's default set
            are_signed(signed, request, "host", prefix="x-bce-")
        at = seconds(time, DATE_TIME)
        if request.all("x-bce-date"):
            check(time, request.one("x-bce-date"), "x-bce-date")
        if self.token is not None:
            check(self.token, request.one("x-bce-security-token"), "x-bce-security-token")
        headers = {
            name.encode(): value.encode(errors="surrogateescape")
            for name, value in (request.named(signed) if signed else request.fields)
        }
        theirs = bce_v1_signer.sign(
            BceCredentials(self.key_id, self.key),
            request.method.encode(),
            normalize_string(unquote_to_bytes(request.path), encoding_slash=False),
            headers,
            Pairs(request.parameters),
            int(at),
            int(lifetime_s),
            [name.encode() for name in signed],
        )
        check(theirs.decode(), came, "authorization")
        return Proof(at, came)


@dataclass(frozen=True)
class Acs3:
    """Alibaba Cloud's ACS3-HMAC-SHA256, by its SDK."""

    key_id: str
    key: str
    action: str
    version: str
    token: str | None = None

    def verify(self, request: Received) -> Proof:
        check(self.action, request.one("x-acs-action"), "x-acs-action")
        check(self.version, request.one("x-acs-version"), "x-acs-version")
        check(request.body_hash, request.one("x-acs-content-sha256"), "x-acs-content-sha256")
        if self.token is not None:
            check(self.token, request.one("x-acs-security-token"), "x-acs-security-token")
        algorithm, came = "ACS3-HMAC-SHA256", request.one("authorization")
        parts = read_authorization(came, algorithm, ",")
        signed = parts["SignedHeaders"].split(";")
        are_signed(signed, request, "host", prefix="x-acs-")
        theirs = SimpleNamespace(
            method=request.method,
            pathname=AlibabaUtils.get_encode_path(unquote(request.path)),
            query=None,
            headers=Pairs(request.named(signed)),
        )
        # The SDK has no repeated parameters, and does not encode names.
        encoded = [
            (quote(name, safe=""), quote(value, safe="")) for name, value in request.parameters
        ]
        encoded.sort(key=lambda pair: pair[0])
        query = "&".join(f"{name}={value}" for name, value in encoded)
        with patch("alibabacloud_tea_openapi.utils.get_canonical_query_string", lambda _: query):
            expected = AlibabaUtils.get_authorization(
                theirs, algorithm, request.body_hash, self.key_id, self.key
            )
        check(expected, came, "authorization")
        nonce = request.one("x-acs-signature-nonce")
        return Proof(seconds(request.one("x-acs-date"), DATE_TIME), nonce)


@dataclass(frozen=True)
class Tc3:
    """Tencent Cloud's TC3-HMAC-SHA256: the text by its documentation, the signature by its SDK."""

    key_id: str
    key: str
    service: str
    headers: Mapping[str, str]
    """Such as the action, which have to come as they are here."""
    token: str | None = None
    signs_body: bool = True

    def verify(self, request: Received) -> Proof:
        for name, value in self.headers.items():
            check(value, request.one(name), name)
        if self.token is not None:
            check(self.token, request.one("x-tc-token"), "x-tc-token")
        algorithm, came = "TC3-HMAC-SHA256", request.one("authorization")
        parts = read_authorization(came, algorithm, ", ")
        signed = parts["SignedHeaders"].split(";")
        are_signed(signed, request, "content-type", "host")
        values = dict(request.named(signed))
        if "x-tc-action" in values:
            values["x-tc-action"] = values["x-tc-action"].lower()
        payload_hash = request.body_hash
        if not self.signs_body:
            check("UNSIGNED-PAYLOAD", request.one("x-tc-content-sha256"), "x-tc-content-sha256")
            payload_hash = hashlib.sha256(b"UNSIGNED-PAYLOAD").hexdigest()
        lines = [
            request.method,
            "/",
            request.query if request.method == "GET" else "",
            *[f"{name}:{values[name].strip()}" for name in signed],
            "",
            ";".join(signed),
            payload_hash,
        ]
        canonical = "\n".join(lines).encode(errors="surrogateescape")
        time = request.one("x-tc-timestamp")
        at = int(time)
        date = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")
        scope = f"{date}/{self.service}/tc3_request"
        text = f"{algorithm}\n{time}\n{scope}\n{hashlib.sha256(canonical).hexdigest()}"
        signature = TencentSign.sign_tc3(self.key, date, self.service, text)
        check(f"{self.key_id}/{scope}", parts["Credential"], "the credential")
        check(signature, parts["Signature"], "the signature")
        return Proof(at, came)


@dataclass(frozen=True)
class Volcengine:
    """Volcengine's HMAC-SHA256, by its SDK."""

    key_id: str
    key: str
    region: str
    service: str
    token: str | None = None

    def verify(self, request: Received) -> Proof:
        at = seconds(request.one("x-date"), BASIC_DATE_TIME)
        check(request.body_hash, request.one("x-content-sha256"), "x-content-sha256")
        if self.token is not None:
            check(self.token, request.one("x-security-token"), "x-security-token")
        came = request.one("authorization")
        signed = read_authorization(came, "HMAC-SHA256", ", ")["SignedHeaders"].split(";")
        are_signed(signed, request, "host", prefix="x-")
        theirs = SignParam()
        theirs.method = request.method
        theirs.path = unquote(request.path)
        theirs.body = request.body
        theirs.date = datetime.fromtimestamp(at, UTC)
        theirs.query = {}
        for name, value in request.parameters:
            theirs.query.setdefault(name, []).append(value)
        theirs.header_list = {
            "-".join(part.capitalize() for part in name.split("-")): value.strip()
            for name, value in request.named(signed)
        }
        credentials = VolcengineCredentials(
            self.key_id, self.key, self.service, self.region, self.token or ""
        )
        result = SignerV4.sign_only(theirs, credentials)
        check(result.authorization, came, "authorization")
        return Proof(at, came)


@dataclass(frozen=True)
class Iflytek:
    """iFlytek's signature in the query or in headers, by its SDK."""

    key: str
    secret: str
    in_query: bool

    def verify(self, request: Received) -> Proof:
        host = request.one("host")
        url = f"http://{host}{request.path}"
        date = request.one_parameter("date") if self.in_query else request.one("date")
        with patch("xfyunsdkcore.signature.format_date_time", lambda _: date):
            if self.in_query:
                signed = IflytekSignature.create_signed_url(
                    url, self.key, self.secret, request.method
                )
                theirs = dict(parse_qsl(urlsplit(signed).query))
                check(host, request.one_parameter("host"), "parameter host")
                came = request.one_parameter("authorization")
                check(theirs["authorization"], came, "parameter authorization")
            else:
                theirs = IflytekSignature.get_digest_header(
                    url, self.key, self.secret, request.body.decode(), request.method
                )
                check(theirs["Digest"], request.one("digest"), "digest")
                came = request.one("authorization")
                check(theirs["Authorization"], came, "authorization")
        return Proof(seconds(date, RFC_1123), came)


@dataclass(frozen=True)
class Zhipu:
    """Zhipu's JSON web token, by RFC 7515."""

    key: str

    def verify(self, request: Received) -> Proof:
        key_id, _, secret = self.key.partition(".")
        kind, _, token = request.one("authorization").partition(" ")
        check("Bearer", kind, "the scheme")
        text, _, signature = token.rpartition(".")
        theirs = hmac.digest(secret.encode(), text.encode(), "sha256")
        check(theirs, self._decoded(signature), "the signature")
        header, payload = (json.loads(self._decoded(part)) for part in text.split("."))
        check({"alg": "HS256", "sign_type": "SIGN", "typ": "JWT"}, header, "the token's header")
        check({"api_key", "exp", "timestamp"}, set(payload), "the token's fields")
        check(key_id, payload["api_key"], "api_key")
        if not payload["timestamp"] < payload["exp"]:
            raise Refused("the token expires before it begins")
        return Proof(payload["timestamp"] / 1000)

    @staticmethod
    def _decoded(part: str) -> bytes:
        return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


# Tokens that keys are exchanged for


class Granting(ABC):
    """A scheme whose calls carry a token, and its token endpoint; only the last token is good."""

    token_path: str

    def __init__(self) -> None:
        self.token = ""
        self.granted = 0

    @abstractmethod
    def grant(self, request: Received) -> tuple[Proof, Mapping[str, Any]]:
        """Verify a request for a token; the answer with a new one. Raises `Refused`."""

    @abstractmethod
    def verify(self, request: Received) -> Proof: ...

    def new_token(self) -> str:
        self.granted += 1
        self.token = f"granted-token-{self.granted}"
        return self.token


class BaiduOauth(Granting):
    """Baidu's OAuth: the token goes into the query of calls (Qianfan v1)."""

    token_path = "/oauth/2.0/token"

    def __init__(self, key: str, secret: str) -> None:
        super().__init__()
        self._key = key
        self._secret = secret

    def grant(self, request: Received) -> tuple[Proof, Mapping[str, Any]]:
        wanted = {"client_id": self._key, "client_secret": self._secret}
        wanted["grant_type"] = "client_credentials"
        check("POST", request.method, "the method")
        proof = Fixed(parameters=wanted).verify(request)
        return proof, {"access_token": self.new_token(), "expires_in": 2_592_000}

    def verify(self, request: Received) -> Proof:
        return Fixed(parameters={"access_token": self.token}).verify(request)


class BceBearer(Granting):
    """Baidu's IAM: the token goes into `Authorization: Bearer` (Qianfan v2)."""

    token_path = "/v1/BCE-BEARER/token"

    def __init__(self, key_id: str, key: str) -> None:
        super().__init__()
        self._bce = Bce(key_id, key)

    def grant(self, request: Received) -> tuple[Proof, Mapping[str, Any]]:
        check("GET", request.method, "the method")
        check(True, int(request.one_parameter("expireInSeconds")) > 0, "expireInSeconds")
        proof = self._bce.verify(request)
        assert proof.at is not None
        lifetime_s = int(request.one_parameter("expireInSeconds"))
        expires_at = datetime.fromtimestamp(proof.at + lifetime_s, UTC).strftime(DATE_TIME)
        return proof, {"token": self.new_token(), "expireTime": expires_at}

    def verify(self, request: Received) -> Proof:
        return bearer(self.token).verify(request)


class VolcengineArk(Granting):
    """Ark's control plane: the API key goes into `Authorization: Bearer`."""

    token_path = "/"

    def __init__(self, key_id: str, key: str, resources: Sequence[str]) -> None:
        super().__init__()
        self._volcengine = Volcengine(key_id, key, "cn-beijing", "ark")
        self._resources = list(resources)

    def grant(self, request: Received) -> tuple[Proof, Mapping[str, Any]]:
        check("POST", request.method, "the method")
        check("GetApiKey", request.one_parameter("Action"), "Action")
        check("2024-01-01", request.one_parameter("Version"), "Version")
        proof = self._volcengine.verify(request)
        asked = json.loads(request.body)
        check(self._resources, asked["ResourceIds"], "ResourceIds")
        assert proof.at is not None
        result = {
            "ApiKey": self.new_token(),
            "ExpiredTime": int(proof.at) + asked["DurationSeconds"],
        }
        return proof, {"ResponseMetadata": {"RequestId": "1"}, "Result": result}

    def verify(self, request: Received) -> Proof:
        return bearer(self.token).verify(request)


# The server


class VerifyingServer:
    """A provider that answers 200 to the requests it believes, and 401 to all others.

    `statuses` are for the next requests that it believes, in place of 200.
    """

    def __init__(self, verifier: Verifier, clock: MovingClock) -> None:
        self.verifier = verifier
        self.url = ""
        self.statuses: deque[int] = deque()
        # Of calls, not of requests that fetch a token:
        self.begun = 0
        """How many heads came."""
        self.received: list[Received] = []
        """Those it believed."""
        self.proofs: list[Proof] = []
        """What they showed."""
        self.refusals: list[str] = []
        """Why it did not believe a request, of any kind."""
        self._clock = clock
        self._once: set[str] = set()

    def believe(self, request: Received) -> tuple[Proof, Mapping[str, Any] | None]:
        """What the request shows, and the answer to one that fetches a token. Raises `Refused`."""
        head = f"{request.target}\n{request.fields}".encode(errors="surrogateescape")
        for each in (CLIENT_SECRET, *LONG_AGO):
            if each.encode() in head or each.encode() in request.body:
                raise Refused(f"the client's {each!r} arrived")
        if len(request.all("authorization")) > 1:
            raise Refused("authorization came more than once")
        answer: Mapping[str, Any] | None = None
        granting = self._granting(request.path)
        if granting is not None:
            proof, answer = granting.grant(request)
        else:
            proof = self.verifier.verify(request)
        if proof.at is not None and abs(proof.at - self._clock.now) > TOLERANCE_S:
            raise Refused(f"signed at {proof.at}, and now it is {self._clock.now}")
        if proof.once:
            if proof.once in self._once:
                raise Refused(f"{proof.once!r} came before")
            self._once.add(proof.once)
        return proof, answer

    def _granting(self, path: str) -> Granting | None:
        """Who gives out tokens at this path."""
        verifier = self.verifier
        return verifier if isinstance(verifier, Granting) and path == verifier.token_path else None

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        self.begun += self._granting(path) is None
        fields = [
            (name.decode().lower(), value.decode("utf-8", "surrogateescape"))
            for name, value in request.raw_headers
        ]
        received = Received(request.method, request.raw_path, tuple(fields), await request.read())
        try:
            proof, answer = self.believe(received)
        except Refused as refusal:
            self.refusals.append(str(refusal))
            return web.json_response({"refused": str(refusal)}, status=401)
        if answer is not None:
            return web.json_response(answer)
        self.received.append(received)
        self.proofs.append(proof)
        status = self.statuses.popleft() if self.statuses else 200
        return web.json_response({"verified": len(self.received)}, status=status)


@asynccontextmanager
async def verifying(verifier: Verifier, clock: MovingClock) -> AsyncIterator[VerifyingServer]:
    """A running one, on a free port of 127.0.0.1."""
    server = VerifyingServer(verifier, clock)
    runner = web.ServerRunner(web.Server(server.answer))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        server.url = f"http://{host}:{port}"
        yield server
    finally:
        await runner.cleanup()
