"""Profiles: what is shipped, the user's own folder, every error, and what a digest covers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import profiles.profile
from profiles import (
    Parameter,
    Profile,
    ProfileError,
    Rule,
    known_rules,
    list_profiles,
    load_profile,
    read_profile,
)
from profiles.profile import SHIPPED

pytestmark = pytest.mark.unit

DEFAULTS = {p.name: p.default for p in known_rules()["cpu.gemv"].parameters}
NAMES = ["baseline", "full", "gemv", "matmul", "reduction", "stock"]
CPU = [rule.id for rule in known_rules().values() if rule.family == "cpu"]
GPU = [rule.id for rule in known_rules().values() if rule.family == "gpu"]


def write(folder: Path, text: str, name: str = "mine") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, text: str) -> Profile:
    return read_profile(write(folder, text))


def ids(profile: Profile, backend: str = "cpu") -> list[str]:
    return [use.rule.id for use in profile.rules_for(backend, "cpu" if backend == "cpu" else "gpu")]


def test_the_shipped_profiles() -> None:
    assert set(list_profiles()) >= set(NAMES)
    for name, path in list_profiles().items():
        profile = load_profile(name)
        assert (profile.name, profile.source) == (name, str(path))
        assert profile.description
        assert set(profile.sections) == {"cpu", "gpu"}


def test_what_the_names_say() -> None:
    cpu = {name: ids(load_profile(name)) for name in list_profiles()}
    gpu = {name: ids(load_profile(name), "cuda") for name in list_profiles()}
    assert (cpu["baseline"], gpu["baseline"]) == ([], ["dl.gpu.Fallback"])
    assert (cpu["matmul"], gpu["matmul"]) == (["cpu.matmul"], ["dl.gpu.Matmul", "dl.gpu.Fallback"])
    assert (cpu["gemv"], gpu["gemv"]) == (["cpu.gemv"], ["dl.gpu.GEMV", "dl.gpu.Fallback"])
    assert cpu["reduction"] == ["cpu.attention", "cpu.reduction"]
    assert set(gpu["reduction"]) >= {"dl.gpu.Reduction", "dl.gpu.GeneralReduction"}
    assert cpu["stock"] == []
    # Every rule of our own; elementwise loops would take from nobody, and come last.
    assert set(cpu["full"]) == {rule_id for rule_id in CPU if not rule_id.startswith("dl.")}
    assert cpu["full"][-1] == "cpu.elementwise"
    # Each rung's rules are among full's. On a GPU Fallback takes what is left, so it comes last.
    for name in ("matmul", "gemv", "reduction"):
        assert set(cpu[name]) <= set(cpu["full"])
        assert set(gpu[name]) <= set(gpu["full"])
    assert {rules[-1] for rules in gpu.values()} == {"dl.gpu.Fallback"}


def test_every_rule_has_its_defaults() -> None:
    for use in load_profile("full").sections["cpu"]:
        assert use.values == {p.name: p.default for p in use.rule.parameters}


def test_parameters(tmp_path: Path) -> None:
    rules = '[cpu]\nrules = ["dl.cpu.Reduction", "cpu.gemv"]\n'
    profile = read(tmp_path, rules + '[cpu.parameters."cpu.gemv"]\nvectors = 3\n')
    reduction, gemv = profile.rules_for("cpu", "cpu")
    assert reduction.values == {}
    assert gemv.values == DEFAULTS | {"vectors": 3}


def test_a_backends_own_section_wins_over_its_familys(tmp_path: Path) -> None:
    profile = read(
        tmp_path,
        '[gpu]\nrules = ["dl.gpu.Fallback"]\n[cuda]\nrules = ["dl.gpu.GEMV", "dl.gpu.Fallback"]\n',
    )
    assert ids(profile, "cuda") == ["dl.gpu.GEMV", "dl.gpu.Fallback"]
    assert ids(profile, "metal") == ["dl.gpu.Fallback"]


def test_no_rules_for_a_backend(tmp_path: Path) -> None:
    profile = read(tmp_path, '[cuda]\nrules = ["dl.gpu.Fallback"]\n')
    with pytest.raises(ProfileError, match=r"mine\.toml: cpu: profile 'mine' has no rules.*: cuda"):
        profile.rules_for("cpu", "cpu")
    with pytest.raises(ProfileError, match=r"vulkan"):
        profile.digest("vulkan", "gpu")


def test_the_users_folder_wins(tmp_path: Path) -> None:
    write(tmp_path, "[cpu]\nrules = []\n", "full")
    write(tmp_path, '[cpu]\nrules = ["cpu.gemv"]\n', "own")
    (tmp_path / "notes.txt").write_text("no profile")
    assert list_profiles(tmp_path).keys() == list_profiles().keys() | {"own"}
    assert ids(load_profile("full", tmp_path)) == []
    assert ids(load_profile("own", tmp_path)) == ["cpu.gemv"]
    assert ids(load_profile("gemv", tmp_path)) == ["cpu.gemv"]
    assert ids(load_profile("full")) != []


def test_the_users_folder_may_be_under_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "[cpu]\nrules = []\n", "own")
    assert load_profile("own", Path("~")).name == "own"


def test_no_such_profile(tmp_path: Path) -> None:
    with pytest.raises(ProfileError) as caught:
        load_profile("fast")
    known = ", ".join(list_profiles())
    assert str(caught.value) == f"{SHIPPED}: fast: no such profile; known: {known}"
    write(tmp_path, "[cpu]\nrules = []\n")
    with pytest.raises(ProfileError, match=rf", {tmp_path}: fast: no such profile.*, mine"):
        load_profile("fast", tmp_path)


@pytest.mark.parametrize("name", ["", "../profiles/full", "full.toml", "FULL"])
def test_a_name_is_not_a_path(name: str) -> None:
    with pytest.raises(ProfileError, match="no such profile"):
        load_profile(name)


def test_no_such_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(ProfileError, match=rf"^{folder}: profiles: no such folder"):
            load_profile("full", folder)


WRONG = [
    # text, key, problem
    ("", "mine", "no section; known: cpu, gpu, cuda, rocm, metal, vulkan, webgpu"),
    ('description = "nothing"', "mine", "no section"),
    ("description = 1\n[cpu]\nrules = []", "description", "expected a string, found 1"),
    ("[tpu]\nrules = []", "tpu", "no such section; known: description, cpu, gpu, cuda"),
    ('name = "fast"\n[cpu]\nrules = []', "name", "no such section"),
    ("cpu = 1", "cpu", "expected a table [cpu], found 1"),
    ("cpu = []", "cpu", "expected a table [cpu], found []"),
    ("[[cpu]]\nrules = []", "cpu", "expected a table [cpu]"),
    ("[cpu]\n", "cpu.rules", "expected a list of rule ids, found None"),
    ('[cpu]\nrules = "cpu.gemv"', "cpu.rules", "expected a list of rule ids, found 'cpu.gemv'"),
    ("[cpu]\nrules = [1]", "cpu.rules", "expected a list of rule ids, found [1]"),
    ("[cpu]\nrule = []", "cpu.rule", "no such key; known: rules, parameters"),
    ('[cpu]\nrules = ["x"]', "cpu.rules", f"no rule 'x' for cpu; known: {', '.join(CPU)}"),
    (
        '[cpu]\nrules = ["dl.gpu.Matmul"]',
        "cpu.rules",
        f"no rule 'dl.gpu.Matmul' for cpu; known: {', '.join(CPU)}",
    ),
    (
        '[metal]\nrules = ["cpu.gemv"]',
        "metal.rules",
        f"no rule 'cpu.gemv' for metal; known: {', '.join(GPU)}",
    ),
    (
        '[cpu]\nrules = ["cpu.gemv", "cpu.gemv"]',
        "cpu.rules",
        "rule 'cpu.gemv' is listed twice",
    ),
    (
        '[gpu]\nrules = ["dl.gpu.GEMV", "dl.gpu.Fallback", "dl.gpu.GEMV"]',
        "gpu.rules",
        "rule 'dl.gpu.GEMV' is listed twice",
    ),
    ("[cpu]\nrules = []\nparameters = 3", "cpu.parameters", "expected a table, found 3"),
    (
        '[cpu]\nrules = ["dl.cpu.Reduction"]\n[cpu.parameters."cpu.gemv"]\nvectors = 3',
        'cpu.parameters."cpu.gemv"',
        "parameters for a rule that is not in the list; known: dl.cpu.Reduction",
    ),
    (
        '[cpu]\nrules = ["cpu.gemv"]\n[cpu.parameters.cpu.gemv]\nvectors = 3',  # quotes forgotten
        'cpu.parameters."cpu"',
        "parameters for a rule that is not in the list; known: cpu.gemv",
    ),
    (
        '[cpu]\nrules = ["cpu.gemv"]\n[cpu.parameters]\n"cpu.gemv" = 1',
        'cpu.parameters."cpu.gemv"',
        "expected a table, found 1",
    ),
    (
        '[cpu]\nrules = ["cpu.gemv"]\n[cpu.parameters."cpu.gemv"]\ntile = 32',
        'cpu.parameters."cpu.gemv".tile',
        f"no such parameter; known: {', '.join(DEFAULTS)}",
    ),
    (
        '[cpu]\nrules = ["dl.cpu.GEMV"]\n[cpu.parameters."dl.cpu.GEMV"]\ntile = 32',
        'cpu.parameters."dl.cpu.GEMV".tile',
        "no such parameter; known: no parameters",
    ),
    *(
        (
            f'[cpu]\nrules = ["cpu.gemv"]\n[cpu.parameters."cpu.gemv"]\nvectors = {value}',
            'cpu.parameters."cpu.gemv".vectors',
            "is not a legal value; known: 0, 1, 2, 3, 4, 6",
        )
        for value in ("5", "-1", "4.0", '"4"', "true", "[4]", "{}", "nan")
    ),
    ("[cpu]\nrules = []\n[cpu]\nrules = []", "mine", "not readable as TOML"),
    ("[cpu]\nrules = []\nrules = []", "mine", "not readable as TOML"),
    ("[cpu\n", "mine", "not readable as TOML"),
    ("\0", "mine", "not readable as TOML"),
    ("a = " + "[" * 100_000, "mine", "not readable as TOML"),
]


@pytest.mark.parametrize(("text", "key", "problem"), WRONG, ids=range(len(WRONG)))
def test_every_error_names_file_key_and_what_is_known(
    tmp_path: Path, text: str, key: str, problem: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ProfileError) as caught:
        read_profile(path)
    error = caught.value
    assert (error.source, error.key) == (str(path), key)
    assert str(error).startswith(f"{path}: {key}: ")
    assert problem in str(error)


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe[cpu]")
    with pytest.raises(ProfileError, match="not readable as TOML"):
        read_profile(path)
    with pytest.raises(ProfileError, match="not readable as TOML"):
        read_profile(tmp_path / "gone.toml")


def digest(folder: Path, rules: str, parameters: str = "") -> str:
    text = f"[cpu]\nrules = [{rules}]\n" + parameters
    return read(folder, text).digest("cpu", "cpu")


def test_a_digest_is_a_sha256() -> None:
    for name in NAMES:
        for backend, family in (("cpu", "cpu"), ("cuda", "gpu")):
            profile = load_profile(name)
            first = profile.digest(backend, family)  # type: ignore[arg-type]
            assert re.fullmatch("[0-9a-f]{64}", first)
            assert first == load_profile(name).digest(backend, family)  # type: ignore[arg-type]


def test_the_digest_is_of_what_is_done_and_not_of_how_it_is_written(tmp_path: Path) -> None:
    plain = digest(tmp_path, '"cpu.gemv"')
    default = '[cpu.parameters."cpu.gemv"]\nvectors = 0 # as ever\n'
    assert digest(tmp_path, '"cpu.gemv"', default) == plain
    assert digest(tmp_path, '"cpu.gemv"', '[gpu]\nrules = ["dl.gpu.Fallback"]\n') == plain
    assert load_profile("gemv").digest("cpu", "cpu") == plain


def test_the_digest_changes_with_the_rules_their_order_and_parameters(tmp_path: Path) -> None:
    parameters = '[cpu.parameters."cpu.gemv"]\n'
    digests = [
        digest(tmp_path, ""),
        digest(tmp_path, '"cpu.gemv"'),
        digest(tmp_path, '"cpu.gemv"', parameters + "vectors = 2\n"),
        digest(tmp_path, '"cpu.gemv"', parameters + "vectors = 3\n"),
        digest(tmp_path, '"dl.cpu.Reduction"'),
        digest(tmp_path, '"cpu.gemv", "dl.cpu.Reduction"'),
        digest(tmp_path, '"dl.cpu.Reduction", "cpu.gemv"'),
    ]
    assert len(set(digests)) == len(digests)


def test_the_digest_changes_with_the_rules_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "their_rules.py"
    module.write_text("class R: ...\n")
    rule = Rule("their.rule", "cpu", "their_rules:R", "a rule")
    monkeypatch.setattr(profiles.profile, "known_rules", lambda: {rule.id: rule})
    before = digest(tmp_path, '"their.rule"')
    module.write_text("class R: ... # another\n")
    assert digest(tmp_path, '"their.rule"') != before
    module.write_text("class R: ...\n")
    assert digest(tmp_path, '"their.rule"') == before
    module.unlink()
    with pytest.raises(ProfileError, match=r"their_rules:R: their\.rule: "):
        digest(tmp_path, '"their.rule"')


def test_legal_values_of_every_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (
        Parameter("count", 1, (0, 1), "an int"),
        Parameter("share", 0.5, (0.5, 1.0), "a float"),
        Parameter("on", True, (True, False), "a bool"),
        Parameter("how", "a", ("a", "b"), "a string"),
    )
    rule = replace(known_rules()["cpu.gemv"], id="r", parameters=kinds)
    monkeypatch.setattr(profiles.profile, "known_rules", lambda: {"r": rule})
    head = '[cpu]\nrules = ["r"]\n[cpu.parameters.r]\n'
    (use,) = read(tmp_path, head + 'count = 0\nshare = 1.0\non = false\nhow = "b"\n').sections[
        "cpu"
    ]
    assert use.values == {"count": 0, "share": 1.0, "on": False, "how": "b"}
    # 1 == True == 1.0, but none of them is the other.
    for wrong in ("count = true", "count = 1.0", "share = 1", "on = 1", "on = 'true'", "how = 1"):
        with pytest.raises(ProfileError, match="is not a legal value"):
            read(tmp_path, head + wrong)
