"""The table of rules, and the rules of others, by entry point."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from profiles import ProfileError, Rule, known_rules, load_profile, read_profile
from profiles.rules import RULES

pytestmark = pytest.mark.unit

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a module and its entry point as pip does: a file and a .dist-info on sys.path."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def install_module(source: str, value: str = "plugin_rules:RULE", name: str = "plugin") -> Path:
        (site / "plugin_rules.py").write_text(source)
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[dlight_serve.rules]\n{name} = {value}\n")
        monkeypatch.delitem(sys.modules, "plugin_rules", raising=False)
        importlib.invalidate_caches()
        return site / "plugin_rules.py"

    return install_module


RULE = """
from profiles import Parameter, Rule

class Mine:
    def __init__(self, unroll):
        self.unroll = unroll

RULE = Rule(
    "mine.fast", "cpu", "plugin_rules:Mine", "a rule of others",
    (Parameter("unroll", 4, (1, 2, 4), "how often"),),
)
"""


def test_the_table_is_consistent() -> None:
    assert set(known_rules()) >= set(RULES)
    for rule_id, rule in RULES.items():
        assert rule.id == rule_id
        assert rule_id.startswith("dl.") == rule.path.startswith("tvm.")
        assert f".{rule.family}." in f".{rule_id}"
        assert rule.meaning
        names = [parameter.name for parameter in rule.parameters]
        assert len(set(names)) == len(names)
        for parameter in rule.parameters:
            assert parameter.default in parameter.legal
            assert {type(value) for value in parameter.legal} == {type(parameter.default)}
            assert parameter.meaning


def test_our_own_rules_are_digested_and_tvms_are_not() -> None:
    assert len(RULES["cpu.gemv"].source_digest()) == 64
    assert RULES["dl.gpu.Matmul"].source_digest() == "tvm"


def test_a_rule_of_others(install: Install, tmp_path: Path) -> None:
    install(RULE)
    rule = known_rules()["mine.fast"]
    assert rule.family == "cpu"
    assert rule.build({"unroll": 2}).unroll == 2
    path = tmp_path / "own.toml"
    path.write_text('[cpu]\nrules = ["cpu.gemv", "mine.fast"]\n')
    (_, use) = read_profile(path).rules_for("cpu", "cpu")
    assert use.rule == rule
    assert use.build().unroll == 4


def test_its_source_and_parameters_are_in_the_digest(install: Install, tmp_path: Path) -> None:
    module = install(RULE)
    profile = tmp_path / "own.toml"
    text = '[cpu]\nrules = ["mine.fast"]\n'
    digests = []
    for source, parameters in (
        (RULE, ""),
        (RULE, '[cpu.parameters."mine.fast"]\nunroll = 1\n'),
        (RULE + "# better\n", ""),
    ):
        module.write_text(source)
        profile.write_text(text + parameters)
        digests.append(read_profile(profile).digest("cpu", "cpu"))
    assert len(set(digests)) == 3


def test_an_unknown_parameter_of_it(install: Install, tmp_path: Path) -> None:
    install(RULE)
    profile = tmp_path / "own.toml"
    profile.write_text('[cpu]\nrules = ["mine.fast"]\n[cpu.parameters."mine.fast"]\nlanes = 1\n')
    with pytest.raises(ProfileError, match=r'"mine\.fast"\.lanes: no such parameter; known: unr'):
        read_profile(profile)


@pytest.mark.parametrize(
    ("source", "value", "problem"),
    [
        ("raise RuntimeError('no licence')", "plugin_rules:RULE", "RuntimeError: no licence"),
        ("import not_installed", "plugin_rules:RULE", "ModuleNotFoundError: No module named"),
        ("syntax error", "plugin_rules:RULE", "SyntaxError"),
        ("", "plugin_rules:RULE", "AttributeError: .*RULE"),
        ("", "no_such_module:RULE", "ModuleNotFoundError: .*no_such_module"),
        ("RULE = 'mine.fast'", "plugin_rules:RULE", "expected a Rule, found 'mine.fast'"),
        ("class RULE: id = 'x'", "plugin_rules:RULE", "expected a Rule, found <class"),
    ],
)
def test_a_plugin_that_is_none(install: Install, source: str, value: str, problem: str) -> None:
    install(source, value)
    with pytest.raises(ProfileError, match=problem) as caught:
        known_rules()
    assert caught.value.source == f"entry point dlight_serve.rules: plugin = {value}"
    with pytest.raises(ProfileError, match=problem):
        load_profile("gemv")


@pytest.mark.parametrize("rule_id", ["cpu.gemv", "dl.gpu.Matmul"])
def test_no_two_rules_share_an_id(install: Install, rule_id: str) -> None:
    install(RULE.replace("mine.fast", rule_id))
    with pytest.raises(ProfileError, match=rf"{rule_id}: there is a rule with this id already"):
        known_rules()


def test_nor_do_two_plugins(install: Install) -> None:
    install(RULE, name="one")
    install(RULE, name="another")
    with pytest.raises(ProfileError, match=r"mine\.fast: there is a rule with this id already"):
        known_rules()


@pytest.mark.parametrize("path", ["no_such_module:R", "no_such_package.module:R", "profiles.no:R"])
def test_a_rule_without_source(path: str) -> None:
    with pytest.raises(ProfileError) as caught:
        Rule("r", "cpu", path, "no source").source_digest()
    assert (caught.value.source, caught.value.key) == (path, "r")
