"""`dlight-serve bench`: the Gettysburg workload on the runner itself, by profile, interleaved.

Prefill and decode are timed around the runner's calls alone; the server is not in the way.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from serve import loading
from serve.backends import usable_cpus
from serve.config import Settings
from serve.engine import Chunk, Logits
from serve.errors import ConfigError
from serve.runtime.runner import TVMRunner
from serve.runtime.weights import DeviceWeights
from serve.tokenizer import Tokenizer

Say = Callable[[str], None]
WARM_UP_TOKENS = (16, 2)  # prompt and decode: what a first call sets up, and little more


@dataclass(frozen=True)
class Options:
    """The workload: `batch` equal prompts side by side, nothing shared between them.

    repetitions: of each profile, at most; a profile that has used up max_seconds is not repeated.
    """

    profiles: tuple[str, ...]
    batch: int = 1
    prompt_tokens: int = 322
    decode_tokens: int = 64
    repetitions: int = 5
    max_seconds: float = 60.0
    json_file: Path | None = None


@dataclass(frozen=True)
class Run:
    """Seconds of one repetition; `logits` after the prompt, (batch, vocab)."""

    prefill_seconds: float
    decode_seconds: float
    logits: Logits


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--profile", action="append", dest="profiles", metavar="PROFILE", help="repeat to compare")
    add("--batch", type=int, default=1, help="sequences side by side (1)")
    add("--prompt-tokens", type=int, default=322, help="tokens of each prompt (322)")
    add("--decode-tokens", type=int, default=64, help="decode steps (64)")
    add("--repetitions", type=int, default=5, help="of each profile, at most (5)")
    add("--max-seconds", type=float, default=60.0, help="a slow profile is not repeated past it")
    add("--json", type=Path, dest="json_file", metavar="FILE", help="write the results there")


def options_from(parsed: argparse.Namespace) -> Options:
    """Raises ConfigError for a count below 1."""
    for name in ("batch", "prompt_tokens", "decode_tokens", "repetitions"):
        value = getattr(parsed, name)
        if value < 1:
            raise ConfigError("command line", f"--{name.replace('_', '-')}", value, "at least 1")
    return Options(
        tuple(dict.fromkeys(parsed.profiles or ())),
        parsed.batch,
        parsed.prompt_tokens,
        parsed.decode_tokens,
        parsed.repetitions,
        parsed.max_seconds,
        parsed.json_file,
    )


def run(options: Options, settings: Settings, say: Say) -> dict[str, Any]:
    """Measure, print the table, write the JSON; returns what it holds."""
    options = replace(options, profiles=options.profiles or (settings.library.profile,))
    if options.json_file is not None:
        check_writable(options.json_file)  # before the measuring, not after it
    runners, libraries = prepare(options, settings, say)
    vocab_size = min(runner.limits.vocab_size for runner in runners.values())
    prompt = workload(options.prompt_tokens, vocab_size)
    for name, runner in runners.items():
        say(f"warming up {name}")
        measure(runner, prompt[: WARM_UP_TOKENS[0]], options.batch, WARM_UP_TOKENS[1])
    runs = _interleave(runners, prompt, options, say)
    results = [_result(name, runs, libraries[name], options) for name in options.profiles]
    report = {
        "workload": _workload_of(options, settings),
        "results": results,
        **environment(),
    }
    for line in table(results):
        say(line)
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def check_writable(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise ConfigError(
            "command line", "--json", str(file), f"a writable file: {error}"
        ) from None


def workload(num_tokens: int, vocab_size: int) -> list[int]:
    """`<|endoftext|>`, the Gettysburg Address, a newline: 322 tokens; repeated or cut to length.

    Other tokens in their place if the model has fewer than GPT-2.
    """
    tokenizer = Tokenizer.bundled()
    text = (files("serve") / "data" / "gettysburg.txt").read_text(encoding="utf-8")
    ids = [tokenizer.eos_token_id, *tokenizer.encode(text), *tokenizer.encode("\n")]
    ids = [token % vocab_size for token in ids]
    return (ids * -(-num_tokens // len(ids)))[:num_tokens]


def measure(runner: TVMRunner, prompt: Sequence[int], batch: int, decode_tokens: int) -> Run:
    """One repetition: prefill the batch in as few steps as the runner takes, decode greedily."""
    seq_ids = list(range(batch))
    for seq_id in seq_ids:
        runner.add(seq_id)
    try:
        start = time.perf_counter()
        logits = _prefill(runner, seq_ids, prompt)
        prefilled = time.perf_counter()
        tokens = np.argmax(logits, axis=1)
        for _ in range(decode_tokens):
            tokens = np.argmax(runner.decode(seq_ids, tokens.tolist()), axis=1)
        return Run(prefilled - start, time.perf_counter() - prefilled, logits)
    finally:
        for seq_id in seq_ids:
            runner.release(seq_id)


def _prefill(runner: TVMRunner, seq_ids: Sequence[int], prompt: Sequence[int]) -> Logits:
    rows = []
    step = runner.limits.max_step_tokens
    for seq_id in seq_ids:
        for begin in range(0, len(prompt), step):
            logits = runner.prefill([Chunk(seq_id, prompt[begin : begin + step])])
        rows.append(logits)
    return np.concatenate(rows)


def prepare(
    options: Options, settings: Settings, say: Say
) -> tuple[dict[str, TVMRunner], dict[str, Any]]:
    """A runner for each profile, on one copy of the weights."""
    length = options.prompt_tokens + options.decode_tokens
    chosen = [loading.select(settings, name) for name in options.profiles]
    model, backend = chosen[0].model, chosen[0].backend
    if length > model.config.n_positions:
        expected = f"at most {model.config.n_positions} tokens, prompt and decode together"
        raise ConfigError("command line", "--prompt-tokens", options.prompt_tokens, expected)
    config = replace(
        settings.runner,
        max_batch=max(options.batch, settings.runner.max_batch),
        kv_tokens=options.batch * -(-length // 16) * 16,
    )
    device = backend.device()
    libraries = {c.profile.name: c.compile(settings, say).library for c in chosen}
    say(f"loading {model.spec}" + (": random weights, the text is noise" if model.is_noise else ""))
    weights = DeviceWeights(model.load(), device)
    runners = {
        name: TVMRunner(library, weights, backend, config) for name, library in libraries.items()
    }
    return runners, libraries


def _interleave(
    runners: dict[str, TVMRunner], prompt: Sequence[int], options: Options, say: Say
) -> dict[str, list[Run]]:
    """A, B, A, B …: what the machine does meanwhile falls on all alike."""
    runs: dict[str, list[Run]] = {name: [] for name in runners}
    spent = dict.fromkeys(runners, 0.0)
    for repetition in range(options.repetitions):
        for name, runner in runners.items():
            if repetition and spent[name] >= options.max_seconds:
                continue
            done = measure(runner, prompt, options.batch, options.decode_tokens)
            runs[name].append(done)
            spent[name] += done.prefill_seconds + done.decode_seconds
            say(
                f"{name} {repetition + 1}/{options.repetitions}: prefill "
                f"{done.prefill_seconds:.3f} s, decode {done.decode_seconds:.3f} s"
            )
    return runs


def _result(
    name: str, runs: dict[str, list[Run]], library: Any, options: Options
) -> dict[str, Any]:
    first, own = runs[options.profiles[0]], runs[name]
    prefill = _rates(options.batch * options.prompt_tokens, [r.prefill_seconds for r in own])
    decode = _rates(options.batch * options.decode_tokens, [r.decode_seconds for r in own])
    manifest = library.manifest
    return {
        "profile": name,
        "backend": manifest.backend,
        "prefill_tokens_per_second": prefill["median"],
        "decode_tokens_per_second": decode["median"],
        "prefill": prefill,
        "decode": decode,
        "prefill_speedup": median(r.prefill_seconds for r in first)
        / median(r.prefill_seconds for r in own),
        "decode_speedup": median(r.decode_seconds for r in first)
        / median(r.decode_seconds for r in own),
        "max_logit_difference": float(np.abs(own[0].logits - first[0].logits).max()),
        "repetitions": len(own),
        "library_digest": manifest.digest,
        "profile_digest": manifest.profile_digest,
        "target": dict(manifest.target),
    }


def _rates(num_tokens: int, seconds: Sequence[float]) -> dict[str, float]:
    """Tokens per second over the repetitions."""
    return {
        "median": num_tokens / median(seconds),
        "min": num_tokens / max(seconds),
        "max": num_tokens / min(seconds),
    }


def _workload_of(options: Options, settings: Settings) -> dict[str, Any]:
    own = {key: value for key, value in asdict(options).items() if key != "json_file"}
    return own | {
        "model": settings.model.source,
        "threads": settings.runner.threads or usable_cpus(),
    }


def environment() -> dict[str, Any]:
    """Where the figures come from: machine, versions, commit, time."""
    packages = ("dlight-serve", "apache-tvm", "numpy", "tokenizers")
    return {
        "machine": {
            "processor": _processor(),
            "cpus": usable_cpus(),
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    """The checkout's commit, with `+` where files were changed; None outside one."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """One line a profile: median tok/s, its spread, and speedup over the first."""
    header = (
        "profile",
        "prefill tok/s",
        "(min-max)",
        "x",
        "decode tok/s",
        "(min-max)",
        "x",
        "|dlogit|",
    )
    rows = [header]
    for result in results:
        cells = [result["profile"]]
        for phase in ("prefill", "decode"):
            rate = result[phase]
            limits = f"({_short(rate['min'])}-{_short(rate['max'])})"
            cells += [_short(rate["median"]), limits, f"{result[f'{phase}_speedup']:.2f}"]
        rows.append((*cells, f"{result['max_logit_difference']:.1e}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def _short(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.2f}"
