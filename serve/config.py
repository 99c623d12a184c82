"""Settings: serve.toml, then the environment, then flags; later ones win.

Built once, then frozen.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from serve.engine import EngineConfig
from serve.errors import ConfigError
from serve.model.hub import HubConfig
from serve.runtime.runner import RunnerConfig

DEFAULT_FILE = Path("serve.toml")
ENV_PREFIX = "DLIGHT_"
Setting: TypeAlias = tuple[str, Any, str]  # dotted key, value, where it comes from


class Section(BaseModel):
    """A table of serve.toml: exactly its keys, in exactly their types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSection(Section):
    """What to serve. `source`: see docs; `name`.

    What clients call it, the source's own by default.
    """

    source: str = "bundled:gettysburg"
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")


class LibrarySection(Section):
    """What to compile it with. `profiles_dir`.

    A folder of your own profiles, which win over ours.
    """

    backend: str = "cpu"
    profile: str = "full"
    profiles_dir: str | None = None
    cache_dir: str | None = None
    compile_time_limit_seconds: float = Field(default=1800.0, gt=0)


class ServerSection(Section):
    """Where to listen. port 0 takes any free one. drain_seconds.

    For running requests, at the end.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    drain_seconds: float = Field(default=30.0, ge=0)
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class MetricsSection(Section):
    """window_seconds: of busy time, that the tokens-per-second gauges look back."""

    window_seconds: float = Field(default=10.0, gt=0)


class Settings(Section):
    """All of it. `hub`, `engine` and `runner` belong to the packages that use them."""

    model: ModelSection = ModelSection()
    library: LibrarySection = LibrarySection()
    server: ServerSection = ServerSection()
    metrics: MetricsSection = MetricsSection()
    hub: HubConfig = HubConfig()
    engine: EngineConfig = EngineConfig()
    runner: RunnerConfig = RunnerConfig()


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
    try:
        settings = Settings(**values)
    except ValidationError as invalid:
        first = invalid.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:2])
        source = sources.get(key, "settings")
        expected = _expected(key, first["type"], first["msg"])
        raise ConfigError(source, key, first["input"], expected) from None
    for section in ("engine", "runner"):
        for name, value in asdict(getattr(settings, section)).items():
            at_least = 0 if name == "max_kept_prefixes" else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < at_least:
                key = f"{section}.{name}"
                source = sources.get(key, "settings")
                raise ConfigError(source, key, value, f"an integer of at least {at_least}")
    return settings


def _expected(key: str, kind: str, message: str) -> str:
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return _known(key.partition(".")[0])
    return message.removeprefix("Input should be ")


def _types(section: str) -> dict[str, Any]:
    """The section's keys and their types."""
    kind: Any = Settings.model_fields[section].annotation
    names = kind.model_fields if issubclass(kind, BaseModel) else [f.name for f in fields(kind)]
    hints = get_type_hints(kind)
    return {name: hints[name] for name in names}


def _known(section: str) -> str:
    if section in Settings.model_fields:
        return f"a known key of [{section}]: {', '.join(_types(section))}"
    return f"a known section: {', '.join(Settings.model_fields)}"


def _parse(key: str, text: str, source: str) -> Any:
    """A value given as text, by the type of its key."""
    section, _, name = key.partition(".")
    types = _types(section) if section in Settings.model_fields else {}
    if name not in types:
        raise ConfigError(source, key, text, _known(section))
    try:
        return TypeAdapter(types[name]).validate_strings(text)
    except ValidationError as invalid:
        expected = _expected(key, invalid.errors()[0]["type"], invalid.errors()[0]["msg"])
        raise ConfigError(source, key, text, expected) from None


def _from_file(file: Path | None) -> Iterator[Setting]:
    if file is None and not DEFAULT_FILE.is_file():
        return
    path = file or DEFAULT_FILE
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("settings", "file", str(path), f"a readable TOML file: {error}") from None
    for section, table in raw.items():
        if section not in Settings.model_fields or not isinstance(table, dict):
            raise ConfigError(str(path), section, table, _known(""))
        for name, value in table.items():
            yield f"{section}.{name}", value, str(path)


def _from_environment(environment: Mapping[str, str]) -> Iterator[Setting]:
    """DLIGHT_SERVER_PORT is server.port; other DLIGHT_ variables are not settings."""
    for variable, text in environment.items():
        section, _, name = variable.removeprefix(ENV_PREFIX).lower().partition("_")
        if variable.startswith(ENV_PREFIX) and section in Settings.model_fields:
            key = f"{section}.{name}"
            yield key, _parse(key, text, f"environment variable {variable}"), variable


def _from_flags(flags: Mapping[str, str]) -> Iterator[Setting]:
    for key, text in flags.items():
        yield key, _parse(key, text, "command line"), "command line"
