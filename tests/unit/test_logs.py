"""Lines of the log, as text and as JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from serve.logs import Format, JsonFormatter, TextFormatter, configure

pytestmark = pytest.mark.unit


def record(message: str = "request", **fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"name": "serve.access", "levelno": 20, "levelname": "INFO", "msg": message, "created": 1.5}
    )
    made.fields = fields
    return made


def test_text() -> None:
    line = TextFormatter().format(record(status=200, route="/v1/models", seconds=0.5))
    assert line.endswith(" INFO serve.access: request status=200 route=/v1/models seconds=0.5")


@pytest.mark.parametrize("value", ["a b", "a\nb", "\x1b[31m", "é\u2028", ""])
def test_a_value_cannot_look_like_another_line_or_field(value: str) -> None:
    line = TextFormatter().format(record(a=value))
    name, _, shown = line.rpartition(" a=")
    assert name.endswith("request")
    assert shown.isprintable()
    assert json.loads(shown) == value


def test_json() -> None:
    line = JsonFormatter().format(record("50%\n", status=200, other=ValueError("x")))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:01.500+00:00",
        "level": "INFO",
        "logger": "serve.access",
        "message": "50%\n",
        "status": 200,
        "other": "x",
    }


def test_a_traceback_is_in_the_same_line() -> None:
    made = logging.makeLogRecord({"msg": "broken"})
    try:
        raise ZeroDivisionError("why")
    except ZeroDivisionError:
        made.exc_info = sys.exc_info()
    line = JsonFormatter().format(made)
    assert "\n" not in line
    assert "ZeroDivisionError: why" in json.loads(line)["exception"]


@contextlib.contextmanager
def bare_root() -> Iterator[logging.Logger]:
    """The root logger as a program finds it, without pytest's handlers."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(("form", "begins"), [("text", "20"), ("json", '{"time": "20')])
def test_everybody_logs_alike(
    form: Format, begins: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with bare_root():
        configure("info", form)
        for name in ("serve.api", "uvicorn.error"):
            logging.getLogger(name).info("hello %d", 5)
            logging.getLogger(name).debug("not this")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(begins) and "hello 5" in line for line in lines)
