"""An engines' process over fake runners: `python -m tests.fake_host FD`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from serve.engine import EngineConfig
from serve.engine.host import Prepared, serve
from serve.errors import LoadError
from serve.placement import LibraryFacts, LoadRequest
from tests.fakes import FakeRunner


class Stubborn(FakeRunner):
    """Whose step never ends where its one sequence begins with token 13; 14 ends the process.

    15 makes each of its steps take long, so that it is there for minutes.
    """

    def _step(self, what: str, seq_ids: Any) -> None:
        first = {self.tokens[s][0] for s in seq_ids if self.tokens[s]}
        if 13 in first:
            time.sleep(3600)
        if 14 in first:
            os.abort()
        if 15 in first:
            time.sleep(1)
        super()._step(what, seq_ids)


def prepare(request: Any, report: Callable[[str], None]) -> Prepared:
    """`request`: what to do, or a LoadRequest."""
    if isinstance(request, LoadRequest):
        return load(request, report)
    report("preparing")
    if request == "stall":
        time.sleep(3600)
    if request == "fail":
        raise LoadError("there is no such thing")
    if request == "break":
        raise ZeroDivisionError("unforeseen")
    return Prepared(Stubborn(), EngineConfig(max_waiting=4, max_running=2), {"asked": request})


def load(request: LoadRequest, report: Callable[[str], None]) -> Prepared:
    """Of a profile named "broken" it fails, that of "slow" waits for a file."""
    settings, profile = request.settings, request.placement.profile
    report("compiling")
    if profile == "broken":
        raise LoadError("it is broken")
    if profile == "slow":
        while not Path(f"{settings.library.profiles_dir}/go").exists():
            time.sleep(0.01)
    facts = LibraryFacts("q0f32", f"digest of {profile}", "0", "compiled", 1.0, [])
    return Prepared(Stubborn(), settings.engine, facts)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), prepare, free_memory=lambda: None)
