"""`python -m bench.peers`: measure, print the tables, write the JSON."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers import jobs
from bench.peers.checkpoint import SHAPES, checkpoint
from bench.peers.contestant import Contestant
from bench.peers.driver import Subject, measure
from bench.peers.engines import ENGINES, OURS
from bench.peers.process import DEFAULT_PYTHON
from bench.peers.report import markdown, rates
from bench.peers.server_start import start_seconds
from serve.backends import usable_cpus
from serve.bench import environment
from serve.compiler.cache import default_cache_dir

MODELS = ("gpt2:8,16,32", "gpt2-medium:8")  # of the medium, 32 at once would not fit in 24 GiB


@dataclass(frozen=True)
class Options:
    """What the command line says. models: name -> how many requests at once, each."""

    models: dict[str, tuple[int, ...]]
    engines: tuple[str, ...]
    pythons: dict[str, str]
    engine_options: dict[str, dict[str, str]]
    repetitions: int
    threads: int
    timeout: float
    cache: Path
    server_starts: int
    json_file: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 measured, whatever became of single engines; 2 wrong usage."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # workers end with us
    command = parser()
    parsed = command.parse_args(arguments)
    if parsed.table is not None:
        print(markdown(json.loads(parsed.table.read_text(encoding="utf-8"))))
        return 0
    try:
        options = options_from(parsed)
    except ValueError as error:
        command.error(str(error))
    report = run(options)
    print(markdown(report))
    return 0


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    add = command.add_argument
    add(
        "--model",
        action="append",
        metavar="SHAPE[:N,N…]",
        help=f"one of {', '.join(SHAPES)}, and how many requests at once ({' '.join(MODELS)})",
    )
    add("--engine", action="append", choices=ENGINES, help="repeat for several (all)")
    add("--venvs", type=Path, help="folder with a virtual environment for each ENGINE")
    add("--python", action="append", default=[], metavar="ENGINE=PATH", help="its interpreter")
    add(
        "--option",
        action="append",
        default=[],
        metavar="ENGINE.KEY=VALUE",
        help="such as ours.library.profile=stock or llamacpp.flash_attention=on",
    )
    add("--repetitions", type=int, default=5, help="of each job, after one to warm up (5)")
    add("--threads", type=int, default=usable_cpus(), help="of each engine (the usable CPUs)")
    add("--timeout", type=float, default=900.0, help="seconds for one job or load (900)")
    add("--cache", type=Path, help="where weights are kept (…/dlight-serve/peers)")
    add("--server-starts", type=int, default=3, help="of our server, timed (3)")
    add("--json", type=Path, dest="json_file", metavar="FILE", help="write the report there")
    add("--table", type=Path, metavar="FILE", help="only print the tables of that report")
    return command


def options_from(parsed: argparse.Namespace) -> Options:
    """Raises ValueError for what cannot be."""
    engines = tuple(parsed.engine or ENGINES)
    for name in ("repetitions", "threads"):
        if getattr(parsed, name) < 1:
            raise ValueError(f"--{name}: expected at least 1")
    return Options(
        models=dict(_model(text) for text in parsed.model or MODELS),
        engines=engines,
        pythons=_pythons(parsed.venvs, parsed.python),
        engine_options=_engine_options(parsed.option),
        repetitions=parsed.repetitions,
        threads=parsed.threads,
        timeout=parsed.timeout,
        cache=(parsed.cache or default_cache_dir() / "peers").absolute(),
        server_starts=parsed.server_starts,
        json_file=parsed.json_file,
    )


def _model(text: str) -> tuple[str, tuple[int, ...]]:
    name, colon, counts = text.partition(":")
    if name not in SHAPES:
        raise ValueError(f"--model {text}: known: {', '.join(SHAPES)}")
    parts = counts.split(",") if colon else []
    if any(not part.isdecimal() or int(part) < 2 for part in parts):
        raise ValueError(
            f"--model {text}: expected numbers of requests from 2, such as {name}:8,16"
        )
    return name, tuple(int(part) for part in parts)


def _pythons(venvs: Path | None, given: Sequence[str]) -> dict[str, str]:
    """An engine without an environment of its own runs in ours."""
    found = {}
    for engine in ENGINES:
        own = venvs and venvs.absolute() / engine / "bin" / "python"
        if own and own.exists():
            found[engine] = str(own)
    for text in given:
        engine, equals, path = text.partition("=")
        if engine not in ENGINES or not equals:
            raise ValueError(f"--python {text}: expected ENGINE=PATH")
        found[engine] = str(Path(path).absolute())
    return found


def _engine_options(given: Sequence[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for text in given:
        key, equals, value = text.partition("=")
        engine, dot, name = key.partition(".")
        if engine not in ENGINES or not equals or not dot:
            raise ValueError(f"--option {text}: expected ENGINE.KEY=VALUE")
        found.setdefault(engine, {})[name] = value
    return found


def run(options: Options) -> dict[str, Any]:
    """Measure every model; the JSON is written after each, so that a late failure costs little."""
    report: dict[str, Any] = {
        "workload": {
            "prompt_tokens": jobs.PROMPT_TOKENS,
            "new_tokens": jobs.NEW_TOKENS,
            "repetitions": options.repetitions,
            "threads": options.threads,
            "options": options.engine_options,
        },
        "models": {},
        **environment(),
    }
    for name, batches in options.models.items():
        report["models"][name] = _measure_model(name, batches, options)
        if options.json_file is not None:
            options.json_file.parent.mkdir(parents=True, exist_ok=True)
            options.json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _measure_model(name: str, batches: tuple[int, ...], options: Options) -> dict[str, Any]:
    config = SHAPES[name]
    subject = Subject(
        name,
        checkpoint(name, options.cache),
        config.vocab_size,
        config.n_positions,
        jobs.alone(),
        jobs.at_once(batches),
    )
    contestants = [
        Contestant(
            engine,
            engine,
            options.pythons.get(engine, DEFAULT_PYTHON),
            options.threads,
            options.timeout,
            options.cache / "logs",
            options.engine_options.get(engine, {}),
        )
        for engine in options.engines
    ]
    found = measure(subject, contestants, options.repetitions, options.cache, _say)
    found["weights_bytes"] = config.num_parameters * 4
    found["kv_bytes_per_token"] = config.kv_bytes_per_token()
    ours = found["engines"].get(OURS)
    if ours is not None and ours["state"] == "measured" and options.server_starts:
        own = options.engine_options.get(OURS, {})
        starts = [start_seconds(subject.folder, own) for _ in range(options.server_starts)]
        found["server_start"] = rates(starts) | {"unit": "seconds"}
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
