"""`python -m bench.peers`: its flags, and the table of a report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench.peers.__main__ import Options, main, options_from, parser

pytestmark = pytest.mark.unit


def options(*arguments: str) -> Options:
    return options_from(parser().parse_args(arguments))


def test_the_defaults() -> None:
    found = options()
    assert found.models == {"gpt2": (8, 16, 32), "gpt2-medium": (8,)}
    assert found.engines == (
        "ours", "transformers", "ctranslate2", "llamacpp", "openvino", "vllm",
    )  # fmt: skip
    assert found.pythons == {}


def test_environments_by_folder_and_by_name(tmp_path: Path) -> None:
    for engine in ("vllm", "openvino"):
        (tmp_path / engine / "bin").mkdir(parents=True)
        (tmp_path / engine / "bin" / "python").touch()
    found = options("--venvs", str(tmp_path), "--python", f"vllm={sys.executable}")
    assert found.pythons == {
        "openvino": str(tmp_path / "openvino" / "bin" / "python"),
        "vllm": sys.executable,
    }


def test_options_of_engines() -> None:
    found = options("--option", "ours.library.profile=stock", "--option", "llamacpp.x=a=b")
    assert found.engine_options == {"ours": {"library.profile": "stock"}, "llamacpp": {"x": "a=b"}}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "gpt3"),
        ("--model", "gpt2:1"),
        ("--model", "gpt2:eight"),
        ("--python", "vllm"),
        ("--python", "other=python"),
        ("--option", "ours=stock"),
        ("--option", "other.a=b"),
        ("--repetitions", "0"),
        ("--threads", "0"),
        ("--engine", "other"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_table_of_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"workload": {}, "models": {}}))
    assert main(["--table", str(file)]) == 0
    assert capsys.readouterr().out == "\n"
