"""What is made once and kept: weights and their conversions. Standard library only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """Let `make` write a file or a folder beside the target, then rename it to that.

    What is there already is kept: a target is whole, however an earlier run ended.
    """
    if not target.exists():
        building = target.with_name(f".building-{target.name}")
        if building.is_dir():
            shutil.rmtree(building)
        building.unlink(missing_ok=True)
        building.parent.mkdir(parents=True, exist_ok=True)
        make(building)
        building.rename(target)
    return target
