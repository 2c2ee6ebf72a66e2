"""The least that a client does to start N servers on a hub, as fast as the hub allows: what the tool is compared with.

    JUPYTERHUB_ENDPOINT=... JUPYTERHUB_API_TOKEN=... python tests/bench/bare_client.py --count 300 --batch-size 50

It makes users, starts each server with at most `--batch-size` starting at a time, follows those that the hub did not
wait for itself, and deletes the users, which stops their servers. It measures nobody's waiting, looks at nothing and
repairs nothing: an unexpected answer ends it, and leaves its users behind. It prints how many requests it sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Awaitable, Callable

import aiohttp


class BareClient:
    def __init__(self, session: aiohttp.ClientSession, endpoint: str, concurrency: int) -> None:
        self._session, self._endpoint, self._concurrency = session, endpoint, concurrency
        self.requests = 0

    async def _ask(self, method: str, path: str, ok: tuple[int, ...], body: object = None) -> tuple[int, bytes]:
        """Status and body of the answer, whose status has to be among `ok`."""
        self.requests += 1
        async with self._session.request(method, f"{self._endpoint}/users{path}", json=body) as response:
            text = await response.read()
            assert response.status in ok, f"{method} {path}: {response.status} {text[:200]!r}"
            return response.status, text

    async def create(self, names: list[str]) -> None:
        for at in range(0, len(names), self._concurrency):
            await self._ask("POST", "", (201,), {"usernames": names[at : at + self._concurrency]})

    async def start(self, name: str) -> None:
        """Start a server, and return when it is ready: the progress stream ends with an event that says so."""
        status, _ = await self._ask("POST", f"/{name}/server", (201, 202))
        if status == 202:
            _, stream = await self._ask("GET", f"/{name}/server/progress", (200,))
            events = [line for line in stream.splitlines() if line.startswith(b"data:")]
            assert json.loads(events[-1].removeprefix(b"data:")).get("ready"), events[-1]

    async def delete(self, name: str) -> None:
        await self._ask("DELETE", f"/{name}", (204,))

    async def each(self, act: Callable[[str], Awaitable[None]], names: list[str]) -> None:
        """Act on every name, the next as soon as one is done."""
        places = asyncio.Semaphore(self._concurrency)

        async def in_turn(name: str) -> None:
            async with places:
                await act(name)

        await asyncio.gather(*map(in_turn, names))


async def run(endpoint: str, token: str, count: int, batch_size: int) -> dict[str, object]:
    """The number of requests sent."""
    names = [f"hub-stress-test-{n}" for n in range(1, count + 1)]
    headers, connector = {"Authorization": f"token {token}"}, aiohttp.TCPConnector(limit=batch_size)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
        client = BareClient(session, endpoint, batch_size)
        await client.create(names)
        await client.each(client.start, names)
        await client.each(client.delete, names)
    return {"requests": client.requests}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=50)
    args = parser.parse_args()
    endpoint, token = os.environ["JUPYTERHUB_ENDPOINT"], os.environ["JUPYTERHUB_API_TOKEN"]
    print(json.dumps(asyncio.run(run(endpoint, token, args.count, args.batch_size))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
