"""`dlight-serve trace`: where the time of the Gettysburg workload goes, kernel by kernel.

For each phase and kernel: the rule that took it, calls, time, FLOP, bytes, and how near it comes to
this machine's roof. Prompts and decode steps are run through the runner three ways: plainly, for
the time that the tracing costs; with the arguments recorded, for the work; and timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from serve import bench, loading
from serve.backends import usable_cpus
from serve.compiler.arguments import work_of
from serve.compiler.library import Manifest
from serve.config import Settings
from serve.engine import Chunk, Logits
from serve.errors import ConfigError
from serve.roof import Roof, measure_roof
from serve.runtime.instrument import Call, Instrument
from serve.runtime.runner import TVMRunner
from serve.trace_table import table

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Options:
    """The workload, as in bench; `show_all`: no folding of small kernels in the table."""

    batch: int = 1
    prompt_tokens: int = 322
    decode_tokens: int = 64
    repetitions: int = 3
    show_all: bool = False
    json_file: Path | None = None


@dataclass
class Phase:
    """One pass through a phase: seconds of the runner's calls, and what they called."""

    steps: int = 0
    seconds: float = 0.0
    calls: list[Call] = field(default_factory=list)


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--batch", type=int, default=1, help="sequences side by side (1)")
    add("--prompt-tokens", type=int, default=322, help="tokens of each prompt (322)")
    add("--decode-tokens", type=int, default=64, help="decode steps (64)")
    add("--repetitions", type=int, default=3, help="plain and timed passes; the median counts (3)")
    add("--all", action="store_true", dest="show_all", help="a line for every kernel")
    add("--json", type=Path, dest="json_file", metavar="FILE", help="write the results there")


def options_from(parsed: argparse.Namespace) -> Options:
    """Raises ConfigError for a count below 1."""
    counts = ("batch", "prompt_tokens", "decode_tokens", "repetitions")
    for name in counts:
        value = getattr(parsed, name)
        if value < 1:
            raise ConfigError("command line", f"--{name.replace('_', '-')}", value, "at least 1")
    return Options(*(getattr(parsed, name) for name in (*counts, "show_all", "json_file")))


def run(options: Options, settings: Settings, say: bench.Say) -> dict[str, Any]:
    """Trace, print the table, write the JSON; returns what it holds."""
    if options.json_file is not None:
        bench.check_writable(options.json_file)
    chosen = loading.select(settings)
    library = chosen.compile(settings, say).library
    kernels = {entry["kernel"]: entry for entry in library.manifest.coverage}
    instrument = Instrument(kernels, chosen.backend.device())
    with instrument.on_cache_kernels(library.path):
        runner = _runner(chosen.profile.name, options, settings, say)
    is_cpu = chosen.backend.family == "cpu"
    before = measure_roof(chosen.backend) if is_cpu else None
    plain, timed, recorded = _passes(runner, instrument, options, say)
    roof = measure_roof(chosen.backend).best(before) if before is not None else None
    report = {
        "workload": _workload(options, settings, library.manifest),
        "roof": None if roof is None else roof.as_dict(),
        "phases": [
            _phase(name, plain[name], timed[name], _work(recorded[name][0].calls, kernels, roof))
            for name in PHASES
        ],
        **bench.environment(),
    }
    for line in table(report, options.show_all):
        say(line)
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _runner(profile: str, options: Options, settings: Settings, say: bench.Say) -> TVMRunner:
    workload = bench.Options(
        (profile,), options.batch, options.prompt_tokens, options.decode_tokens
    )
    runners, _ = bench.prepare(workload, settings, say)
    return runners[profile]


def _workload(options: Options, settings: Settings, manifest: Manifest) -> dict[str, Any]:
    own = {k: v for k, v in asdict(options).items() if k not in ("json_file", "show_all")}
    return own | {
        "model": settings.model.source,
        "profile": manifest.profile,
        "backend": manifest.backend,
        "library_digest": manifest.digest,
        "threads": settings.runner.threads or usable_cpus(),
    }


Passes = Mapping[str, Sequence[Phase]]


def _passes(
    runner: TVMRunner, instrument: Instrument, options: Options, say: bench.Say
) -> tuple[Passes, Passes, Passes]:
    """By phase: plain ones, timed ones, and one whose calls have their arguments.

    The instrument is the VM's for good, so the plain ones come first.
    """
    prompt = bench.workload(options.prompt_tokens, runner.limits.vocab_size)

    def go(what: str, repetitions: int) -> Passes:
        done: dict[str, list[Phase]] = {name: [] for name in PHASES}
        for repetition in range(repetitions):
            say(f"{what} {repetition + 1}/{repetitions}")
            for name, phase in _drive(runner, prompt, options, instrument).items():
                done[name].append(phase)
        return done

    go("warming up", 1)
    plain = go("plain", options.repetitions)
    runner.set_instrument(instrument)
    instrument.is_on = instrument.record = True
    recorded = go("recording", 1)
    instrument.record = False
    return plain, go("timing", options.repetitions), recorded


