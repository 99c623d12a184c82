"""Settings: serve.toml, then the environment, then flags; later ones win.

Built once, then frozen.
"""

from __future__ import annotations

import os
import re
import ssl
import threading
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic_core import ErrorDetails

from serve.api.auth import Keys
from serve.api.limits import Limits
from serve.engine import EngineConfig
from serve.errors import ConfigError
from serve.model.hub import HubConfig
from serve.runtime.config import RunnerConfig

DEFAULT_FILE = Path("serve.toml")
ENV_PREFIX = "DLIGHT_"
KEY = r"^[!-+\--~]{8,256}$"  # ASCII without spaces and commas
SECRETS = {"auth.api_keys", "auth.admin_keys", "hub.token"}  # never shown, wrong ones neither
Setting: TypeAlias = tuple[str, Any, str]  # dotted key, value, where it comes from


class Section(BaseModel):
    """A table of serve.toml: exactly its keys, in exactly their types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """What to serve. source: see docs. name: what clients call it, the source's own by default.

    chat_template: a file in Jinja2, as transformers' are; None: the shipped one, which is plain.
    """

    source: str = Field(default="bundled:gettysburg", min_length=1)
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    chat_template: str | None = Field(default=None, min_length=1)


class LibrarySection(Section):
    """What to compile it with. `profiles_dir`: a folder of your own profiles, which win over ours.

    also: more libraries to load at the start, as `profile` or `backend:profile`. mcpu, mattr: the
    processor and features to compile for; None: this machine's.
    """

    backend: str = Field(default="cpu", min_length=1)
    profile: str = Field(default="full", min_length=1)
    also: list[str] = []
    profiles_dir: str | None = None
    cache_dir: str | None = None
    mcpu: str | None = Field(default=None, min_length=1)
    mattr: str | None = Field(default=None, min_length=1)
    compile_time_limit_seconds: float = Field(default=1800.0, gt=0, le=threading.TIMEOUT_MAX)


Origin = Annotated[str, Field(pattern=r"^(\*|https?://[A-Za-z0-9.:\[\]-]+)$")]


class ServerSection(Section):
    """Where to listen, and to whom to talk how. port 0 takes any free one.

    drain_seconds: for running requests, at the end. keep_alive_seconds: that a connection may idle.
    tls_certificate, tls_key: PEM files, the certificate with its chain; the key may be in the same.
    cors_origins: of web pages that may call; "*" is any. log_prompts: bodies and answers, in full.
    """

    host: str = Field(default="127.0.0.1", min_length=1)  # empty would be every address
    port: int = Field(default=8000, ge=0, le=65535)
    drain_seconds: float = Field(default=30.0, ge=0)
    keep_alive_seconds: int = Field(default=75, ge=1)
    tls_certificate: str | None = Field(default=None, min_length=1)
    tls_key: str | None = Field(default=None, min_length=1)
    cors_origins: list[Origin] = []
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    log_prompts: bool = False

    def check_tls(self) -> None:
        """Raises ConfigError if the certificate or its key cannot be used."""
        if self.tls_certificate is None:
            if self.tls_key is not None:
                key = "server.tls_certificate"
                raise ConfigError("settings", key, None, "a file, since server.tls_key is set")
            return
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                self.tls_certificate, self.tls_key, password=lambda: b""
            )
        except (OSError, ValueError) as error:
            key, where = "server.tls_certificate", "in the same file"
            if self.tls_key is not None:
                where = f"in server.tls_key, {self.tls_key!r}"
            expected = f"a PEM file of a certificate, and its key, not encrypted, {where} ({error})"
            raise ConfigError("settings", key, self.tls_certificate, expected) from None


Key = Annotated[str, Field(pattern=KEY)]


class AuthSection(Section):
    """Who may use the API, and who may administer. In the files: a key a line; # begins a comment.

    Without keys anybody may who reaches the port; administration is then for this machine alone.
    """

    api_keys: list[Key] = Field(default=[], repr=False)
    api_keys_file: str | None = Field(default=None, min_length=1)
    admin_keys: list[Key] = Field(default=[], repr=False)
    admin_keys_file: str | None = Field(default=None, min_length=1)

    @property
    def is_open(self) -> bool:
        """Whether anybody may use the API."""
        return not self.api_keys and self.api_keys_file is None

    def read_api_keys(self) -> Keys:
        """Those here and those of the file. Raises ConfigError."""
        return _keys("auth.api_keys_file", self.api_keys, self.api_keys_file)

    def read_admin_keys(self) -> Keys:
        """As read_api_keys."""
        return _keys("auth.admin_keys_file", self.admin_keys, self.admin_keys_file)


def _keys(name: str, given: list[str], file: str | None) -> Keys:
    if file is None:
        return Keys(given)
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError("settings", name, file, f"a readable text file: {error}") from None
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found or not all(re.search(KEY, key) for key in found):
        raise ConfigError("settings", name, file, f"a file of keys, each a text that matches {KEY}")
    return Keys([*given, *found])


class TrafficSection(Section):
    """How requests for the model's own name are split; no weights: library.profile gets them all.

    weights: of `profile` or `backend:profile`, which are loaded at the start. sticky_header:
    requests with the same value of it are answered by the same library.
    """

    weights: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = {}
    sticky_header: str = Field(default="x-session-id", pattern=r"^[a-z0-9-]+$")


class WatchdogSection(Section):
    """What to do about engines that hang or die.

    max_step_seconds: a step that takes longer is stuck, and the engines' process is killed, as it
    is if it does not answer for so long. on_death: "exit" ends the server with an error; "restart"
    loads the same libraries in a new process.
    """

    max_step_seconds: float = Field(default=300.0, gt=0)
    on_death: Literal["exit", "restart"] = "exit"


class MetricsSection(Section):
    """window_seconds: of busy time, that the tokens-per-second gauges look back."""

    window_seconds: float = Field(default=10.0, gt=0)


@dataclass(frozen=True)
class Settings:
    """All of it. `limits`, `hub`, `engine`, `runner` belong to the packages that use them."""

    model: ModelSection = field(default_factory=ModelSection)
    library: LibrarySection = field(default_factory=LibrarySection)
    server: ServerSection = field(default_factory=ServerSection)
    auth: AuthSection = field(default_factory=AuthSection)
    limits: Limits = field(default_factory=Limits)
    traffic: TrafficSection = field(default_factory=TrafficSection)
    watchdog: WatchdogSection = field(default_factory=WatchdogSection)
    metrics: MetricsSection = field(default_factory=MetricsSection)
    hub: HubConfig = field(default_factory=HubConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)


SECTIONS = get_type_hints(Settings)


def load_settings(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Settings:
    """Read the settings. `flags` are texts by dotted key, such as "server.port".

    Without `file`, ./serve.toml is read if it exists. Raises ConfigError naming the source, the
    key, the value and what was expected.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key, value, source in (
        *_from_file(file),
        *_from_environment(os.environ if environment is None else environment),
        *_from_flags(flags or {}),
    ):
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = value
        sources[key] = source
    return _validated(values, sources)


