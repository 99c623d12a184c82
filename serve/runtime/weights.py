"""A model's weights on a device, in every layout that its libraries take them in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import tvm
from numpy.typing import NDArray

from serve.errors import WeightsError
from serve.runtime.huge_pages import HugePages

Pack = Callable[[Any], Any]  # a library's function: (out, in) -> [panels, in, panel]
_Key = tuple[str, tuple[int, ...], int | None]  # name, shape, panel


class DeviceWeights:
    """Read from `source` one tensor at a time, as runners ask for them, and shared among them.

    A matrix that is packed is kept packed alone: a library never has two copies of a model. On the
    CPU, a tensor's memory is free when no runner has it any more.
    """

    def __init__(
        self, source: Mapping[str, NDArray[np.float32]], device: tvm.runtime.Device
    ) -> None:
        self._source, self._device = source, device
        self._tensors: dict[_Key, Any] = {}
        self._arrays: WeakValueDictionary[_Key, NDArray[np.float32]] = WeakValueDictionary()
        # Packed or not: what lies together is not freed before its last.
        self._pages = {False: HugePages(), True: HugePages()}
        self._lock = threading.Lock()  # libraries may be loaded side by side

    def get(
        self, name: str, shape: Sequence[int], panel: int | None = None, pack: Pack | None = None
    ) -> Any:
        """The tensor as it is, or as `pack` packs it in panels of `panel` rows.

        Raises WeightsError if the weights have none of that name and shape.
        """
        key = name, tuple(shape), panel
        with self._lock:
            if self._device != tvm.cpu():
                if key not in self._tensors:
                    self._tensors[key] = self._read(key, pack)
                return self._tensors[key]
            array = self._arrays.get(key)
            if array is None:
                tensor = self._read(key, pack)
                array = self._pages[panel is not None].array(tensor.shape)
                array[...] = np.from_dlpack(tensor)
                self._arrays[key] = array
            return tvm.runtime.from_dlpack(array)

    def _read(self, key: _Key, pack: Pack | None) -> Any:
        name, shape, _ = key
        array = self._source.get(name)
        found = "nothing" if array is None else f"shape {list(array.shape)}"
        if array is None or array.shape != shape:
            raise WeightsError(name, f"shape {list(shape)}", found, "the loaded weights")
        tensor = tvm.runtime.tensor(array, self._device)
        del array  # never more than two copies of one tensor
        return tensor if pack is None else pack(tensor)
