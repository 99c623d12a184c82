"""Schedule profiles: TOML files with an ordered list of rules for each backend.

Knows nothing of TVM.
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.errors import ProfileError
from profiles.rules import Family, Parameter, ParameterValue, Rule, known_rules

SHIPPED = Path(__file__).parent
_FAMILIES = ("cpu", "gpu")
_GPU_BACKENDS = ("cuda", "rocm", "metal", "vulkan", "webgpu")


@dataclass(frozen=True)
class RuleUse:
    """A rule in a profile, with every parameter's value."""

    rule: Rule
    values: Mapping[str, ParameterValue]

    def build(self) -> Any:
        """The DLight ScheduleRule; imports TVM."""
        return self.rule.build(self.values)


@dataclass(frozen=True)
class Profile:
    """A named schedule.

    `sections` maps a backend (`cuda`) or a family (`cpu`, `gpu`) to its rules.
    """

    name: str
    source: str
    description: str
    sections: Mapping[str, tuple[RuleUse, ...]]

    def rules_for(self, backend: str, family: Family) -> tuple[RuleUse, ...]:
        """The ordered rules on this backend: its own section, else its family's.

        Raises ProfileError if the profile says nothing about either.
        """
        for section in (backend, family):
            if section in self.sections:
                return self.sections[section]
        raise ProfileError(
            self.source, backend, f"profile {self.name!r} has no rules for it", self.sections
        )

    def digest(self, backend: str, family: Family) -> str:
        """sha256 over the rules on this backend.

        Ids in order, parameters, the rules' own source.
        """
        rules = [
            [use.rule.id, dict(use.values), use.rule.source_digest()]
            for use in self.rules_for(backend, family)
        ]
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def list_profiles(folder: Path | None = None) -> dict[str, Path]:
    """Name -> file of every profile.

    The shipped ones, and the user's own in `folder`, which win. Raises ProfileError if there is no
    such folder.
    """
    folders = [SHIPPED]
    if folder is not None:
        folders.append(Path(os.path.expanduser(folder)))
        if not folders[-1].is_dir():
            raise ProfileError(str(folder), "profiles", "no such folder")
    return {path.stem: path for each in folders for path in sorted(each.glob("*.toml"))}


def load_profile(name: str, folder: Path | None = None) -> Profile:
    """Read a profile by name. Raises ProfileError naming file, key and what is known."""
    known = list_profiles(folder)
    if name not in known:
        where = f"{SHIPPED}" + (f", {folder}" if folder is not None else "")
        raise ProfileError(where, name, "no such profile", known)
    return read_profile(known[name])


def read_profile(path: Path) -> Profile:
    """Read and check one profile file."""
    source = str(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ProfileError(source, path.stem, f"not readable as TOML: {error}") from None
    description = raw.pop("description", "")
    if not isinstance(description, str):
        raise ProfileError(source, "description", f"expected a string, found {description!r}")
    sections = {name: _read_section(source, name, body) for name, body in raw.items()}
    if not sections:
        raise ProfileError(source, path.stem, "no section", (*_FAMILIES, *_GPU_BACKENDS))
    return Profile(path.stem, source, description, sections)


def _read_section(source: str, name: str, body: Any) -> tuple[RuleUse, ...]:
    if name not in (*_FAMILIES, *_GPU_BACKENDS):
        known = ("description", *_FAMILIES, *_GPU_BACKENDS)
        raise ProfileError(source, name, "no such section", known)
    if not isinstance(body, dict):
        raise ProfileError(source, name, f"expected a table [{name}], found {body!r}")
    for key in body:
        if key not in ("rules", "parameters"):
            raise ProfileError(source, f"{name}.{key}", "no such key", ("rules", "parameters"))
    ids = _read_ids(source, name, body.get("rules"))
    given = body.get("parameters", {})
    if not isinstance(given, dict):
        raise ProfileError(source, f"{name}.parameters", f"expected a table, found {given!r}")
    for rule_id in given:
        if rule_id not in ids:
            key = f'{name}.parameters."{rule_id}"'
            raise ProfileError(source, key, "parameters for a rule that is not in the list", ids)
    rules = known_rules()
    return tuple(_read_use(source, name, rules[i], given.get(i, {})) for i in ids)


def _read_ids(source: str, section: str, ids: Any) -> Sequence[str]:
    key = f"{section}.rules"
    if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
        raise ProfileError(source, key, f"expected a list of rule ids, found {ids!r}")
    family = section if section in _FAMILIES else "gpu"
    usable = [rule.id for rule in known_rules().values() if rule.family == family]
    for rule_id in ids:
        if rule_id not in usable:
            raise ProfileError(source, key, f"no rule {rule_id!r} for {section}", usable)
        if ids.count(rule_id) > 1:
            raise ProfileError(source, key, f"rule {rule_id!r} is listed twice")
    return ids


def _read_use(source: str, section: str, rule: Rule, given: Any) -> RuleUse:
    key = f'{section}.parameters."{rule.id}"'
    if not isinstance(given, dict):
        raise ProfileError(source, key, f"expected a table, found {given!r}")
    parameters = {parameter.name: parameter for parameter in rule.parameters}
    for name, value in given.items():
        if name not in parameters:
            raise ProfileError(
                source, f"{key}.{name}", "no such parameter", parameters or ("no parameters",)
            )
        _check_value(source, f"{key}.{name}", parameters[name], value)
    return RuleUse(rule, {p.name: given.get(p.name, p.default) for p in rule.parameters})


def _check_value(source: str, key: str, parameter: Parameter, value: Any) -> None:
    same_type = type(value) is type(parameter.default)
    if not same_type or value not in parameter.legal:
        raise ProfileError(source, key, f"{value!r} is not a legal value", parameter.legal)
