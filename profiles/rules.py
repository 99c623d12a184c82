"""The table of schedule rules: id -> class, target family and parameters.

Imports TVM only to build one.

Ids beginning with `dl.` are the rules TVM ships (tvm.s_tir.dlight); the rest are ours, one a file
under cpu/ and gpu/. Others add theirs through the entry point group `dlight_serve.rules`, whose
objects are Rules.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from profiles.errors import ProfileError

ENTRY_POINTS = "dlight_serve.rules"
Family = Literal["cpu", "gpu"]
ParameterValue = int | float | bool | str


@dataclass(frozen=True)
class Parameter:
    """One knob of a rule: `legal` lists the values it may take."""

    name: str
    default: ParameterValue
    legal: tuple[ParameterValue, ...]
    meaning: str


@dataclass(frozen=True)
class Rule:
    """A schedule rule as profiles know it. `path` is "module:Class".

    The class takes the parameters. `kv_pages`: its kernels are those of our own KV pages, so that a
    library of a profile with this rule has these in place of TVM's KV cache.
    """

    id: str
    family: Family
    path: str
    meaning: str
    parameters: tuple[Parameter, ...] = ()
    kv_pages: bool = False

    def build(self, values: Mapping[str, ParameterValue]) -> Any:
        """The DLight ScheduleRule with these parameter values. Imports TVM."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)(**values)

    def source_digest(self) -> str:
        """sha256 of the rule's source; TVM's own rules are covered by TVM's version.

        Raises ProfileError if there is no such file.
        """
        module = self.path.partition(":")[0]
        if module.partition(".")[0] == "tvm":
            return "tvm"
        try:
            spec = importlib.util.find_spec(module)
            source = None if spec is None or spec.origin is None else _sources(Path(spec.origin))
        except (ImportError, OSError) as error:
            raise ProfileError(self.path, self.id, f"its source is not readable: {error}") from None
        if source is None:
            raise ProfileError(self.path, self.id, f"there is no module {module!r}")
        return hashlib.sha256(source).hexdigest()


def _sources(module: Path) -> bytes:
    """The module's text and, in a package, that of its neighbours, on which it may build."""
    is_in_package = (module.parent / "__init__.py").exists()
    files = sorted(module.parent.glob("*.py")) if is_in_package else [module]
    return b"".join(file.read_bytes() for file in files)


_DL = "tvm.s_tir.dlight"
_VECTORS = Parameter(
    "vectors",
    0,
    (0, 1, 2, 3, 4, 6),
    "registers in a row of the tile, and the width of packed weights; 0: as suits the target",
)
_ROWS = Parameter("rows", 6, (1, 2, 4, 6, 8, 12, 14), "rows of the register tile")
_TASK_ROWS = Parameter(
    "task_rows", 96, (24, 48, 96, 192, 384), "rows of a thread's task, for each panel of the matrix"
)
_LOW_BATCH = Parameter("bucket", 4, (2, 4, 8, 16), "the batch size that the kernel is padded to")
RULES: dict[str, Rule] = {
    rule.id: rule
    for rule in (
        Rule(
            "cpu.matmul",
            "cpu",
            "profiles.cpu.matmul:Matmul",
            "several rows times a matrix",
            (_ROWS, _VECTORS, _TASK_ROWS),
        ),
        Rule(
            "cpu.attention",
            "cpu",
            "profiles.cpu.attention:Attention",
            "attention over KV pages of our own",
            (
                Parameter("rows", 8, (1, 2, 4, 8), "queries in a tile, at most"),
                Parameter("group", 64, (16, 32, 64, 128), "keys in a step of the online softmax"),
            ),
            kv_pages=True,
        ),
        Rule("cpu.gemv", "cpu", "profiles.cpu.gemv:GEMV", "one row times a matrix", (_VECTORS,)),
        Rule(
            "cpu.reduction",
            "cpu",
            "profiles.cpu.reduction:Reduction",
            "layer norm, softmax: by row",
        ),
        Rule(
            "cpu.elementwise",
            "cpu",
            "profiles.cpu.elementwise:Elementwise",
            "what has no reduction: vectors along rows",
        ),
        Rule(
            "dl.cpu.GEMV",
            "cpu",
            f"{_DL}.cpu:GEMV",
            "matrix times vector: parallel rows, vector sum",
        ),
        Rule(
            "dl.cpu.Reduction",
            "cpu",
            f"{_DL}.cpu:Reduction",
            "one reduction: parallel and vectorized",
        ),
        Rule(
            "dl.gpu.Matmul", "gpu", f"{_DL}.gpu:Matmul", "tiled matrix product; tensor cores if any"
        ),
        Rule(
            "dl.gpu.GEMV",
            "gpu",
            f"{_DL}.gpu:GEMV",
            "matrix times vector: a thread group for each row",
        ),
        Rule(
            "dl.gpu.LowBatchGEMV",
            "gpu",
            f"{_DL}.gpu:LowBatchGEMV",
            "matrix times a few vectors",
            (_LOW_BATCH,),
        ),
        Rule("dl.gpu.Reduction", "gpu", f"{_DL}.gpu:Reduction", "one reduction over threads"),
        Rule(
            "dl.gpu.GeneralReduction",
            "gpu",
            f"{_DL}.gpu:GeneralReduction",
            "a chain of reductions (layer norm, softmax) in one kernel",
        ),
        Rule("dl.gpu.RMSNorm", "gpu", f"{_DL}.gpu:RMSNorm", "root mean square normalisation"),
        Rule(
            "dl.gpu.Transpose", "gpu", f"{_DL}.gpu:Transpose", "transposition through shared memory"
        ),
        Rule(
            "dl.gpu.Fallback",
            "gpu",
            f"{_DL}.gpu:Fallback",
            "any loop nest: outer loops over threads",
        ),
    )
}


def known_rules() -> dict[str, Rule]:
    """The built-in table and what is installed under the entry point group.

    Raises ProfileError for what is installed there but is no rule, or has the id of another.
    """
    rules = dict(RULES)
    for entry in entry_points(group=ENTRY_POINTS):
        rule = _load(entry)
        if rule.id in rules:
            raise ProfileError(_name(entry), rule.id, "there is a rule with this id already")
        rules[rule.id] = rule
    return rules


def _load(entry: EntryPoint) -> Rule:
    try:
        rule = entry.load()
    except Exception as error:  # whatever the module of others does when it is imported
        problem = f"does not load: {type(error).__name__}: {error}"
        raise ProfileError(_name(entry), entry.name, problem) from error
    if not isinstance(rule, Rule):
        raise ProfileError(_name(entry), entry.name, f"expected a Rule, found {rule!r}")
    return rule


def _name(entry: EntryPoint) -> str:
    return f"entry point {ENTRY_POINTS}: {entry.name} = {entry.value}"
