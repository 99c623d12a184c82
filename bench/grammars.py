"""`python -m bench.grammars FILE`: what structured output costs, by llguidance and by xgrammar.

xgrammar is left out where it is not installed; it is no dependency of ours. The figures are for
docs/adr/0007-structured-output.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from serve.bench import environment
from serve.engine import Constraint, Row
from serve.grammar import Grammars
from serve.tokenizer import Tokenizer

REPETITIONS = 30
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "email": {"type": "string"},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "other"]}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "email", "tags", "address"],
    "additionalProperties": False,
}
ANSWER = {
    "name": "Abraham Lincoln",
    "age": 54,
    "email": "president@example.org",
    "tags": ["old", "other"],
    "address": {"street": "1600 Pennsylvania Avenue NW", "city": "Washington"},
}
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]"
CASES = {  # what is asked for -> an answer to it
    "json object": json.dumps(ANSWER),
    "json schema": json.dumps(ANSWER),
    "regex": "1963-11-19T14:00",
    "choice": "neutral",
}
CHOICES = ["positive", "negative", "neutral"]

New = Callable[[], Constraint]


class LLGuidance:
    """The way the server uses it, without the grammars it keeps compiled."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._grammars = Grammars(tokenizer, max_kept=0)

    def compile(self, case: str) -> New:
        grammars = self._grammars
        texts: dict[str, Callable[[], str]] = {
            "json object": grammars.json_object,
            "json schema": lambda: grammars.json_schema(PERSON),
            "regex": lambda: grammars.regex(DATE),
            "choice": lambda: grammars.choice(CHOICES),
        }
        text = texts[case]()
        return lambda: grammars.constrain(text)


class XGrammar:
    """xgrammar behind the same interface."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        import xgrammar

        self._eos = tokenizer.eos_token_id
        vocabulary: list[Any] = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        info: Any = xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[self._eos])
        self._compiler: Any = xgrammar.GrammarCompiler(info, cache_enabled=False)

    def compile(self, case: str) -> New:
        compiler = self._compiler
        compiled = {
            "json object": compiler.compile_builtin_json_grammar,
            "json schema": lambda: compiler.compile_json_schema(PERSON),
            "regex": lambda: compiler.compile_regex(DATE),
            "choice": lambda: compiler.compile_regex("|".join(CHOICES)),
        }[case]()
        return lambda: _XGrammarConstraint(compiled, self._eos)


class _XGrammarConstraint:
    def __init__(self, compiled: Any, eos_token_id: int) -> None:
        import torch
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)
        size = compiled.tokenizer_info.vocab_size
        self._bits = np.zeros((1, -(-size // 32)), np.int32)
        self._tensor = torch.from_numpy(self._bits)
        self._eos, self.is_over = eos_token_id, False

    def mask(self, row: Row) -> None:
        self._matcher.fill_next_token_bitmask(self._tensor)
        bits = self._bits[0].view(np.uint8)
        is_forbidden = np.unpackbits(~bits, count=len(row), bitorder="little").view(np.bool_)
        np.copyto(row, -np.inf, where=is_forbidden)

    def accept(self, token_id: int) -> None:
        if not self._matcher.accept_token(token_id):
            raise RuntimeError(f"token {token_id} is not allowed")
        self.is_over = token_id == self._eos

    def allowed(self, token_ids: Any) -> int:
        raise NotImplementedError("not measured")


def measure(library: Any, case: str, tokenizer: Tokenizer) -> dict[str, float]:
    """Seconds to compile, and per token to mask and to accept: one compilation and one answer."""
    start = time.perf_counter()
    new = library.compile(case)
    compiled = time.perf_counter() - start
    constraint = new()
    masks, accepts = [], []
    row = np.zeros(tokenizer.vocab_size, np.float32)
    for token_id in [*tokenizer.encode(CASES[case]), tokenizer.eos_token_id]:
        row[:] = 0
        began = time.perf_counter()
        constraint.mask(row)
        masked = time.perf_counter()
        if row[token_id] != 0:
            raise RuntimeError(f"{case}: token {token_id} is not allowed")
        constraint.accept(token_id)
        accepts.append(time.perf_counter() - masked)
        masks.append(masked - began)
    return {
        "compile_seconds": compiled,
        "mask_seconds": sum(masks) / len(masks),
        "longest_mask_seconds": max(masks),
        "accept_seconds": sum(accepts) / len(accepts),
    }


def report() -> dict[str, Any]:
    """Medians over repetitions in which the libraries take turns."""
    tokenizer = Tokenizer.bundled()
    libraries: dict[str, Any] = {"llguidance": LLGuidance(tokenizer)}
    if util.find_spec("xgrammar"):
        libraries["xgrammar"] = XGrammar(tokenizer)
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(REPETITIONS):
        for case in CASES:
            for name, library in libraries.items():
                runs.setdefault((name, case), []).append(measure(library, case, tokenizer))
    results = [
        {"library": name, "case": case}
        | {key: median(run[key] for run in found) for key in found[0]}
        for (name, case), found in runs.items()
    ]
    versions = {name: metadata.version(name) for name in libraries}
    return {"results": results, "libraries": versions, "repetitions": REPETITIONS} | environment()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    found = report()
    args.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for line in found["results"]:
        times = (
            f"{key.removesuffix('_seconds')} {value * 1e6:.0f} µs"
            for key, value in line.items()
            if key.endswith("seconds")
        )
        print(f"{line['library']:12}{line['case']:14}", ", ".join(times))


if __name__ == "__main__":
    main()
