"""What the tests install for themselves, once: older hubs, their servers, the proxy."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def installed(name: str, install: Callable[[Path], None]) -> Path:
    """The directory of this name in the cache; on first use `install` fills it, while other processes wait."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hub-stress-test"
    home = cache / name
    if home.exists():
        return home
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():
            building = Path(tempfile.mkdtemp(dir=cache))
            try:
                install(building)
                building.rename(home)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    return home
