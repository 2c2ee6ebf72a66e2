"""What the tests install for themselves, once: older hubs, their servers, the proxy."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def installed(name: str, install: Callable[[Path], None]) -> Path:
    """The directory of this name in the cache; on first use `install` fills it, and none is left half full."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hub-stress-test"
    home = cache / name
    if not home.exists():
        cache.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=cache))
        try:
            install(building)
            building.rename(home)
        except BaseException as error:
            shutil.rmtree(building)
            if not (isinstance(error, OSError) and home.exists()):  # else another process was faster
                raise
    return home
