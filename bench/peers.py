"""LLM gateways of other hands, measured beside the sidecar: LiteLLM's proxy and Portkey's gateway.

`python -m bench.peers` (`make bench-peers`) installs them under bench/.tools, each apart from
everything else. A figure that wants one which is not there says so and goes on without it.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

from bench import wire
from bench.figures import tell
from bench.proxies import TOOLS, Missing, Place, Proxy, last_line

LITELLM_VERSION = "1.106.12"
"""The newest whose own pins could all be had when this was written."""
LITELLM_REQUIREMENT = f"litellm[proxy]=={LITELLM_VERSION}"
LITELLM_HOME = TOOLS / "litellm"  # a virtual environment
PORTKEY_VERSION = "1.15.2"
PORTKEY_REQUIREMENT = f"@portkey-ai/gateway@{PORTKEY_VERSION}"
PORTKEY_HOME = TOOLS / "portkey"
PORTKEY_SCRIPT = PORTKEY_HOME / "node_modules/@portkey-ai/gateway/build/start-server.js"
ADVICE = "`make bench-peers` installs it"


# LiteLLM


def prepare_litellm() -> str:
    found = LITELLM_HOME.glob(f"lib/python3*/site-packages/litellm-{LITELLM_VERSION}.dist-info")
    if not any(found) or not (LITELLM_HOME / "bin" / "litellm").exists():
        raise Missing(f"LiteLLM {LITELLM_VERSION} is not here; {ADVICE}")
    return LITELLM_VERSION


def install_litellm() -> None:
    _run([sys.executable, "-m", "venv", str(LITELLM_HOME)])
    pip = [str(LITELLM_HOME / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    _run([*pip, "install", "--quiet", LITELLM_REQUIREMENT])


LITELLM_CONFIG = """\
model_list:
  - model_name: {model}
    litellm_params:
      model: openai/{model}
      api_base: http://127.0.0.1:{upstream_port}/v1
      api_key: bench
      extra_headers: {{x-bench: "json {answer_bytes}"}}
litellm_settings:
  telemetry: false
  set_verbose: false
{cache}"""
LITELLM_CACHE = """\
  cache: true
  cache_params: {type: local}
"""
LITELLM_ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # the one it ships; otherwise it downloads one at start
    "LITELLM_LOG": "ERROR",
    "LITELLM_MODE": "PRODUCTION",
    # Without keys it asks no database, and is faster.
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}


def litellm_command(*, has_cache: bool) -> Callable[[Place], list[str]]:
    """One worker without keys, database and telemetry, with its cache in memory or without."""

    def command(place: Place) -> list[str]:
        conf = place.folder / "litellm.yaml"
        conf.write_text(
            LITELLM_CONFIG.format(
                model=wire.MODEL.decode(),
                upstream_port=place.upstream_port,
                answer_bytes=wire.ANSWER_BYTES,
                cache=LITELLM_CACHE if has_cache else "",
            )
        )
        words = f"--host 127.0.0.1 --port {place.port} --num_workers 1 --telemetry False"
        return [str(LITELLM_HOME / "bin" / "litellm"), "--config", str(conf), *words.split()]

    return command


def litellm_proxy(name: str, title: str, *, has_cache: bool) -> Proxy:
    return Proxy(
        name,
        title,
        prepare_litellm,
        litellm_command(has_cache=has_cache),
        environment=LITELLM_ENVIRONMENT,
    )


# Portkey


def prepare_portkey() -> str:
    if shutil.which("node") is None:
        raise Missing("no node here, which Portkey's gateway needs")
    package = PORTKEY_SCRIPT.parent.parent / "package.json"
    if not package.exists() or f'"version": "{PORTKEY_VERSION}"' not in package.read_text():
        raise Missing(f"Portkey's gateway {PORTKEY_VERSION} is not here; {ADVICE}")
    return PORTKEY_VERSION


def install_portkey() -> None:
    if shutil.which("npm") is None:
        raise Missing("no npm here")
    PORTKEY_HOME.mkdir(parents=True, exist_ok=True)
    npm = ["npm", "install", "--prefix", str(PORTKEY_HOME)]
    _run([*npm, "--ignore-scripts", "--no-audit", "--no-fund", PORTKEY_REQUIREMENT])


def portkey_command(place: Place) -> list[str]:
    return ["node", str(PORTKEY_SCRIPT), f"--port={place.port}", "--headless"]


def portkey_headers(upstream_port: int) -> bytes:
    """Its configuration comes with every call."""
    return (
        b"x-portkey-provider: openai\r\n"
        b"x-portkey-custom-host: http://127.0.0.1:%d/v1\r\n"
        b"x-portkey-forward-headers: x-bench\r\n" % upstream_port
    )


def portkey_proxy(name: str, title: str) -> Proxy:
    return Proxy(
        name,
        title,
        prepare_portkey,
        portkey_command,
        environment={"NODE_ENV": "production"},
        headers=portkey_headers,
    )


# Installing


def _run(command: Sequence[str]) -> None:
    """Raises Missing, with the program's last words, when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        told = (done.stderr or done.stdout).splitlines()
        # npm's last words only name a file with all of them.
        raise Missing(last_line("\n".join(line for line in told if "complete log" not in line)))


def _install(
    title: str, size: str, prepare: Callable[[], str], install: Callable[[], None]
) -> bool:
    """Says what came of it; True when it is there now."""
    try:
        tell(f"{title} {prepare()} is already there")
        return True
    except Missing:
        tell(f"installing {title} ({size})")
    try:
        install()
        tell(f"installed {title} {prepare()}")
        return True
    except Missing as error:
        tell(f"{title} cannot be had on this machine: {error}")
        return False


def main() -> None:
    has_litellm = _install("LiteLLM's proxy", "700 MB", prepare_litellm, install_litellm)
    _install("Portkey's gateway", "25 MB", prepare_portkey, install_portkey)
    if not has_litellm:
        raise SystemExit("without LiteLLM the figure `cache` has nothing to compare hits with")
    tell("now: python -m bench --only cache")


if __name__ == "__main__":
    main()
