"""The Dockerfile as text, since no test may build it: hadolint, and the promises of our own."""

from __future__ import annotations

import json
import re
import subprocess
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "Dockerfile"
HADOLINT = Path(sysconfig.get_path("scripts")) / "hadolint"


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) in order; continued lines joined, comments dropped."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text("utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    pairs = [line.partition(" ") for line in lines if line.strip()]
    return [(name.upper(), rest.strip()) for name, _, rest in pairs]


def runtime_stage() -> list[tuple[str, str]]:
    everything = instructions()
    last = max(i for i, (name, _) in enumerate(everything) if name == "FROM")
    return everything[last:]


def only(name: str) -> str:
    """The runtime stage's one instruction of this name."""
    (rest,) = [rest for found, rest in runtime_stage() if found == name]
    return rest


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def copied_from_context() -> list[str]:
    copies = [rest.split() for name, rest in instructions() if name == "COPY"]
    return [path for words in copies if not words[0].startswith("--from") for path in words[:-1]]


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(
        [HADOLINT, "--failure-threshold", "style", DOCKERFILE], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_base_image_is_pinned_to_one_release_of_our_python() -> None:
    images = [rest.split()[0] for name, rest in instructions() if name == "FROM"]
    assert len(set(images)) == 1  # a virtual environment works only on the Python it was made with
    (tag,) = re.findall(r"^python:(\d+\.\d+)\.\d+-slim-\w+$", images[0])
    assert pyproject()["project"]["requires-python"] == f">={tag}"


def test_the_server_does_not_run_as_root() -> None:
    user = only("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)  # a number: what runAsNonRoot can check
    last = [name for name, _ in runtime_stage()]
    assert "RUN" not in last[last.index("USER") :]


def test_the_cache_is_a_volume_that_the_user_owns() -> None:
    volume = only("VOLUME")
    assert f"DLIGHT_CACHE_DIR={volume}" in only("ENV")
    uid = only("USER").split(":")[0]
    made = [rest for name, rest in runtime_stage() if name == "RUN" and volume in rest]
    assert [f"--owner={uid}" in rest for rest in made] == [True]
    names = [name for name, _ in runtime_stage()]
    assert "RUN" not in names[names.index("VOLUME") :]  # whose changes Docker would drop


def test_health_is_asked_at_the_exposed_port_without_a_proxy() -> None:
    check = only("HEALTHCHECK")
    command = json.loads(check[check.index("CMD") + len("CMD") :])
    compile(command[-1], "HEALTHCHECK", "exec")
    assert command[:2] == ["python", "-c"]
    assert f"http://127.0.0.1:{only('EXPOSE')}/health" in command[-1]
    assert "ProxyHandler({})" in command[-1]


def test_the_image_starts_the_installed_command() -> None:
    (entry_point,) = json.loads(only("ENTRYPOINT"))
    assert entry_point in pyproject()["project"]["scripts"]
    assert json.loads(only("CMD")) == ["run", "--host", "0.0.0.0"]


def test_a_compiler_is_there_to_link_with() -> None:
    installs = [rest for name, rest in runtime_stage() if name == "RUN" and "apt-get" in rest]
    assert len(installs) == 1
    assert re.search(r"\bg\+\+", installs[0])


def test_what_is_installed_follows_the_constraints_and_names_no_address() -> None:
    pips = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
    assert all("-c constraints.txt" in rest or "--no-deps" in rest for rest in pips)
    assert not re.search(r"https?://(?!127\.0\.0\.1)", DOCKERFILE.read_text("utf-8"))


def test_the_build_context_holds_what_is_copied_and_the_whole_of_the_package() -> None:
    rules = (ROOT / ".dockerignore").read_text("utf-8").split("\n")
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert "*" in rules
    assert set(copied_from_context()) == allowed
    assert all((ROOT / path).exists() for path in allowed)

    found = pyproject()["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {pattern.removesuffix("*") for pattern in found}
    project = pyproject()["project"]
    files = {"pyproject.toml", "constraints.txt", project["readme"], *project["license-files"]}
    assert allowed == packages | files
