"""What a target's vector unit is like. Imports TVM.

TVM's own `llvm_get_vector_width` says 512 bits of any x86-64: the features decide here.
"""

from __future__ import annotations

from tvm.target import Target, codegen


def lanes(target: Target) -> int:
    """f32 lanes of a vector register: 16, 8 or 4."""
    if _has(target, "avx512f"):
        return 16
    return 8 if _has(target, "avx") else 4


def registers(target: Target) -> int:
    """Vector registers: 32 with AVX-512 and on AArch64, else 16."""
    return (
        32 if _has(target, "avx512f") or "aarch64" in str(target.attrs.get("mtriple", "")) else 16
    )


def _has(target: Target, feature: str) -> bool:
    return bool(codegen.target_has_features([feature], target))


def panel(target: Target, vectors: int = 0) -> int:
    """Columns of a register tile: `vectors` registers, or a few that leave room for the rows."""
    return lanes(target) * (vectors or (4 if registers(target) == 32 else 2))
