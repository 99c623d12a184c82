"""A model's weights on a device, in every layout that its libraries take them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from serve.errors import WeightsError
from serve.runtime.huge_pages import HugePages

Pack = Callable[[Any], Any]  # a library's function: (out, in) -> [panels, in, panel]


class DeviceWeights:
    """Read from `source` one tensor at a time, as runners ask for them, and shared among them.

    A matrix that is packed is kept packed alone: a library never has two copies of a model.
    """

    def __init__(
        self, source: Mapping[str, NDArray[np.float32]], device: tvm.runtime.Device
    ) -> None:
        self._source, self._device = source, device
        self._tensors: dict[tuple[str, tuple[int, ...], int | None], Any] = {}
        self._pages = HugePages()

    def get(
        self, name: str, shape: Sequence[int], panel: int | None = None, pack: Pack | None = None
    ) -> Any:
        """The tensor as it is, or as `pack` packs it in panels of `panel` rows.

        Raises WeightsError if the weights have none of that name and shape.
        """
        key = name, tuple(shape), panel
        if key not in self._tensors:
            array = self._source.get(name)
            found = "nothing" if array is None else f"shape {list(array.shape)}"
            if array is None or array.shape != tuple(shape):
                raise WeightsError(name, f"shape {list(shape)}", found, "the loaded weights")
            tensor = tvm.runtime.tensor(array, self._device)
            del array  # never more than two copies of one tensor
            self._tensors[key] = self._kept(tensor if pack is None else pack(tensor))
        return self._tensors[key]

    def _kept(self, tensor: Any) -> Any:
        if self._device != tvm.cpu():
            return tensor
        array = self._pages.array(tensor.shape)
        array[...] = np.from_dlpack(tensor)
        return tvm.runtime.from_dlpack(array)
