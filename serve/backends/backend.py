"""A backend: our named choice of a TVM target, a device and a default dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import tvm

from serve.errors import BackendError


@dataclass(frozen=True)
class Backend:
    """`target()` is TVM's target as a JSON object; `device()` raises BackendError if there is none.

    `family` picks the profile section where the profile has none for the backend itself.
    `missing_features(target)`: what libraries of that target may use and this machine has not.
    """

    name: str
    family: Literal["cpu", "gpu"]
    target: Callable[[], Mapping[str, Any]]
    device: Callable[[], tvm.runtime.Device]
    dtype: str = "float32"
    missing_features: Callable[[Mapping[str, Any]], list[str]] = lambda _target: []


def existing_device(backend: str, device: tvm.runtime.Device) -> tvm.runtime.Device:
    """The device, if this machine has it. Raises BackendError."""
    if not device.exist:
        raise BackendError(f"backend {backend!r}: this machine has no such device ({device})")
    return device
