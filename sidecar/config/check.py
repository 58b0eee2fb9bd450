"""What the sections mean together: names that exist, filters that fit, ports that are safe.

The result has every filter's class and settings in place; building the filters is left to the
snapshot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import ValidationError

from sidecar.addresses import is_forbidden, literal
from sidecar.config.document import Document, Keys, dotted, follow
from sidecar.config.explain import Mistake, did_you_mean, explain
from sidecar.config.load import Loaded
from sidecar.config.references import References
from sidecar.config.registry import FilterNotFound, builtin_filters, find_filter
from sidecar.config.rules import collide, is_loopback, may_meet, wrong_header
from sidecar.config.schema import Config, TeamSettings, UpstreamSettings
from sidecar.errors import ConfigError, Problem

if TYPE_CHECKING:
    from sidecar.call import Key
    from sidecar.filter import Filter, FilterConfig, Ground

RESERVED_SEGMENTS = frozenset({"healthz", "livez", "readyz", "metrics"})
"""First segments of paths that are no upstream's, beside the API versions (`v1`, `v1beta`)."""

CREDENTIALS = frozenset(
    {
        *("access_key", "access_token", "api_key", "apikey", "auth", "authorization", "bearer"),
        *("credentials", "key", "keys", "password", "secret", "secret_key", "token", "x_api_key"),
    }
)
"""Keys of an upstream, `-` written as `_`, by which others configure what is `sign` here."""


class FilterSpec(NamedTuple):
    """One place in a chain."""

    name: str
    """As the chain has it; also the name of its sections."""
    filter_class: type[Filter]
    config: FilterConfig
    """An instance of `filter_class.Config`."""


@dataclass(frozen=True, slots=True)
class BoundPolicy:
    """One team and the filters of its calls and attempts, in the order of execution."""

    team: TeamSettings
    call: tuple[FilterSpec, ...]
    attempt: tuple[FilterSpec, ...]


@dataclass(frozen=True, slots=True)
class Bound:
    """A configuration that can be built."""

    config: Config
    teams: tuple[TeamSettings, ...]
    """The teams of the team files; empty when there are none."""
    policies: tuple[BoundPolicy, ...]
    """One for each team, in their order; without team files, one for the implicit team."""
    upstream_sections: Mapping[str, Mapping[str, FilterConfig]]
    """For each filter with an `UpstreamConfig`, by name: its section of each upstream that has
    one, by the upstream's name."""
    files: tuple[Path, ...]
    """Everything that was read, also for the filters' settings. A change of one is a change."""
    warnings: list[str]
    notes: list[str]
    """What is right and yet good to know, with its place; for `sidecar check`."""


class _Section(NamedTuple):
    """One `filters` mapping: of the configuration, or of a team file."""

    document: Document
    values: dict[str, dict[str, Any]]


def bind(loaded: Loaded, environ: Mapping[str, str] | None = None) -> Bound:
    """Check what `loaded` means as a whole and find its filters.

    `environ` is where `env:NAME` is looked up; None: where `loaded` has looked. Imports the modules
    of filters. Raises ConfigError with every problem.
    """
    if environ is None:
        return _Binder(loaded, loaded.references).bind()
    return _Binder(loaded, References(loaded.path.parent, environ)).bind()


def implicit_team(config: Config) -> TeamSettings:
    """The only team when there are no team files: it may use all that is configured."""
    return TeamSettings(team=config.team or "default", upstreams=list(config.upstreams))


