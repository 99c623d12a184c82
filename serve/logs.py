"""How a line of the log looks: as text, or as JSON. Ours and uvicorn's alike."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal

Format = Literal["text", "json"]


def configure(level: str, form: Format) -> None:
    """Log to standard error from this level on, unless somebody has set logging up already."""
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter() if form == "text" else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller gave as `extra={"fields": …}`."""
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


class TextFormatter(logging.Formatter):
    """The message, then the fields as name=value; one that is no plain word is in quotes."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        pairs = (f" {name}={_word(value)}" for name, value in _fields(record).items())
        return super().formatMessage(record) + "".join(pairs)


def _word(value: object) -> str:
    text = str(value)
    is_plain = text != "" and text.isprintable() and " " not in text
    return text if is_plain else json.dumps(text)


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, the fields, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
