"""The engines' process: `python -m serve.host LEVEL FORMAT FD`; FD is its end of a socket pair.

The composition root of that side: the one file there that knows everybody.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import sys
from multiprocessing.connection import Connection

from serve import logs
from serve.engine import host


def main(level: str, form: logs.Format, descriptor: int) -> None:
    # TVM's FFI imports torch where it is installed, which costs 190 MB, and is of no use here.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    from serve.loading import Loader

    faulthandler.enable()  # a crash in native code shows where Python was
    logs.configure(level, form)
    host.serve(Connection(descriptor), Loader().prepare, free_memory=_trim)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # engines' threads may be in native code, which must not see Python's end


def _trim() -> None:
    """Have the C library give freed memory back to the system, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    main(sys.argv[1], "json" if sys.argv[2] == "json" else "text", int(sys.argv[3]))
