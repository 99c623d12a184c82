"""The FLOP of attention kernels: by what attention is, not by how a kernel goes about it.

For each query, head and visible key: a dot product and a weighted sum over the head's width D, 4 D,
and scale, maximum, difference, exp and sum, 5; for each query and head, D divisions. Keys that the
causal mask hides, and what an online softmax computes again, are no work.

How many keys are visible, the kernels' integer arguments say: TVM's kernels have the first page of
each sequence (indptr) and the length of its last one; ours have each token's position.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# TVM's CPU kernels are written for pages of 16 positions.
_PAGED = "where({0}[b] < {0}[b + 1], 16 * ({0}[b + 1] - {0}[b] - 1) + length_info[b], 0)"
_QUERIES = "(q_indptr[b + 1] - q_indptr[b])"
_CAUSAL = "sum(b, batch_size, sum(i, {q}, max(0, where(causal > 0, {k} - {q} + i + 1, {k}))))"

# Kernel -> the parameter whose shape is (queries, heads, D), and the visible keys of all queries.
_VISIBLE_KEYS = {
    "batch_decode_paged_kv_cpu": ("output", f"sum(b, B, {_PAGED.format('page_table_indptr')})"),
    "batch_prefill_paged_kv_cpu": (
        "output", _CAUSAL.format(q=_QUERIES, k=_PAGED.format("page_indptr")),
    ),
    "batch_prefill_ragged_kv": (
        "output", _CAUSAL.format(q=_QUERIES, k="(kv_indptr[b + 1] - kv_indptr[b])"),
    ),
    "kv_pages_attend": ("out", "sum(row, M, positions[row] + 1)"),
}  # fmt: skip


def attention_flop(kernel: str, parameters: Sequence[Sequence[Any]]) -> str | None:
    """A count as serve/compiler/counts.py reads it; None for a kernel that is none of these.

    `parameters`: the kernel's own [name, dtype, shape].
    """
    known = _VISIBLE_KEYS.get(re.sub(r"\d+$", "", kernel))
    if known is None:
        return None
    out, keys = known
    shape = next((shape for name, _, shape in parameters if name == out), None)
    if shape is None or len(shape) != 3:
        return None
    queries, heads, width = shape
    return f"{heads}*((4*{width} + 5)*{keys} + {width}*{queries})"
