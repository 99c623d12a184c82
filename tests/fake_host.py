"""An engines' process over fake runners: `python -m tests.fake_host FD`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from serve.engine import EngineConfig
from serve.engine.host import Prepared, serve
from serve.errors import LoadError
from tests.fakes import FakeRunner


class Stubborn(FakeRunner):
    """Whose step never ends where its one sequence begins with token 13; 14 ends the process."""

    def _step(self, what: str, seq_ids: Any) -> None:
        first = {self.tokens[s][0] for s in seq_ids if self.tokens[s]}
        if 13 in first:
            time.sleep(3600)
        if 14 in first:
            os.abort()
        super()._step(what, seq_ids)


def prepare(request: Any, report: Callable[[str], None]) -> Prepared:
    """`request`: what to do."""
    report("preparing")
    if request == "fail":
        raise LoadError("there is no such thing")
    if request == "break":
        raise ZeroDivisionError("unforeseen")
    return Prepared(Stubborn(), EngineConfig(max_waiting=4, max_running=2), {"asked": request})


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), prepare, free_memory=lambda: None)
