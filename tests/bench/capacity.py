"""Is the capacity right? The tool's answer beside what wrk gets from the same hub with the same request.

python tests/bench/capacity.py        (needs wrk: apt-get install wrk)
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from localhub import LocalHub  # noqa: E402

TOOL = HERE.parent.parent / "hub_stress_test.py"
USERS = 100
SCRIPT = """
local n = 0
request = function()
  n = n %% {users} + 1
  local body = '{{"servers": {{"": {{"last_activity": "%s"}}}}, "last_activity": "%s"}}'
  local now = os.date("!%Y-%m-%dT%H:%M:%SZ")
  body = string.format(body, now, now)
  return wrk.format("POST", "{path}/users/bystander-" .. string.format("%04d", n) .. "/activity", wrk.headers, body)
end
"""


def wrk(hub: LocalHub) -> float:
    """Activity reports per second that wrk gets at 10 connections, and the hub's errors would show."""
    path = "/" + hub.endpoint.split("/", 3)[3]
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(
            SCRIPT.replace("%%", "%")
            .replace("{users}", str(USERS))
            .replace("{path}", path)
            .replace("{{", "{")
            .replace("}}", "}")
        )
        script.flush()
        headers = ["-H", f"Authorization: token {hub.token}", "-H", "Content-Type: application/json"]
        command = ["wrk", "-t1", "-c10", "-d15s", *headers, "-s", script.name, hub.endpoint]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert "Non-2xx" not in said, said
    found = re.search(r"Requests/sec: +([\d.]+)", said)
    assert found, said
    return float(found[1])


def capacity(hub: LocalHub) -> float:
    """Requests per second that the tool says the hub sustains."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        words = ["activity-stress-test", "-c", str(USERS), "--find-capacity", "--rate", "50", "--results", str(file)]
        command, env = [sys.executable, str(TOOL), *words], os.environ | hub.environment
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=600)
        return float(json.loads(file.read_text())["capacity"]["rate_per_s"])


def main() -> None:
    if not shutil.which("wrk"):
        raise SystemExit("There is no wrk to compare with: apt-get install wrk. Nothing was measured.")
    with LocalHub(bystanders=USERS) as hub:
        before = wrk(hub)
        found = capacity(hub)
        after = wrk(hub)
    print(f"wrk, 10 connections: {before:.0f} before, {after:.0f} after; the tool: {found:.0f} per second,")
    print(f"{found / ((before + after) / 2):.2f} times wrk's mean")


if __name__ == "__main__":
    main()