def _validated(values: dict[str, Any], sources: dict[str, str]) -> Settings:
    sections = {name: _section(name, given, sources) for name, given in values.items()}
    return Settings(**sections)


def _section(section: str, given: dict[str, Any], sources: dict[str, str]) -> Any:
    try:
        checked = _checker(section)(**given)
    except ValidationError as invalid:
        first = invalid.errors()[0]
        name, *inside = first["loc"]
        key = f"{section}.{name}"
        shown = "(hidden)" if key in SECRETS else first["input"]
        is_entry = inside and isinstance(given[str(name)], dict)
        where = f"{key}.{inside[0]}" if is_entry else key
        raise ConfigError(sources[key], where, shown, _expected(section, first)) from None
    kind = SECTIONS[section]
    return checked if isinstance(checked, kind) else kind(**checked.model_dump())


def _checker(section: str) -> type[Section]:
    """The section as a model, made here from a plain dataclass, whose counts are at least 1."""
    kind: Any = SECTIONS[section]
    if issubclass(kind, Section):
        model: type[Section] = kind
        return model
    hints = get_type_hints(kind, include_extras=True)
    rules = {
        f.name: Field(default=f.default, ge=f.metadata.get("at_least", 1))
        if hints[f.name] in (int, int | None)
        else f.default
        for f in fields(kind)
    }
    definitions: Any = {name: (hints[name], rule) for name, rule in rules.items()}
    return create_model(kind.__name__, __base__=Section, **definitions)


def _expected(section: str, error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden":
        return _known(section)
    if error["type"] == "string_pattern_mismatch":
        return f"a text that matches {error['ctx']['pattern']}"
    if error["type"] == "string_too_short":
        return "a text that is not empty"
    return error["msg"].removeprefix("Input should be ")


def _known(section: str) -> str:
    if section in SECTIONS:
        return f"a known key of [{section}]: {', '.join(_checker(section).model_fields)}"
    return f"a known section: {', '.join(SECTIONS)}"


def _parse(key: str, text: str, source: str) -> Any:
    """A value given as text, by the type of its key."""
    section, _, name = key.partition(".")
    known = _checker(section).model_fields if section in SECTIONS else {}
    if name not in known:
        raise ConfigError(source, key, text, _known(section))
    kind: Any = known[name].annotation
    if get_origin(kind) is list:
        return [part.strip() for part in text.split(",") if part.strip()]
    given: Any = text
    if get_origin(kind) is dict:
        given = dict(part.strip().partition("=")[::2] for part in text.split(",") if part.strip())
    try:
        return TypeAdapter(kind).validate_strings(given)
    except ValidationError as invalid:
        expected = _expected(section, invalid.errors()[0])
        raise ConfigError(source, key, text, expected) from None


def _from_file(file: Path | None) -> Iterator[Setting]:
    if file is None and not DEFAULT_FILE.is_file():
        return
    path = file or DEFAULT_FILE
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError("settings", "file", str(path), f"a readable TOML file: {error}") from None
    for section, table in raw.items():
        if section not in SECTIONS:
            raise ConfigError(str(path), section, table, _known(section))
        if not isinstance(table, dict):
            raise ConfigError(str(path), section, table, f"a table [{section}]")
        for name, value in table.items():
            yield f"{section}.{name}", value, str(path)


def _from_environment(environment: Mapping[str, str]) -> Iterator[Setting]:
    """DLIGHT_SERVER_PORT is server.port; other DLIGHT_ variables are not settings."""
    for variable, text in environment.items():
        section, _, name = variable.removeprefix(ENV_PREFIX).lower().partition("_")
        if variable.startswith(ENV_PREFIX) and section in SECTIONS:
            key, source = f"{section}.{name}", f"environment variable {variable}"
            yield key, _parse(key, text, source), source


def _from_flags(flags: Mapping[str, str]) -> Iterator[Setting]:
    for key, text in flags.items():
        yield key, _parse(key, text, "command line"), "command line"
