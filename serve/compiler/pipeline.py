"""The compiler, phase by phase. Runs in a child process (`python -m serve.compiler.pipeline`).

Some targets crash TVM's compiler; a crash here is a CompileError in the parent, never the server's
end. Reads a request as JSON from standard input, writes progress as JSON lines to standard output.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from profiles import read_profile
from serve.backends import get_backend
from serve.compiler.coverage import KernelCoverage, panel_of, schedule
from serve.compiler.library import LIBRARY_FILE, Manifest, file_digest, write_manifest
from serve.compiler.shapes import settle_shapes
from serve.errors import CompileError
from serve.model.config import GPT2Config
from serve.model.gpt2 import export
from serve.model.kv_pages import PAGE_SIZE

PIPELINE_VERSION = 3  # raise it when the passes below change: it is part of the library's key
QUANTIZATION = {"float32": "q0f32", "float16": "q0f16"}  # MLC's names
PHASES = ("export", "fuse", "schedule", "lower", "generate code", "link")

Report = Callable[[str], None]


def fuse(mod: tvm.IRModule) -> tvm.IRModule:
    """From operators to fused TIR kernels, before any schedule."""
    transform = relax.transform
    return tvm.transform.Sequential(
        [
            relax.backend.DispatchSampling(),
            relax.backend.DispatchSortScan(),
            transform.FuseTransposeMatmul(),  # or each call would transpose its weight anew
            transform.LegalizeOps(),
            transform.RewriteDataflowReshape(),  # views, before FuseOps could make them copies
            transform.AnnotateTIROpPattern(),
            transform.FoldConstant(),
            transform.FuseOps(),
            transform.FuseTIR(),
            transform.DeadCodeElimination(),
        ]
    )(mod)


def lower(mod: tvm.IRModule) -> tvm.IRModule:
    """From scheduled Relax to what the virtual machine runs.

    Without TVM's KillAfterLastUse: the memory is planned, so that killing a tensor frees nothing,
    and it was a third of a decode step's instructions.
    """
    transform = relax.transform
    return tvm.transform.Sequential(
        [
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            transform.LowerAllocTensor(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            settle_shapes,
            transform.AttachGlobalSymbol(),
        ]
    )(mod)


def build(request: dict[str, Any], folder: Path, report: Report) -> None:
    """Compile into `folder`: library.so and manifest.json.

    `report` is called as each phase begins.
    """
    start = time.perf_counter()
    backend = get_backend(request["backend"])
    target = tvm.target.Target(request["target"])
    profile = read_profile(Path(request["profile_source"]))
    rules = profile.rules_for(backend.name, backend.family)
    if profile.digest(backend.name, backend.family) != request["profile_digest"]:
        raise CompileError(f"{profile.source} was changed in the meantime")
    with target:
        report("export")
        panel = panel_of(rules, target)
        mod, parameters, packed = export(
            GPT2Config(**request["model_config"]), panel, request["kv_cache"]
        )
        report("fuse")
        mod = fuse(mod)
        report("schedule")
        mod, coverage = schedule(mod, rules, target)
        report("lower")
        mod = lower(mod)
        report("generate code")
        executable = tvm.compile(mod, target=target, relax_pipeline=_no_passes)
    report("link")
    executable.export_library(str(folder / LIBRARY_FILE))
    seconds = time.perf_counter() - start
    write_manifest(folder, _manifest(request, folder, coverage, parameters, packed, panel, seconds))


@tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
def _no_passes(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    return mod  # all of them have run: fuse, schedule, lower


def _manifest(
    request: dict[str, Any],
    folder: Path,
    coverage: list[KernelCoverage],
    parameters: list[tuple[str, tuple[int, ...]]],
    packed: list[str],
    panel: int | None,
    seconds: float,
) -> Manifest:
    return Manifest(
        key=request["key"],
        digest=file_digest(folder / LIBRARY_FILE),
        model_config=request["model_config"],
        backend=request["backend"],
        target=request["target"],
        dtype=request["dtype"],
        quantization=QUANTIZATION[request["dtype"]],
        profile=request["profile"],
        profile_digest=request["profile_digest"],
        rules=tuple(request["rules"]),
        coverage=tuple(entry.as_dict() for entry in coverage),
        parameters=tuple(parameters),
        packed=tuple(packed),
        panel=panel,
        kv_cache=request["kv_cache"],
        page_size=PAGE_SIZE,
        tvm_version=tvm.__version__,
        pipeline_version=PIPELINE_VERSION,
        compile_seconds=round(seconds, 3),
    )


def main() -> None:
    request = json.load(sys.stdin)

    def report(phase: str) -> None:
        print(json.dumps({"phase": phase}), flush=True)

    build(request, Path(request["folder"]), report)


if __name__ == "__main__":
    main()
