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
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

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

    The class takes the parameters.
    """

    id: str
    family: Family
    path: str
    meaning: str
    parameters: tuple[Parameter, ...] = ()

    def build(self, values: Mapping[str, ParameterValue]) -> Any:
        """The DLight ScheduleRule with these parameter values. Imports TVM."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)(**values)

    def source_digest(self) -> str:
        """sha256 of the rule's source file; TVM's own rules are covered by TVM's version."""
        module = self.path.partition(":")[0]
        if module.partition(".")[0] == "tvm":
            return "tvm"
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"rule {self.id!r}: module {module!r} is not importable")
        return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


_DL = "tvm.s_tir.dlight"
_GEMV = (
    Parameter("lanes", 64, (16, 32, 64, 128), "partial sums of a row, in vector registers"),
    Parameter("rows", 16, (4, 8, 16, 32, 64), "rows a thread takes at a time"),
)
_LOW_BATCH = Parameter("bucket", 4, (2, 4, 8, 16), "the batch size that the kernel is padded to")
RULES: dict[str, Rule] = {
    rule.id: rule
    for rule in (
        Rule(
            "cpu.gemv",
            "cpu",
            "profiles.cpu.gemv:GEMV",
            "matrix times vector over contiguous rows, at memory speed",
            _GEMV,
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
    """The built-in table and what is installed under the entry point group."""
    plugins = (entry.load() for entry in entry_points(group="dlight_serve.rules"))
    return RULES | {rule.id: rule for rule in plugins}
