"""The docs say what is: metrics, settings, request fields, the import law, paths and links."""

from __future__ import annotations

import asyncio
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.docs import LADDER, TABLES, filled, ladder, results
from serve.api.app import ServedModels, create_app
from serve.api.chat_schemas import ChatRequest
from serve.api.schemas import CompletionRequest, GenerationFields
from serve.config import Settings, load_settings
from serve.engine import Engine, FinishEvent, SamplingParams, Stream
from serve.metrics import ENGINE, EngineMetrics, Registry, render
from tests.fakes import FakeAdmin, FakeRunner
from tests.test_layers import LAW, NOT_IMPORTED, PUBLIC

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
SERVE_TOML = ROOT / "serve.toml"
CODE = re.compile(r"`([^`]+)`")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def tables(name: str, *header: str) -> Iterator[list[str]]:
    """The rows of all tables with this header, as texts of their cells."""
    rows: list[list[str]] = []
    for line in [*read(name).splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
            continue
        if rows and tuple(rows[0]) == header:
            yield from rows[2:]
        rows = []


# -- docs/metrics.md

Described = dict[str, tuple[str, set[str]]]  # name -> type, labels


def exposed() -> Described:
    """What /metrics says after one library, one HTTP request and one sequence."""
    registry = Registry()

    async def one_request() -> None:
        engine = Engine(FakeRunner(), observer=metrics)
        engines.append(engine)
        engine.start()
        await _finished(engine.submit([1, 2, 3], SamplingParams(max_tokens=2)))
        await engine.drain(0)

    engines: list[Engine] = []
    metrics = EngineMetrics(registry, "m", "b", "p", gauges=lambda: engines[0].gauges())
    metrics.on_library("compiled", "q0f32", "0123", "0.27", compile_seconds=1.0)
    asyncio.run(one_request())
    registry.observe_http("/v1/completions", 200, 0.1)
    body, _ = render(registry)
    return {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
        )
        for family in text_string_to_metric_families(body.decode())
    }


async def _finished(stream: Stream) -> None:
    events = [event async for event in stream]
    assert isinstance(events[-1], FinishEvent)


def described() -> Described:
    rows = list(tables("docs/metrics.md", "name", "type", "more labels", "meaning"))
    found = {}
    for name, kind, labels, _ in rows:
        own = set() if name.startswith(("`http_", "`dlight_server_")) else set(ENGINE)
        found[name.strip("`")] = (kind, own | set(CODE.findall(labels)))
    assert len(found) == len(rows), "a metric is there twice"
    return found


def test_every_metric_is_described_and_every_description_is_of_a_metric() -> None:
    assert described() == exposed()


def test_the_text_names_no_other_metrics() -> None:
    series = {
        name + suffix
        for name, (kind, _) in exposed().items()
        for suffix in ("", "_bucket", "_sum", "_count")
        if not suffix or kind == "histogram"
    }
    named = set(re.findall(r"\b(?:dlight|http)_[a-z_]*[a-z]\b", read("docs/metrics.md")))
    assert named <= series


# -- serve.toml


def documented() -> Iterator[tuple[str, str, Any, bool]]:
    """Section, key, value, and whether it is commented out."""
    section = ""
    for line in SERVE_TOML.read_text(encoding="utf-8").splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = header[1]
        elif setting := re.fullmatch(r"(# )?(\w+) = .*", line):
            value = tomllib.loads(line.removeprefix("# "))[setting[2]]
            yield section, setting[2], value, setting[1] is not None


def defaults() -> dict[str, dict[str, Any]]:
    settings = Settings()
    return {f.name: dict(_items(getattr(settings, f.name))) for f in fields(settings)}


def _items(section: Any) -> Iterator[tuple[str, Any]]:
    names = getattr(type(section), "model_fields", None) or [f.name for f in fields(section)]
    for name in names:
        yield name, getattr(section, name)


def test_serve_toml_has_every_setting_with_its_default() -> None:
    """A default that TOML cannot say, None, is shown as a comment with an example."""
    shown: dict[str, dict[str, Any]] = {}
    for section, key, value, is_comment in documented():
        assert key not in shown.setdefault(section, {}), f"{section}.{key} is there twice"
        shown[section][key] = None if is_comment else value
    assert shown == defaults()


def test_serve_toml_as_it_is_and_with_its_examples_can_be_read(tmp_path: Path) -> None:
    assert load_settings(SERVE_TOML, {}, {}) == Settings()
    text = re.sub(r"^# (\w+ = )", r"\1", SERVE_TOML.read_text("utf-8"), flags=re.MULTILINE)
    examples = tmp_path / "serve.toml"
    examples.write_text(text, encoding="utf-8")
    assert load_settings(examples, {}, {}).runner.kv_tokens is not None