class _Binder:
    def __init__(self, loaded: Loaded, references: References) -> None:
        self.loaded = loaded
        self.config = loaded.config
        self.document = loaded.document
        self.directory = loaded.path.parent
        self.references = references
        self.problems: dict[Problem, None] = {}  # teams share most of their mistakes
        self.classes: dict[str, type[Filter]] = {}
        self.missing: set[str] = set()
        self.notes: list[str] = []

    def bind(self) -> Bound:
        self._check_ports()
        self._check_upstreams()
        self._check_models()
        self._check_teams()
        self._find_filters()
        self._check_chains()
        policies = self._policies()
        sections = self._upstream_sections()
        self._note_unread_sections(sections, {policy.team.chain for policy in policies})
        if self.problems:
            files = [self.document.file, *(each.file for each in self.loaded.team_documents)]
            raise ConfigError(
                sorted(self.problems, key=lambda p: (files.index(p.file), p.line, p.column))
            )
        return Bound(
            config=self.config,
            teams=self.loaded.teams,
            policies=policies,
            upstream_sections=sections,
            files=tuple(dict.fromkeys((*self.loaded.files, *sorted(self.references.files)))),
            warnings=list(self.loaded.warnings),
            notes=self.notes,
        )

    def _refuse(
        self, keys: Keys, message: str, *, at_key: bool = False, document: Document | None = None
    ) -> None:
        problem = (document or self.document).problem(keys, message, at_key=at_key)
        self.problems[problem] = None

    # Ports

    def _check_ports(self) -> None:
        config = self.config
        if config.admin is not None and collide(config.listen, config.admin):
            self._refuse(("admin",), "is the address of `listen`: give it a port of its own")
        if config.workers > 1 and config.listen.startswith("unix:"):
            self._refuse(("workers",), "several workers share a TCP port: set 1, or listen on one")
        if config.allow_anyone or is_loopback(config.listen):
            return
        if config.team is not None:
            self._refuse(
                ("listen",),
                f"everybody who reaches this address would be team {config.team}: listen on "
                "127.0.0.1, or say `allow_anyone: true`",
            )
        elif not any(team.keys for team in self.loaded.teams):
            self._refuse(
                ("listen",),
                "everybody who reaches this address could call: listen on 127.0.0.1, give the "
                "teams keys, or say `allow_anyone: true`",
            )

    # Upstreams and models

    def _check_upstreams(self) -> None:
        for name, upstream in self.config.upstreams.items():
            keys: Keys = ("upstreams", name)
            if name in RESERVED_SEGMENTS or re.fullmatch(r"v\d+((alpha|beta)\d*)?", name):
                self._refuse(
                    keys, "the name is taken by the API's own paths: choose another", at_key=True
                )
            self._check_base_url(upstream, keys)
            self._check_tls(upstream, keys)
            if upstream.pass_client_key and any(team.keys for team in self.loaded.teams):
                place = self.document.problem(
                    (*keys, "pass_client_key"),
                    "a client's key that is its team's is never sent on: it needs another header "
                    "for the provider's",
                )
                self.notes.append(str(place))
            for header, value in upstream.headers.items():
                if message := wrong_header(header, value):
                    self._refuse((*keys, "headers", header), message, at_key=True)

    def _check_base_url(self, upstream: UpstreamSettings, keys: Keys) -> None:
        """A host that can be one. What a name stands for is judged at each connection."""
        if not upstream.base_url.startswith(("http:", "https:")):
            return
        keys = (*keys, "base_url")
        try:
            parts = urlsplit(upstream.base_url)
            host, _ = parts.hostname or "", parts.port
        except ValueError:  # brackets around what is no address; a port past 65535
            self._refuse(keys, "there can be no such host or port: correct it")
            return
        if not host.isascii():
            self._refuse(keys, 'write the host in ASCII, an international name as "xn--…"')
            return
        address = literal(host)
        allowed = [ip_network(each) for each in upstream.allow_addresses]
        if address is not None and is_forbidden(address, allowed):
            self._refuse(
                keys,
                f"{address} is link-local or a cloud's metadata service, and no call may go "
                "there: choose another, or list it in `allow_addresses`",
            )

    def _check_tls(self, upstream: UpstreamSettings, keys: Keys) -> None:
        if "tls" not in upstream.model_fields_set:
            return
        if not upstream.base_url.startswith("https:"):
            self._refuse(
                (*keys, "tls"),
                "`base_url` is not https: remove the section or change the address",
                at_key=True,
            )
        if upstream.tls.key_file is not None and upstream.tls.cert_file is None:
            self._refuse(
                (*keys, "tls", "key_file"),
                "a key without a certificate: add `cert_file`",
                at_key=True,
            )

    def _check_models(self) -> None:
        for name, model in self.config.models.items():
            for index, target in enumerate(model.targets):
                keys: Keys = ("models", name, "targets", index, "upstream")
                keys, _ = follow(keys, self.document.value)  # there are shorthands
                self._check_name(keys, target.upstream, "upstream", self.config.upstreams)

    def _check_name(
        self,
        keys: Keys,
        name: str,
        kind: str,
        known: Iterable[str],
        document: Document | None = None,
    ) -> None:
        names = list(known)
        if name in names:
            return
        hint = did_you_mean(name, names) or f"; there are: {', '.join(names) or 'none'}"
        self._refuse(keys, f'there is no {kind} "{name}"{hint}', document=document)

    # Teams

    def _check_teams(self) -> None:
        config, teams = self.config, self.loaded.teams
        if config.team is not None and config.teams is not None:
            self._check_name(("team",), config.team, "team", [team.team for team in teams])
        if config.teams is None:
            team = implicit_team(config)
            self._check_name(("chains",), team.chain, "chain", config.chains)
        names: dict[str, str] = {}
        digests: dict[str, str] = {}
        for team, document in zip(teams, self.loaded.team_documents, strict=True):
            if (first := names.setdefault(team.team, document.file)) != document.file:
                self._refuse(("team",), f"{first} is this team's file already", document=document)
            self._check_team(team, document)
            for index, key in enumerate(team.keys):
                place = str(document.problem(("keys", index), "").line)
                place = f"{document.file}:{place}"
                if (first := digests.setdefault(key.sha256(), place)) != place:
                    self._refuse(
                        ("keys", index),
                        f"the same key as in {first}: a key tells one team",
                        document=document,
                    )

    def _check_team(self, team: TeamSettings, document: Document) -> None:
        if not team.keys and team.team != self.config.team:
            self._refuse((), f"nobody can be team {team.team}: add `keys`", document=document)
        self._check_name(("chain",), team.chain, "chain", self.config.chains, document)
        for index, name in enumerate(team.upstreams):
            self._check_name(
                ("upstreams", index), name, "upstream", self.config.upstreams, document
            )
        for index, pattern in enumerate(team.models):
            if pattern != "*" and not any(may_meet(pattern, name) for name in self.config.models):
                hint = did_you_mean(pattern, self.config.models) or ": add it to `models`"
                self._refuse(
                    ("models", index), f'no model is called "{pattern}"{hint}', document=document
                )

    # Filters

    def _find_filters(self) -> None:
        for chain_name, chain in self.config.chains.items():
            for kind, names in (("call", chain.call), ("attempt", chain.attempt)):
                for index, name in enumerate(names):
                    keys: Keys = ("chains", chain_name, kind, index)
                    if name in names[:index]:
                        self._refuse(keys, f'"{name}" is in this list already: remove one')
                    if self._find(name, keys) is None:
                        self.missing.add(chain_name)

    def _find(self, name: str, keys: Keys) -> type[Filter] | None:
        if name not in self.classes:
            try:
                self.classes[name] = find_filter(name, self.directory)
            except FilterNotFound as error:
                self._refuse(keys, str(error))
                return None
        return self.classes[name]

    def _check_chains(self) -> None:
        from sidecar.chain import check_order  # late, as in registry.py

        for name, chain in self.config.chains.items():
            if name not in self.missing:
                for kind, index, message in check_order(
                    [self.classes[each] for each in chain.call],
                    [self.classes[each] for each in chain.attempt],
                    self._giver_of,
                ):
                    used: str = getattr(chain, kind)[index]
                    self._refuse(("chains", name, kind, index), f"{used} {message}")

    def _giver_of(self, key: Key[Any]) -> tuple[str, str] | None:
        """A filter that gives the fact: one in use, else a built-in one; with its list."""
        from sidecar.filter import CallFilter

        for name in dict.fromkeys((*self.classes, *builtin_filters())):
            try:
                found = self.classes.get(name) or find_filter(name, self.directory)
            except FilterNotFound:
                continue
            if key in found.gives:
                return name, "call" if issubclass(found, CallFilter) else "attempt"
        return None

    def _policies(self) -> tuple[BoundPolicy, ...]:
        config = self.config
        own = _Section(self.document, config.filters)
        in_use = {
            name for chain in config.chains.values() for name in (*chain.call, *chain.attempt)
        }
        self._check_sections(own, in_use, "in no chain")
        policies = []
        if config.teams is None:
            policies.append(self._policy(implicit_team(config), own, None))
        for team, document in zip(self.loaded.teams, self.loaded.team_documents, strict=True):
            section = _Section(document, _with_absolute_files(team.filters, document.file))
            if team.chain in config.chains:
                chain = config.chains[team.chain]
                self._check_sections(
                    section, {*chain.call, *chain.attempt}, f'not in the chain "{team.chain}"'
                )
            policies.append(self._policy(team, own, section))
        taken = {policy.team.chain for policy in policies}
        for name in config.chains.keys() - taken:
            # Nobody's yet; its settings are to be right all the same.
            self._policy(TeamSettings(team="nobody", chain=name), own, None)
        return tuple(policies)

    def _check_sections(self, section: _Section, names: set[str], where: str) -> None:
        for name in section.values:
            if name not in names:
                hint = did_you_mean(name, names) or ": remove the section, or add it there"
                self._refuse(
                    ("filters", name),
                    f"this filter is {where}{hint}",
                    at_key=True,
                    document=section.document,
                )

    def _policy(self, team: TeamSettings, own: _Section, section: _Section | None) -> BoundPolicy:
        lists: dict[str, tuple[FilterSpec, ...]] = {}
        chain = self.config.chains.get(team.chain)
        for kind in ("call", "attempt"):
            names: list[str] = getattr(chain, kind, [])
            specs = [
                self._spec(name, own, section, ("chains", team.chain, kind, index))
                for index, name in enumerate(names)
                if name in self.classes
            ]
            lists[kind] = tuple(spec for spec in specs if spec is not None)
        return BoundPolicy(team, lists["call"], lists["attempt"])

    def _spec(
        self, name: str, own: _Section, section: _Section | None, use: Keys
    ) -> FilterSpec | None:
        filter_class = self.classes[name]
        theirs = section.values.get(name, {}) if section is not None else {}
        values = {**own.values.get(name, {}), **theirs}

        def place(mistake: Mistake) -> None:
            keys: Keys = ("filters", name, *mistake.keys)
            first = mistake.keys[0] if mistake.keys else None
            if section is not None and name in section.values:
                # What the team did not say itself is the configuration's mistake.
                is_theirs = first in theirs or first not in own.values.get(name, {})
                document = section.document if is_theirs else own.document
            elif name in own.values:
                document = own.document
            else:
                self._refuse(use, f"needs settings: {dotted(keys)} {mistake.message}")
                return
            self._refuse(keys, mistake.message, at_key=mistake.at_key, document=document)

        hint = f"it goes into the section `{name}` of an upstream"
        elsewhere = _where_it_goes(filter_class.UpstreamConfig, values, hint)
        config = self._validate(filter_class.Config, values, place, elsewhere)
        if config is None:
            return None
        for keys, message in config.lacks(self._ground()):
            place(Mistake(keys, message))
        return FilterSpec(name, filter_class, config)

    def _ground(self) -> Ground:
        from sidecar.filter import Ground  # late, as in registry.py

        config = self.config
        return Ground(config.data_dir is not None, config.store.url is not None, self._dialect_of)

    def _dialect_of(self, model: str) -> str | None:
        config = self.config
        for name, settings in config.models.items():
            if name == model or (("*" in name or "?" in name) and may_meet(name, model)):
                upstream = config.upstreams.get(settings.targets[0].upstream)
                return upstream.dialect if upstream is not None else None
        return None

    def _validate(
        self,
        model: type[FilterConfig],
        values: Any,
        place: Callable[[Mistake], None],
        where_it_goes: Callable[[Keys], str],
    ) -> FilterConfig | None:
        model = model.variant(values)
        try:
            return model.model_validate(values, context=self.references)
        except ValidationError as error:
            mistakes = explain(error, model, values, where_it_goes)
        for mistake in mistakes:
            place(mistake)
        return None

    # The filters' sections of the upstreams

    def _upstream_sections(self) -> dict[str, dict[str, FilterConfig]]:
        readers = self._section_readers()
        sections: dict[str, dict[str, FilterConfig]] = {name: {} for name in readers}
        for upstream_name, upstream in self.config.upstreams.items():
            for name, values in (upstream.model_extra or {}).items():
                keys: Keys = ("upstreams", upstream_name, name)
                model = readers.get(name)
                if model is None:
                    self._unknown_key(keys, name, readers)
                    continue

                def place(mistake: Mistake, keys: Keys = keys) -> None:
                    self._refuse((*keys, *mistake.keys), mistake.message, at_key=mistake.at_key)

                hint = f"it goes under `filters.{name}`"
                elsewhere = _where_it_goes(self.classes[name].Config, values, hint)
                config = self._validate(model, values, place, elsewhere)
                if config is None:
                    continue
                sections[name][upstream_name] = config
                for other in sorted(config.excludes):
                    if getattr(upstream, other):
                        self._refuse(keys, f"cannot go with `{other}`: remove one", at_key=True)
                for note in config.notes(upstream.base_url):
                    self.notes.append(str(self.document.problem(keys, note, at_key=True)))
        return sections

    def _note_unread_sections(
        self, sections: Mapping[str, Mapping[str, FilterConfig]], in_use: set[str]
    ) -> None:
        """A chain without a filter that upstreams have settings for, such as `sign`."""
        for chain_name in sorted(in_use & self.config.chains.keys()):
            chain = self.config.chains[chain_name]
            for name, upstreams in sections.items():
                if upstreams and name not in (*chain.call, *chain.attempt):
                    note = (
                        f"lacks the filter `{name}`: its calls do without the section `{name}` "
                        f"of {', '.join(upstreams)}"
                    )
                    keys: Keys = ("chains", chain_name)
                    self.notes.append(str(self.document.problem(keys, note, at_key=True)))

    def _section_readers(self) -> dict[str, type[FilterConfig]]:
        """The model of each section that an upstream may have, by the filter's name."""
        said = {
            name
            for upstream in self.config.upstreams.values()
            for name in upstream.model_extra or {}
        }
        # A section may wait for a built-in filter that is not in a chain at the moment.
        for name in sorted(said & builtin_filters().keys()):
            self._find(name, ("upstreams",))
        return {
            name: found.UpstreamConfig
            for name, found in self.classes.items()
            if found.UpstreamConfig is not None
        }

    def _where_instead(self, name: str) -> str:
        """Where the settings of a filter go that has none for an upstream."""
        settings = self.classes[name].Config.model_fields
        if not settings:
            return "remove the section"
        if "per" in settings and "upstream" in str(settings["per"].annotation):
            return "it goes under `filters`; with `per: [upstream]` it counts for each upstream"
        return "it goes under `filters`"

    def _unknown_key(self, keys: Keys, name: str, readers: Iterable[str]) -> None:
        if name in self.classes:
            message = f'the filter "{name}" has no settings for an upstream: '
            message += self._where_instead(name) + did_you_mean(name, UpstreamSettings.model_fields)
        elif name.lower().replace("-", "_") in CREDENTIALS:
            message = (
                "unknown key: a key for the upstream stands in its section `sign`, such as "
                "`sign: {scheme: bearer, key: env:NAME}`"
            )
        else:
            known = [*UpstreamSettings.model_fields, *readers, *builtin_filters()]
            hint = did_you_mean(name, known) or ", and no filter in use has settings of that name"
            message = f"unknown key{hint}"
        self._refuse(keys, message, at_key=True)


def _where_it_goes(
    model: type[FilterConfig] | None, values: Any, hint: str
) -> Callable[[Keys], str]:
    """Tells `hint` of a key that is unknown where it stands, and known in the other `model`."""
    known = model.variant(values).model_fields if model is not None else {}
    return lambda keys: hint if len(keys) == 1 and keys[0] in known else ""


def _with_absolute_files(
    filters: dict[str, dict[str, Any]], file: str
) -> dict[str, dict[str, Any]]:
    """Relative `file:` references made absolute: merged, they stand beside another file's."""
    directory = Path(file).parent.absolute()

    def mend(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: mend(each) for key, each in value.items()}
        if isinstance(value, list):
            return [mend(each) for each in value]
        if isinstance(value, str) and value.startswith("file:"):
            return f"file:{directory / value.removeprefix('file:')}"
        return value

    return {name: mend(values) for name, values in filters.items()}
