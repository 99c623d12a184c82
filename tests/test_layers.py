"""The import law, read from the sources: who may import whom, and that nobody goes in circles.

Lazy imports count, and so do those for type checkers, relative ones, and `import_module("name")`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
PACKAGES = ("serve", "profiles", "loadtest")  # scripts and tests are outside the law
PUBLIC = ":__all__"  # only `from package import` one of the names in the package's __all__

# Package or module -> what it may import, besides itself, the standard library, numpy and, inside
# serve, serve.errors. The longest name that fits a module decides alone.
LAW: dict[str, set[str]] = {
    "serve": set(),
    "serve.errors": set(),
    "serve.stops": set(),
    "serve.tokenizer": {"tokenizers"},
    "serve.grammar": {
        f"serve.engine{PUBLIC}", "serve.tokenizer", "serve.grammar_rules", "llguidance",
    },
    "serve.grammar_rules": set(),
    "serve.chat_template": {"jinja2"},
    "serve.engine": set(),
    "serve.model": {"safetensors", "huggingface_hub", "ml_dtypes"},
    "serve.model.gpt2": {"serve.model", "tvm"},
    "serve.model.kv_pages": {"serve.model", "tvm"},
    "serve.model.layers": {"tvm"},
    "serve.backends": {"tvm"},
    "serve.compiler": {"serve.model", "serve.backends", "profiles", "tvm"},
    "serve.runtime": {
        "serve.engine", "serve.compiler.library", "serve.backends", "serve.model.config", "tvm",
    },
    "serve.logs": set(),
    "serve.protocol": {"serve.api.errors", "uvicorn", "httptools"},
    "serve.metrics": {f"serve.engine{PUBLIC}", "serve.engine.stats", "prometheus_client"},
    "serve.api": {
        f"serve.engine{PUBLIC}", "serve.tokenizer", "serve.stops", "serve.grammar",
        "serve.chat_template", "fastapi", "starlette", "pydantic",
    },
    "serve.config": {"*"},
    "serve.roof": {"serve.backends", "tvm"},
    "serve.trace": {"*"},
    "serve.trace_table": set(),
    "serve.bench": {"*"},
    "serve.tools": {"*"},
    "serve.loading": {"*"},
    "serve.memory": set(),
    "serve.host": {"serve.engine", "serve.loading", "serve.logs"},
    # The front of the server, which has no TVM.
    "serve.placement": {"serve.config", "serve.engine"},
    "serve.libraries": {
        "serve.api", "serve.config", "serve.engine", "serve.grammar", "serve.metrics",
        "serve.placement", "serve.tokenizer",
    },
    "serve.deployment": {
        "serve.api", "serve.config", "serve.libraries", "serve.placement", "profiles",
    },
    "serve.launch": {
        "serve.api", "serve.chat_template", "serve.config", "serve.deployment", "serve.engine",
        "serve.grammar", "serve.libraries", "serve.metrics", "serve.model.source",
        "serve.protocol", "serve.tokenizer", "fastapi", "uvicorn",
    },
    "serve.cli": {
        "serve.config", "serve.launch", "serve.logs", "serve.placement", "serve.tools", "profiles",
    },
    "profiles": set(),
    "profiles.rules": {"profiles", "tvm"},
    "profiles.cpu": {"profiles", "tvm", "tvm_ffi"},
    "profiles.gpu": {"profiles", "tvm"},
    "loadtest": {"locust", "gevent", "geventhttpclient"},
}  # fmt: skip
# What puts others together -> who alone may import it.
NOT_IMPORTED: dict[str, set[str]] = {
    "serve.config": {
        "serve.launch", "serve.deployment", "serve.libraries", "serve.placement", "serve.cli",
        "serve.tools", "serve.loading", "serve.bench", "serve.trace",
    },
    "serve.loading": {"serve.host", "serve.tools", "serve.bench", "serve.trace"},
    "serve.host": set(),
    "serve.libraries": {"serve.deployment", "serve.launch"},
    "serve.deployment": {"serve.launch"},
    "serve.launch": {"serve.cli"},
    "serve.bench": {"serve.tools", "serve.trace"},
    "serve.trace": {"serve.tools"},
    "serve.tools": {"serve.cli"},
    "serve.cli": set(),
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """`module` is as deep as it gets; `name` is what is taken from it, or "" for all of it."""

    line: int
    module: str
    name: str = ""


def modules() -> dict[str, Path]:
    """Every module of ours and its file."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports_of(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """All imports, wherever they stand."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(node, package)
            for alias in node.names:
                deeper = f"{origin}.{alias.name}"
                if deeper in MODULES:
                    yield Import(node.lineno, deeper)
                else:
                    yield Import(node.lineno, origin, alias.name)
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield Import(node.lineno, first.value)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """`from ..b import c` in a.x.y is from a.b."""
    if not node.level:
        return node.module or ""
    base = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _name(func: ast.expr) -> str:
    return func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def article(module: str) -> str | None:
    """The law's entry for a module."""
    return max((name for name in LAW if within(module, name)), key=len, default=None)