# -- docs/api.md


def test_every_request_field_is_described_with_its_default() -> None:
    rows = tables("docs/api.md", "field", "type and range", "default", "meaning")
    found = {name.strip("`"): default for name, _, default, _ in rows}
    assert found.keys() == CompletionRequest.model_fields.keys()
    for name, field in CompletionRequest.model_fields.items():
        if field.is_required():
            assert found[name] == "required", name
        else:
            assert json.loads(found[name].strip("`")) == field.default, name


def test_every_field_of_a_chat_is_described_with_its_default() -> None:
    """Those that it has besides the common ones; some share a line."""
    rows = list(tables("docs/api.md", "chat field", "type and range", "default", "meaning"))
    found = {name: row[2] for row in rows for name in CODE.findall(row[0])}
    own = ChatRequest.model_fields.keys() - GenerationFields.model_fields.keys()
    assert found.keys() == own
    for name in own:
        field = ChatRequest.model_fields[name]
        expected = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        assert found[name] == expected, name


def test_every_endpoint_is_described() -> None:
    """Those of administration in live.md, the others in api.md."""
    admin = FakeAdmin()
    document = create_app(ServedModels(), lambda: (b"", ""), admin=admin).openapi()
    paths = {
        f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item
    }
    first_table = read("docs/api.md").partition("## ")[0]
    described = set(re.findall(r"(?:GET|POST) /[^`]*", first_table))
    for line in re.findall(r"^\| `(?:GET|POST) /admin.*$", read("docs/live.md"), re.MULTILINE):
        described |= set(re.findall(r"(?:GET|POST) /admin[^`]*", line))
    assert described == {*paths, "GET /openapi.json"}


# -- docs/architecture.md


def test_the_import_law_is_the_tests() -> None:
    rows = tables("docs/architecture.md", "module", "may import besides")
    found = {module.strip("`"): set(CODE.findall(allowed)) - {"__init__", "__all__"}
             for module, allowed in rows if not allowed.startswith("everything")}  # fmt: skip
    law = {
        module: {name.removesuffix(PUBLIC) for name in allowed}
        for module, allowed in LAW.items()
        if allowed != {"*"}
    }
    assert found == law
    rows = tables("docs/architecture.md", "module", "may import besides")
    everything = {module.strip("`") for module, allowed in rows if allowed == "everything"}
    assert everything == {module for module, allowed in LAW.items() if allowed == {"*"}}
    assert everything <= NOT_IMPORTED.keys()


# -- every *.md


def documents() -> list[str]:
    """Those of this repository: not of an environment, a cache or a build in it."""
    paths = [path.relative_to(ROOT) for path in ROOT.rglob("*.md")]
    return sorted(
        str(path)
        for path in paths
        if "site-packages" not in path.parts and not any(p.startswith(".") for p in path.parts)
    )


@cache
def anchors(name: str) -> set[str]:
    """GitHub's, of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", read(name), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def links(name: str) -> list[str]:
    """Targets within the repository; code is left out."""
    text = re.sub(r"^(?:    [^\n]*|```.*?^```)$", "", read(name), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize("name", documents())
def test_relative_links_resolve(name: str) -> None:
    for link in links(name):
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in anchors(str(path.resolve().relative_to(ROOT))), f"{name}: {link}"


@pytest.mark.parametrize("name", documents())
def test_named_files_exist(name: str) -> None:
    """`serve/model/gpt2.py`, and folders; a capital letter is a placeholder, as in `NAME.toml`."""
    folders = "serve|profiles|loadtest|scripts|tests|docs"
    for path in re.findall(rf"`((?:{folders})/[a-z0-9_./-]+)`", read(name)):
        assert (ROOT / path).exists(), f"{name}: {path}"


@pytest.mark.parametrize("name", documents())
def test_no_paths_of_one_machine_and_no_addresses_of_registries(name: str) -> None:
    assert re.findall(r"/(?:work|root|Users)/|pythonhosted|pypi\.org", read(name)) == []


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_results_is_the_measured_one(name: str) -> None:
    """`python -m bench.docs` makes them."""
    document, table = TABLES[name]
    assert read(document) == filled(read(document), name, table(results(name)))


def test_the_ladder_is_the_measured_one() -> None:
    assert LADDER.read_text(encoding="utf-8") == ladder(results("cpu.json")["results"])


def test_a_document_without_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"cpu\.json"):
        filled("# Title\n", "cpu.json", "table")
