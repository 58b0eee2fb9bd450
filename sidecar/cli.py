"""The command line: run, check, usage, sign, mock. What each needs is imported when it runs."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from sidecar import __version__

if TYPE_CHECKING:
    from sidecar.config import Bound
    from sidecar.filter import FilterConfig


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sidecar")
def main() -> None:
    """A reverse proxy for LLM APIs, to run beside your application."""


EVENT_STREAM_FRAME = "aws-eventstream-frame"
_CONFIG = click.Path(exists=True, dir_okay=False, path_type=Path)
_FILE = click.Path(path_type=Path)


@main.command()
@click.argument("file", type=_FILE, required=False)
@click.option("--config", "option", type=_FILE, help="The same as FILE.  [default: config.yaml]")
@click.option("--listen", help="Data port instead of the file's: host:port or unix:/path.")
@click.option("--admin", help="Admin port instead of the file's; `none`: no admin port.")
@click.option("--workers", type=click.IntRange(1, 256), help="Processes that share the data port.")
@click.option("--share", type=(int, int, str, str), hidden=True)
def run(
    file: Path | None,
    option: Path | None,
    listen: str | None,
    admin: str | None,
    workers: int | None,
    share: tuple[int, int, str, str] | None,
) -> None:
    """Serve FILE until SIGTERM or SIGINT; a second one stops at once.

    \b
    Exit codes
      0    stopped, every call had ended
      1    could not start: port in use, a filter that failed
      2    the configuration does not load
      3    stopped, calls were aborted after drain_s
      130  stopped at once by a second signal
    """
    path = _one_file(file, option)
    overrides: dict[str, Any] = {}
    if listen is not None:
        overrides["listen"] = listen
    if admin is not None:
        overrides["admin"] = None if admin == "none" else admin
    if workers is not None:
        overrides["workers"] = workers
    bound = _load_or_exit(path, overrides)

    from sidecar import log
    from sidecar.process import serve, supervise
    from sidecar.server import Share

    log.set_up(bound.config.log.level)
    if share is not None:
        code = _run(serve(path, bound, overrides, Share(*share)))
    elif bound.config.workers > 1:
        code = _run(supervise(path, bound, overrides))
    else:
        code = _run(serve(path, bound, overrides))
    sys.exit(code)


@main.command()
@click.argument("file", type=_FILE, required=False)
@click.option("--config", "option", type=_FILE, help="The same as FILE.  [default: config.yaml]")
def check(file: Path | None, option: Path | None) -> None:
    """Check a configuration, its team files and secrets, without serving.

    \b
    Exit codes
      0  it would load
      1  it has mistakes: each is printed as file:line:column: path: what and how to mend it
      2  the file cannot be read, or the command was used wrongly
    """
    from sidecar.errors import ConfigError

    path = _one_file(file, option)
    try:
        path.open("rb").close()
    except OSError as error:
        click.echo(f"{path}: {error.strerror}", err=True)
        sys.exit(2)
    try:
        bound = _load(path, {})
    except ConfigError as error:
        for problem in error.problems:
            click.echo(problem, err=True)
        count = len(error.problems)
        click.echo(f"{count} problem{'s' if count != 1 else ''}", err=True)
        sys.exit(1)
    for warning in bound.warnings:
        click.echo(f"warning: {warning}", err=True)
    for note in bound.notes:
        click.echo(f"note: {note}", err=True)
    config = bound.config
    click.echo(
        f"{path}: ok ({len(config.upstreams)} upstreams, {len(config.models)} models, "
        f"{len(bound.teams)} teams)"
    )


@main.command()
@click.option("--config", "path", type=_FILE, default="config.yaml", show_default=True)
@click.option(
    "--by",
    default="team,model",
    show_default=True,
    help="A list of team, model, upstream, upstream_model, endpoint, key, day, hour, cached, "
    "status.",
)
@click.option("--since", default="1d", show_default=True, help="Calls that ended then or later.")
@click.option("--until", help="Calls that ended before.  [default: now]")
@click.option("--team", help="Calls of this team alone.")
@click.option("--model", help="Calls for this model alone, as its callers name it.")
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "csv", "json"]),
    default="table",
    show_default=True,
)
@click.option("--details", is_flag=True, help="All that is known of the tokens.")
def usage(
    path: Path,
    by: str,
    since: str,
    until: str | None,
    team: str | None,
    model: str | None,
    style: str,
    details: bool,
) -> None:
    """Say what calls used and cost, from the records of the filter `ledger`.

    Times are 30m, 1h, 7d (ago), or a date or time such as 2026-01-31 or 2026-01-31T08:00, which
    is this machine's local time unless it says otherwise (2026-01-31T08:00Z). Days and hours in the
    answer are local, too. It may be asked while the sidecar runs, and when it does not.

    Calls of unknown price have rows of their own, without a cost. docs/usage.md says what each
    column means. It needs no secret of the configuration but the URL of the store, where records
    are kept there.

    \b
    Exit codes
      0  the answer is printed, also when no call was made
      1  there are no records, or they cannot be read
      2  the configuration does not load, or the command was used wrongly
    """
    import time
    from importlib import import_module
    from math import inf

    reports = import_module("filters.algo.usage_report")  # by name: as `sign` does
    now_s = time.time()
    try:
        names = reports.parse_by(by)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--by") from None
    since_s = _time_or_exit(reports.parse_time, "--since", since, now_s)
    until_s = inf if until is None else _time_or_exit(reports.parse_time, "--until", until, now_s)
    if since_s >= min(until_s, now_s):
        raise click.BadParameter("it must be earlier than --until", param_hint="--since")
    query = reports.Query(names, since_s, until_s, team, model)
    found = reports.report(_ledger_lines(path, query), query, details=details)
    if style == "json":
        click.echo(reports.as_json(found))
    elif style == "csv":
        click.echo(reports.as_csv(found))
    else:
        click.echo(reports.as_table(found))


@main.command("sign")
@click.option("--config", "path", type=_CONFIG, help="With --upstream: sign as it is signed there.")
@click.option("--upstream", "name", help="Whose section `sign` says how.")
def sign_request(path: Path | None, name: str | None) -> None:
    """Sign one request, given as JSON on standard input; print what that adds to it, and how.

    For the moment when a provider says that a signature does not match: compare `intermediate`
    with what it says it expected. docs/filters/sign.md has the shape. Credentials may be
    written as env:NAME or file:PATH; with --config and --upstream they come from there, with the
    scheme and its options. Without `clock` it signs for now. The output holds keys derived from
    yours: keep it to yourself.

    The scheme `aws-eventstream-frame` decodes `frame_hex`, a frame of Bedrock's event stream.

    \b
    Exit codes
      0  signed
      1  the request lacks what the scheme signs
      2  the input is not what it should be, the configuration does not load, or the command was
         used wrongly
    """
    import json
    import os
    import time
    from importlib import import_module

    from sidecar.config.document import dotted
    from sidecar.config.explain import explain
    from sidecar.config.references import References

    if (path is None) != (name is None):
        raise click.UsageError("--config and --upstream go together")
    settings = _sign_section(path, name) if path is not None and name is not None else None
    if sys.stdin.isatty():
        click.echo("reading one JSON request from standard input", err=True)
    try:
        vector = json.loads(sys.stdin.buffer.read())
    except (ValueError, RecursionError) as error:
        click.echo(f"standard input is not JSON: {error}", err=True)
        sys.exit(2)
    # By name: filters import the sidecar, never the other way round.
    signers = import_module("filters.signers.vector")
    if isinstance(vector, dict) and vector.get("scheme") == EVENT_STREAM_FRAME:
        frame = {key: value for key, value in vector.items() if key not in signers.ABOUT}
        click.echo(json.dumps(_decode_frame(frame), indent=2, ensure_ascii=False, default=str))
        return
    try:
        found = signers.sign_vector(
            vector,
            now=time.time(),
            nonce=os.urandom(16).hex(),
            references=References(Path(), os.environ),
            settings=settings,
        )
    except signers.CannotSign as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    except signers.BadFields as bad:
        for mistake in explain(bad.error, bad.model, bad.values):
            place = dotted(mistake.keys)
            click.echo(f"{place}: {mistake.message}" if place else mistake.message, err=True)
        sys.exit(2)
    except signers.BadVector as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    click.echo(json.dumps(found, indent=2, ensure_ascii=False))


@main.command()
@click.option("--listen", default="127.0.0.1:8081", show_default=True)
@click.option("--script", type=_CONFIG, help="YAML rules that say how to answer.")
def mock(listen: str, script: Path | None) -> None:
    """Serve the scripted provider alone, in all dialects, without a key: OpenAI, Anthropic,
    DashScope, Qianfan v1.

    Requests steer it by headers such as `x-mock-status: 429`; docs/mock.md lists them.

    \b
    Exit codes
      0  stopped by SIGTERM or SIGINT
      1  could not start: port in use
      2  the script cannot be used, or the command was used wrongly
    """
    host, _, port = listen.rpartition(":")
    if not listen.startswith("unix:/") and not (host and port.isdigit() and int(port) <= 65535):
        raise click.BadParameter('write "host:port" or "unix:/path"', param_hint="--listen")
    from sidecar.listen import why_not
    from sidecar.mock import MockProvider, Script, ScriptError

    try:
        rules = Script.load(script) if script is not None else None
    except ScriptError as error:
        click.echo(str(error), err=True)
        sys.exit(2)

    async def serve_mock() -> int:
        provider = MockProvider(script=rules)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            if listen.startswith("unix:"):
                where = await provider.start(unix_path=listen.removeprefix("unix:"))
            else:
                where = await provider.start(host=host.strip("[]"), port=int(port))
        except OSError as error:
            click.echo(f"could not listen on {listen}: {why_not(error)}", err=True)
            return 1
        click.echo(f"mock provider listens on {where}")
        await stop.wait()
        await provider.stop()
        return 0

    sys.exit(_run(serve_mock()))


def _time_or_exit(parse: Callable[..., float], option: str, text: str, now_s: float) -> float:
    try:
        return parse(text, now_s)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from None


def _ledger_lines(path: Path, query: Any) -> list[Any]:
    """What the ledgers of the configuration hold; exits with 1 when there is none, with 2 when it
    does not load."""
    from importlib import import_module

    from sidecar.config import bind, load_config
    from sidecar.config.references import PartialReferences
    from sidecar.errors import ConfigError
    from sidecar.filter import StoreAddress

    try:
        # Whoever asks for the bill need not have the keys.
        loaded = load_config(path, references_by=PartialReferences)
        bound = bind(loaded)
    except ConfigError as error:
        for problem in error.problems:
            click.echo(problem, err=True)
        sys.exit(2)

    ledgers = import_module("filters.stores.ledger")
    filter_class = import_module("filters.ledger").Ledger
    config = bound.config
    store = StoreAddress(**dict(config.store))
    data_dir = Path(config.data_dir) if config.data_dir is not None else None
    wheres = [
        cast(Any, spec.config).where
        for policy in bound.policies
        for spec in policy.call
        if issubclass(spec.filter_class, filter_class)
    ]
    url = "" if store.url is None else store.url.reveal()
    if not loaded.references.is_value(url) and not {*wheres} <= {"disk", "off"}:
        click.echo(f"{path}: store: {loaded.references.missing[url]}", err=True)
        sys.exit(1)
    try:
        return list(ledgers.read_ledgers(wheres, store, data_dir, query))
    except ledgers.NoLedger as error:
        click.echo(f"{path}: {error}", err=True)
        sys.exit(1)


def _sign_section(path: Path, name: str) -> FilterConfig:
    """The section `sign` of an upstream; exits with 2 when there is none."""
    from sidecar.config.explain import did_you_mean

    bound = _load_or_exit(path, {})
    sections = bound.upstream_sections.get("sign", {})
    if name in sections:
        return sections[name]
    if name in bound.config.upstreams:
        message = f'the upstream "{name}" has no section `sign`: nothing is signed'
    else:
        names = list(bound.config.upstreams)
        hint = did_you_mean(name, names) or f"; there are: {', '.join(names)}"
        message = f'there is no upstream "{name}"{hint}'
    click.echo(f"{path}: {message}", err=True)
    sys.exit(2)


def _decode_frame(vector: dict[str, Any]) -> dict[str, Any]:
    """What stands in the one frame of `vector["frame_hex"]`; exits with 2 when it is broken."""
    from sidecar.config.explain import did_you_mean
    from sidecar.eventstream import BadMessage, Decoder

    known = ("scheme", "frame_hex")
    for key in vector:
        if key not in known:
            hint = did_you_mean(key, known) or f"; known here: {', '.join(known)}"
            click.echo(f"{key}: unknown key{hint}", err=True)
            sys.exit(2)
    try:
        decoder = Decoder()
        messages = decoder.feed(bytes.fromhex(vector["frame_hex"]))
        decoder.finish()
        (message,) = messages
    except BadMessage as error:
        click.echo(f"frame_hex: {error}", err=True)
        sys.exit(2)
    except (KeyError, TypeError, ValueError):
        click.echo("frame_hex: write the bytes of one whole frame as hex digits", err=True)
        sys.exit(2)
    return {
        "headers": {
            name: value.hex() if isinstance(value, bytes) else value
            for name, value in message.headers.items()
        },
        "payload_hex": message.payload.hex(),
        "payload_text": message.payload.decode(errors="replace"),
        "total_length": message.total_length,
    }


def _one_file(file: Path | None, option: Path | None) -> Path:
    """The configuration file, which may be named in either way."""
    if file is not None and option is not None:
        raise click.UsageError("FILE and --config name the same thing: give one of them")
    return file or option or Path("config.yaml")


def _load(path: Path, overrides: dict[str, Any]) -> Bound:
    from sidecar.config import bind, load_config, override

    return bind(override(load_config(path), overrides))


def _load_or_exit(path: Path, overrides: dict[str, Any]) -> Bound:
    from sidecar.errors import ConfigError

    try:
        return _load(path, overrides)
    except ConfigError as error:
        for problem in error.problems:
            click.echo(problem, err=True)
        sys.exit(2)


def _run(work: Coroutine[Any, Any, int]) -> int:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)