def _drive(
    runner: TVMRunner, prompt: Sequence[int], options: Options, instrument: Instrument
) -> dict[str, Phase]:
    """One pass: prefill sequence after sequence, decode all greedily."""
    phases = {name: Phase() for name in PHASES}

    def timed(phase: Phase, step: Callable[..., Logits], *arguments: Any) -> Logits:
        instrument.take()
        start = time.perf_counter()
        logits = step(*arguments)
        phase.seconds += time.perf_counter() - start
        phase.steps += 1
        phase.calls += instrument.take()
        return logits

    seq_ids = list(range(options.batch))
    longest = runner.limits.max_step_tokens
    for seq_id in seq_ids:
        runner.add(seq_id)
    try:
        tokens = []
        for seq_id in seq_ids:
            for begin in range(0, len(prompt), longest):
                chunk = Chunk(seq_id, prompt[begin : begin + longest])
                logits = timed(phases["prefill"], runner.prefill, [chunk])
            tokens.append(int(np.argmax(logits[0])))
        for _ in range(options.decode_tokens):
            logits = timed(phases["decode"], runner.decode, seq_ids, tokens)
            tokens = np.argmax(logits, axis=1).tolist()
    finally:
        for seq_id in seq_ids:
            runner.release(seq_id)
    return phases


def _phase(
    name: str,
    plain: Sequence[Phase],
    timed: Sequence[Phase],
    work: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What the report says of a phase; the kernels and what is outside add up to `seconds`."""
    chosen = _median(timed)
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for call in chosen.calls:
        seconds[call.kernel] += call.seconds
        calls[call.kernel] += 1
    rows = [
        _row(kernel, calls[kernel], seconds[kernel], chosen.seconds, work[kernel])
        for kernel in sorted(seconds, key=lambda kernel: -seconds[kernel])
    ]
    return {
        "phase": name,
        "steps": chosen.steps,
        "seconds": chosen.seconds,
        "plain_seconds": _median(plain).seconds,
        "outside_seconds": chosen.seconds - sum(seconds.values()),
        "kernels": rows,
    }


def _median(passes: Sequence[Phase]) -> Phase:
    """The one of the median time; of two, the faster."""
    return sorted(passes, key=lambda phase: phase.seconds)[(len(passes) - 1) // 2]


def _work(
    calls: Sequence[Call], kernels: Mapping[str, Mapping[str, Any]], roof: Roof | None
) -> dict[str, dict[str, Any]]:
    """By kernel: its rule, its counts over all calls, and the least time for them.

    A number is None if it is not known.
    """
    total: dict[str, dict[str, Any]] = {}
    known: dict[tuple[str, Any], dict[str, Any]] = {}
    for call in calls:
        assert call.arguments is not None
        key = (call.kernel, tuple(map(_hashable, call.arguments)))
        if key not in known:
            known[key] = _work_of_call(kernels[call.kernel], call.arguments, roof)
        if call.kernel in total:
            before = total[call.kernel]
            total[call.kernel] = {name: _sum(before[name], n) for name, n in known[key].items()}
        else:
            total[call.kernel] = known[key]
    told = ("rule", "as_written")
    return {k: {name: kernels[k][name] for name in told} | work for k, work in total.items()}


def _work_of_call(
    entry: Mapping[str, Any], arguments: Sequence[Any], roof: Roof | None
) -> dict[str, Any]:
    flop, read, written = work_of(entry.get("work", {}), arguments)
    moved, least = _sum(read, written), None
    if roof is not None and flop is not None and moved is not None:
        least = roof.seconds(flop, moved)
    return {
        "flop": flop,
        "bytes_read": read,
        "bytes_written": written,
        "bytes": moved,
        "roof_seconds": least,
    }


def _hashable(argument: Any) -> Any:
    if isinstance(argument, tuple):
        shape, values = argument
        return shape, None if values is None else values.tobytes()
    return argument


def _sum(a: Any, b: Any) -> Any:
    return None if a is None or b is None else a + b


def _row(
    kernel: str, calls: int, seconds: float, whole: float, work: Mapping[str, Any]
) -> dict[str, Any]:
    def a_second(amount: float | None, unit: float) -> float | None:
        return None if amount is None else amount / seconds / unit

    return {
        "kernel": kernel,
        "calls": calls,
        "seconds": seconds,
        "share": seconds / whole,
        **work,
        "gflops": a_second(work["flop"], 1e9),
        "gbps": a_second(work["bytes"], 1e9),
        "roof_fraction": a_second(work["roof_seconds"], 1),
    }
