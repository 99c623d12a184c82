"""Weights from a Hugging Face folder: safetensors, in one file or sharded, in f32, f16 or bf16.

Read one tensor at a time, as they are asked for, so that there never are two copies of a model.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from serve.errors import ModelError, WeightsError
from serve.model.config import GPT2Config
from serve.model.parameters import is_conv1d, parameter_shapes

log = logging.getLogger(__name__)

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# What reading JSON of another shape than it should have raises.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
DTYPES = ("F32", "F16", "BF16")
# Causal masks that old checkpoints carry along, and the head that a tied model repeats.
IGNORED = re.compile(r"(^|\.)attn\.(bias|masked_bias)$|^lm_head\.weight$")


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: its name there, dtype and shape."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]


class Checkpoint(Mapping[str, NDArray[np.float32]]):
    """The parameters of serve.model.parameters, found in a folder.

    Everything is checked when it is opened: raises WeightsError naming the tensor, the expected and
    the found shape (or bytes, in a truncated file), ModelError if there are no weights.
    """

    def __init__(self, folder: Path, config: GPT2Config) -> None:
        stored = _stored_tensors(folder)
        self._tensors = {
            name: _find(stored, name, shape[::-1] if is_conv1d(name) else shape, folder)
            for name, shape in parameter_shapes(config).items()
        }
        used = {tensor.key for tensor in self._tensors.values()}
        unused = sorted(key for key in stored if key not in used and not IGNORED.search(key))
        if unused:
            log.warning("%s: tensors that GPT-2 has no use for: %s", folder, ", ".join(unused))

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        tensor = self._tensors[name]
        with safe_open(tensor.path, "numpy") as file:
            array: NDArray[np.float32] = file.get_tensor(tensor.key).astype(np.float32, copy=False)
        return np.ascontiguousarray(array.T) if is_conv1d(name) else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _find(stored: dict[str, _Stored], name: str, shape: tuple[int, ...], folder: Path) -> _Stored:
    """The tensor, checked; base models leave out the `transformer.` in front of its name."""
    tensor = stored.get(name) or stored.get(name.removeprefix("transformer."))
    if tensor is None:
        raise WeightsError(name, f"shape {list(shape)}", "no such tensor", str(folder))
    if tensor.shape != shape:
        found = f"shape {list(tensor.shape)}"
        raise WeightsError(name, f"shape {list(shape)}", found, str(tensor.path))
    if tensor.dtype not in DTYPES:
        raise WeightsError(name, " or ".join(DTYPES), tensor.dtype, str(tensor.path))
    return tensor


def _stored_tensors(folder: Path) -> dict[str, _Stored]:
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists():
        return _read_header(single)
    if not index.exists():
        raise ModelError(f"{folder}: no weights: expected {SINGLE_FILE} or {INDEX_FILE}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(name): folder / str(file) for name, file in weight_map.items()}
    except (*MALFORMED, OSError) as error:
        raise ModelError(f"{index}: not a safetensors index: {error!r}") from None
    for name, path in shards.items():
        if not path.exists():
            raise WeightsError(name, f"the shard {path.name}", "no such file", str(folder))
    headers = {path: _read_header(path) for path in set(shards.values())}
    return {name: headers[path][name] for name, path in shards.items() if name in headers[path]}


def _read_header(path: Path) -> dict[str, _Stored]:
    """The tensors of a whole file. Raises WeightsError for a truncated one."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if 8 + length > size:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            missing = 8 + length + end - size
            if missing > 0:
                expected = f"shape {entry['shape']} in {end - begin} bytes"
                found = f"{max(0, end - begin - missing)} bytes"
                raise WeightsError(name, expected, found, f"{path}: truncated")
        with safe_open(path, "numpy"):  # the library's own check of the rest
            return {
                name: _Stored(path, name, entry["dtype"], tuple(entry["shape"]))
                for name, entry in header.items()
            }
    except (*MALFORMED, OSError, SafetensorError) as error:
        raise ModelError(f"{path}: not a safetensors file: {error}") from None
