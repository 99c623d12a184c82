"""Settings: serve.toml, then the environment, then flags; later ones win.

Built once, then frozen.
"""

from __future__ import annotations

import os
import threading
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic_core import ErrorDetails

from serve.engine import EngineConfig
from serve.errors import ConfigError
from serve.model.hub import HubConfig
from serve.runtime.runner import RunnerConfig

DEFAULT_FILE = Path("serve.toml")
ENV_PREFIX = "DLIGHT_"
Setting: TypeAlias = tuple[str, Any, str]  # dotted key, value, where it comes from


class Section(BaseModel):
    """A table of serve.toml: exactly its keys, in exactly their types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """What to serve. `source`: see docs; `name`.

    What clients call it, the source's own by default.
    """

    source: str = Field(default="bundled:gettysburg", min_length=1)
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")


class LibrarySection(Section):
    """What to compile it with. `profiles_dir`: a folder of your own profiles, which win over ours.

    mcpu, mattr: the processor and features to compile for; None: this machine's.
    """

    backend: str = Field(default="cpu", min_length=1)
    profile: str = Field(default="full", min_length=1)
    profiles_dir: str | None = None
    cache_dir: str | None = None
    mcpu: str | None = Field(default=None, min_length=1)
    mattr: str | None = Field(default=None, min_length=1)
    compile_time_limit_seconds: float = Field(default=1800.0, gt=0, le=threading.TIMEOUT_MAX)


class ServerSection(Section):
    """Where to listen. port 0 takes any free one. drain_seconds.

    For running requests, at the end.
    """

    host: str = Field(default="127.0.0.1", min_length=1)  # empty would be every address
    port: int = Field(default=8000, ge=0, le=65535)
    drain_seconds: float = Field(default=30.0, ge=0)
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class MetricsSection(Section):
    """window_seconds: of busy time, that the tokens-per-second gauges look back."""

    window_seconds: float = Field(default=10.0, gt=0)


@dataclass(frozen=True)
class Settings:
    """All of it. `hub`, `engine` and `runner` belong to the packages that use them."""

    model: ModelSection = field(default_factory=ModelSection)
    library: LibrarySection = field(default_factory=LibrarySection)
    server: ServerSection = field(default_factory=ServerSection)
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
        key = f"{section}.{first['loc'][0]}"
        raise ConfigError(sources[key], key, first["input"], _expected(section, first)) from None
    kind = SECTIONS[section]
    return checked if isinstance(checked, kind) else kind(**checked.model_dump())


def _checker(section: str) -> type[Section]:
    """The section as a model, made here from a plain dataclass, whose counts are at least 1."""
    kind: Any = SECTIONS[section]
    if issubclass(kind, Section):
        model: type[Section] = kind
        return model
    hints = get_type_hints(kind)
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
    try:
        kind: Any = known[name].annotation
        return TypeAdapter(kind).validate_strings(text)
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
