"""Runs a library on Relax's virtual machine: the real ModelRunner.

TVM's thread pool belongs to the calling thread, so the engine's thread alone should call this.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from serve.backends import Backend, cpu_ids, usable_cpus
from serve.compiler.library import Library
from serve.engine import Chunk, Logits, RunnerLimits
from serve.errors import LibraryError
from serve.model.config import GPT2Config
from serve.runtime.config import RunnerConfig
from serve.runtime.kv_cache import make_kv_cache
from serve.runtime.weights import DeviceWeights

_SHARE_CPUS = -3  # TVM's AffinityMode kSpecifyThreadShareAllCore


class TVMRunner:
    """One library with weights on one device; implements serve.engine's ModelRunner.

    `vocab_size`: the tokenizer's, where logits are to end if the
    model has more; None: the model's.

    Raises LibraryError if the library does not load or lacks a function, WeightsError if the
    weights are not the ones it was compiled for.
    """

    def __init__(
        self,
        library: Library,
        weights: DeviceWeights,
        backend: Backend,
        config: RunnerConfig | None = None,
        vocab_size: int | None = None,
    ) -> None:
        config = config or RunnerConfig()
        manifest = library.manifest
        self._threads = config.threads or usable_cpus()
        self._thread_id: int | None = None
        self._bind_thread()
        self._device = backend.device()
        _check_features(library, backend)
        # TVM's pool keeps what is freed by its exact size, so a step of each number of tokens for
        # good; on the CPU the C library's memory is as fast.
        self._vm = _load(library, self._device, "naive" if backend.family == "cpu" else None)
        self._params = _in_order(library, weights, self._device)
        model = GPT2Config(**manifest.model_config)
        self._vocab_size = model.vocab_size
        kv_tokens = config.kv_tokens_for(model.n_positions)
        step_tokens = config.step_tokens_for(model.n_positions)
        max_batch = min(config.max_batch, -(-kv_tokens // manifest.page_size))  # a page for each
        self._kv = make_kv_cache(manifest, self._vm, max_batch, kv_tokens, step_tokens)
        num_pages = self._kv.num_free
        self._limits = RunnerLimits(
            vocab_size=min(self._vocab_size, vocab_size or self._vocab_size),
            max_context=min(model.n_positions, num_pages * manifest.page_size),
            max_batch=max_batch,
            max_step_tokens=step_tokens,
            page_size=manifest.page_size,
            num_pages=num_pages,
            batch_invariant=manifest.kv_cache == "pages",
        )

    @property
    def limits(self) -> RunnerLimits:
        return self._limits

    def add(self, seq_id: int) -> None:
        self._kv.add(seq_id)

    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        self._kv.fork(parent_id, child_id, num_tokens)

    def release(self, seq_id: int) -> None:
        self._kv.release(seq_id)

    def rollback(self, seq_id: int, num_tokens: int) -> None:
        self._kv.rollback(seq_id, num_tokens)

    def num_free_pages(self) -> int:
        return self._kv.num_free

    def prefill(self, chunks: Sequence[Chunk]) -> Logits:
        lengths = [len(chunk.token_ids) for chunk in chunks]
        last = np.cumsum(lengths, dtype=np.int32) - 1
        kv_cache = self._begin([chunk.seq_id for chunk in chunks], lengths)
        out = self._vm["batch_prefill"](
            self._tensor(_packed(chunks)),
            self._tensor(last.astype(np.int32)),
            kv_cache,
            self._params,
        )
        return self._end(out)

    def verify(self, chunks: Sequence[Chunk]) -> Logits:
        lengths = [len(chunk.token_ids) for chunk in chunks]
        kv_cache = self._begin([chunk.seq_id for chunk in chunks], lengths)
        return self._end(
            self._vm["batch_verify"](self._tensor(_packed(chunks)), kv_cache, self._params)
        )

    def decode(self, seq_ids: Sequence[int], token_ids: Sequence[int]) -> Logits:
        function = self._vm["decode" if len(seq_ids) == 1 else "batch_decode"]
        kv_cache = self._begin(seq_ids, [1] * len(seq_ids))
        ids = np.asarray(token_ids, np.int32).reshape(-1, 1)
        return self._end(function(self._tensor(ids), kv_cache, self._params))

    def set_instrument(self, instrument: Any) -> None:
        """Have the VM call it around each of its calls, for good (see instrument.py)."""
        self._vm.set_instrument(instrument)

    def _begin(self, seq_ids: Sequence[int], lengths: Sequence[int]) -> Any:
        self._bind_thread()
        return self._kv.begin(seq_ids, lengths)

    def _end(self, logits: Any) -> Logits:
        self._kv.end()
        array: Logits = logits.numpy()  # a copy; waits for the device
        return array.reshape(-1, self._vocab_size)[:, : self._limits.vocab_size]

    def _bind_thread(self) -> None:
        """Give this thread a pool of all the CPUs: on x86, TVM would take half of them.

        Before anything else that TVM does in this thread: the pool keeps the size it is made with,
        which is the number of CPUs named here (repeated for more threads than CPUs).
        """
        current = threading.get_ident()
        if current != self._thread_id:
            os.environ.setdefault("TVM_BIND_THREADS", "0")  # or it would bind this thread to CPUs
            cpus = [str(cpu) for cpu, _ in zip(cycle(cpu_ids()), range(self._threads))]
            tvm.get_global_func("runtime.config_threadpool")(_SHARE_CPUS, self._threads, cpus)
            self._thread_id = current

    def _tensor(self, array: NDArray[np.int32]) -> Any:
        return tvm.runtime.tensor(array, self._device)


def _check_features(library: Library, backend: Backend) -> None:
    """Refuse what would end this process with an illegal instruction."""
    missing = backend.missing_features(library.manifest.target)
    if missing:
        built_for = library.manifest.target.get("mcpu", "another processor")
        raise LibraryError(
            f"{library.path}: built for {built_for}, with instructions that this processor lacks: "
            f"{', '.join(missing)}; compile it here, or with library.mcpu and library.mattr"
        )


def _load(library: Library, device: tvm.runtime.Device, memory: str | None = None) -> Any:
    """A virtual machine. `memory`: "naive" gives back what is freed; None keeps it for later."""
    manifest = library.manifest
    if manifest.tvm_version != tvm.__version__:
        raise LibraryError(
            f"{library.path}: built by TVM {manifest.tvm_version}, this is {tvm.__version__}"
        )
    try:
        return relax.VirtualMachine(tvm.runtime.load_module(str(library.path)), device, memory)
    except Exception as error:
        raise LibraryError(f"{library.path}: does not load: {error}") from error


def _in_order(library: Library, weights: DeviceWeights, device: tvm.runtime.Device) -> list[Any]:
    """The weights in the library's calling order and layout."""
    manifest = library.manifest
    packs = (manifest.panel, _load(library, device, "naive")["pack"]) if manifest.packed else None
    layout = packs or (None, None)
    return [
        weights.get(name, shape, *(layout if name in manifest.packed else (None, None)))
        for name, shape in manifest.parameters
    ]


def _packed(chunks: Sequence[Chunk]) -> NDArray[np.int32]:
    """The chunks' token ids one after the other, (1, total)."""
    ids = [np.asarray(chunk.token_ids, np.int32) for chunk in chunks]
    return np.concatenate(ids).reshape(1, -1)