def is_legal(module: str, imported: Import) -> bool:
    target = imported.module
    for forbidden, importers in NOT_IMPORTED.items():
        if within(target, forbidden) and module not in {forbidden, *importers}:
            return False
    if target.partition(".")[0] in sys.stdlib_module_names | {"numpy"}:
        return True
    if target == "serve.errors" and within(module, "serve"):
        return True
    own = article(module)
    # `serve` is nobody's own package: its entry is for serve/__init__.py.
    return own is not None and any(
        _allows(allowed, imported) for allowed in LAW[own] | ({own} - {"serve"})
    )


def _allows(allowed: str, imported: Import) -> bool:
    if allowed.endswith(PUBLIC):
        package = allowed.removesuffix(PUBLIC)
        return imported.module == package and imported.name in public_names(package)
    return allowed == "*" or within(imported.module, allowed)


@cache
def public_names(package: str) -> set[str]:
    """Its `__all__`."""
    for node in ast.parse(MODULES[package].read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{package} has no __all__")


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    return [
        f"{module}, line {imported.line}: {imported.module} {imported.name}".rstrip()
        for imported in imports_of(source, module, is_package)
        if not is_legal(module, imported)
    ]


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle, or none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle
    return []


def is_package(path: Path) -> bool:
    return path.name == "__init__.py"


@pytest.mark.parametrize("module", MODULES)
def test_the_law_is_kept(module: str) -> None:
    path = MODULES[module]
    assert violations(module, path.read_text("utf-8"), is_package(path)) == []


def test_every_package_has_its_article() -> None:
    """`serve` stands for its __init__ alone, so that a new package cannot hide under it."""
    assert [module for module in MODULES if article(module) in (None, "serve")] == ["serve"]


def test_the_law_names_what_there_is() -> None:
    gone = [name for name in LAW if name not in MODULES and name != "profiles.gpu"]
    assert gone == []


def test_the_servers_front_has_no_tvm() -> None:
    """Nor by way of others: it would more than double its memory, and its time to start."""
    code = "import sys, serve.cli; print({'tvm', 'tvm_ffi', 'torch'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "set()\n"


def test_no_import_cycles() -> None:
    graph = {
        module: {
            imported.module
            for imported in imports_of(path.read_text("utf-8"), module, is_package(path))
            if imported.module in MODULES
        }
        for module, path in MODULES.items()
    }
    assert cycle(graph) == []
    assert graph["serve.engine"] >= {"serve.engine.engine", "serve.engine.stream"}  # it sees them


LEGAL = [
    ("serve.engine.batcher", "import heapq\nimport numpy as np\nfrom numpy.typing import NDArray"),
    ("serve.engine.batcher", "from serve.errors import EngineError\nfrom serve import errors"),
    ("serve.engine.batcher", "from serve.engine.runner import Chunk\nfrom . import runner"),
    ("serve.engine.batcher", "from .runner import Chunk"),
    ("serve.api.app", "from serve.engine import Engine, SamplingParams"),
    ("serve.api.app", "import fastapi.responses\nfrom pydantic import BaseModel"),
    ("serve.metrics", "from serve.engine import StepStats\nfrom serve.engine.stats import Gauges"),
    ("serve.model.gpt2", "from tvm import relax\nfrom serve.model.config import GPT2Config"),
    ("serve.runtime.runner", "from serve.compiler.library import Library\nimport tvm.runtime"),
    ("serve.compiler.compile", "from profiles import Profile\nfrom serve.model import gpt2"),
    ("serve.launch", "import uvicorn\nimport serve.api.app"),
    ("serve.loading", "from serve.runtime import runner"),
    ("serve.cli", "from serve import launch"),
    ("profiles.cpu.gemv", "import tvm\nfrom tvm.target import Target"),
    ("profiles.rules", 'import importlib\nimportlib.import_module(path)\nimport_module("tvm")'),
    ("loadtest.user", "import gevent\nfrom locust import User\nfrom loadtest.sse import Event"),
]
ILLEGAL = [
    ("serve.engine.batcher", "import tvm", "tvm"),
    ("serve.engine.batcher", "import tvm.runtime as r", "tvm.runtime"),
    ("serve.engine.batcher", "def f():\n    from tvm import relax", "tvm relax"),
    ("serve.engine.batcher", "if TYPE_CHECKING:\n    import fastapi", "fastapi"),
    ("serve.engine.batcher", "try:\n    import tvm\nexcept ImportError:\n    pass", "tvm"),
    ("serve.engine.batcher", "from serve import tokenizer", "serve.tokenizer"),
    ("serve.engine.batcher", "from .. import tokenizer", "serve.tokenizer"),
    ("serve.engine.batcher", "from ..model.hub import fetch", "serve.model.hub fetch"),
    ("serve.engine.batcher", "import serve", "serve"),
    ("serve.engine.batcher", "from serve import __doc__", "serve __doc__"),
    ("serve.engine.batcher", 'importlib.import_module("tvm")', "tvm"),
    ("serve.engine.batcher", '__import__("serve.metrics")', "serve.metrics"),
    ("serve.engine.batcher", "import numpyro", "numpyro"),
    ("serve.engine.batcher", "import serve.errors_of_others", "serve.errors_of_others"),
    ("serve.api.app", "from serve.engine.engine import Engine", "serve.engine.engine Engine"),
    ("serve.api.app", "from serve.engine import batcher", "serve.engine.batcher"),
    ("serve.api.app", "from serve.engine import Batcher", "serve.engine Batcher"),
    ("serve.api.app", "from serve.engine import *", "serve.engine *"),
    ("serve.api.app", "import serve.engine", "serve.engine"),
    ("serve.api.app", "import tvm", "tvm"),
    ("serve.api.app", "from serve import runtime", "serve.runtime"),
    ("serve.metrics", "from serve.engine import Batcher", "serve.engine Batcher"),
    ("serve.metrics", "from serve.api.app import create_app", "serve.api.app create_app"),
    ("serve.model.hub", "import tvm", "tvm"),
    ("serve.model.hub", "from serve.compiler import cache", "serve.compiler.cache"),
    ("serve.model.gpt2", "import safetensors", "safetensors"),
    ("serve.backends.cpu", "import profiles", "profiles"),
    ("serve.compiler.compile", "from serve.engine import Engine", "serve.engine Engine"),
    ("serve.runtime.runner", "from serve.compiler.compile import f", "serve.compiler.compile f"),
    ("serve.runtime.runner", "from serve.model import gpt2", "serve.model.gpt2"),
    ("serve.runtime.runner", "from profiles import Profile", "profiles Profile"),
    ("serve.stops", "import tokenizers", "tokenizers"),
    ("serve.tokenizer", "import transformers", "transformers"),
    ("serve.config", "from serve.launch import select", "serve.launch select"),
    ("serve.config", "import serve.bench", "serve.bench"),
    ("serve.launch", "from serve import bench", "serve.bench"),
    ("serve.launch", "from serve.runtime.runner import R", "serve.runtime.runner R"),
    ("serve.launch", "import tvm", "tvm"),
    ("serve.runtime.runner", "from serve.config import Settings", "serve.config Settings"),
    ("serve.launch", "import serve.cli", "serve.cli"),
    ("profiles.profile", "import tvm", "tvm"),
    ("profiles.cpu.gemv", "from serve.errors import CompileError", "serve.errors CompileError"),
    ("profiles.rules", "import serve.model", "serve.model"),
    ("loadtest.user", "from serve.api.schemas import Usage", "serve.api.schemas Usage"),
    ("loadtest.user", "import profiles", "profiles"),
    ("loadtest.user", "import requests", "requests"),
    ("serve.new", "import tvm", "tvm"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "source"), LEGAL)
def test_the_checker_lets_pass(module: str, source: str) -> None:
    assert violations(module, source) == []


@pytest.mark.parametrize(("module", "source", "found"), ILLEGAL)
def test_the_checker_finds(module: str, source: str, found: str) -> None:
    (violation,) = violations(module, source)
    assert violation.endswith(f": {found}")
    line = 2 if source.startswith(("def", "if", "try")) else 1
    assert violation.startswith(f"{module}, line {line}: ")


def test_relative_imports_of_a_package() -> None:
    assert violations("serve.engine", "from .engine import Engine", is_package=True) == []
    assert violations("serve.engine", "from ..model import hub", is_package=True) != []
    assert [i.module for i in imports_of("from . import engine", "serve.engine", True)] == [
        "serve.engine.engine"
    ]


def test_the_checker_finds_a_cycle() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert cycle({"a": {"a"}}) != []
