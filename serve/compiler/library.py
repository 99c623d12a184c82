"""A library on disk.

`library.so` and `manifest.json`, which says what it is and proves that it is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve.errors import LibraryError

LIBRARY_FILE, MANIFEST_FILE = "library.so", "manifest.json"
MANIFEST_DIGEST = "manifest_digest"  # the key in the file: sha256 of all the others


@dataclass(frozen=True)
class Manifest:
    """What a library was compiled from and how.

    `parameters` are the weights in calling order, (name, shape as loaded); `packed` are those that
    the library takes as its own function `pack` packs them, in panels of `panel` rows; `coverage`
    as in compiler/coverage.py; `kv_cache` is "tvm" or "pages" (of our own); `digest` is the sha256
    of library.so.
    """

    key: str
    digest: str
    model_config: Mapping[str, Any]
    backend: str
    target: Mapping[str, Any]
    dtype: str
    quantization: str
    profile: str
    profile_digest: str
    rules: tuple[Mapping[str, Any], ...]
    coverage: tuple[Mapping[str, Any], ...]
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    packed: tuple[str, ...]
    panel: int | None
    kv_cache: str
    page_size: int
    tvm_version: str
    pipeline_version: int
    compile_seconds: float


@dataclass(frozen=True)
class Library:
    """A verified library: `path` is its shared object."""

    path: Path
    manifest: Manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    raw = asdict(manifest)
    raw[MANIFEST_DIGEST] = _digest(raw)
    text = json.dumps(raw, indent=1, sort_keys=True)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def _digest(raw: Mapping[str, Any]) -> str:
    canonical = json.dumps(raw, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_library(folder: Path) -> Library:
    """Read and verify a library.

    Raises LibraryError if anything is missing or not as the manifest says.
    """
    try:
        raw = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if raw.pop(MANIFEST_DIGEST) != _digest(raw):
            raise ValueError(f"{MANIFEST_FILE} is damaged")
        raw["parameters"] = tuple((name, tuple(shape)) for name, shape in raw["parameters"])
        raw["packed"] = tuple(raw["packed"])
        raw["rules"], raw["coverage"] = tuple(raw["rules"]), tuple(raw["coverage"])
        manifest = Manifest(**raw)
        digest = file_digest(folder / LIBRARY_FILE)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise LibraryError(f"{folder}: not a compiled library: {problem}") from None
    if digest != manifest.digest:
        raise LibraryError(
            f"{folder / LIBRARY_FILE}: damaged: its sha256 is {digest}, "
            f"the manifest says {manifest.digest}"
        )
    return Library(folder / LIBRARY_FILE, manifest)
