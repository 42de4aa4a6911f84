"""Many clients at once, for a while: python load_test.py http://127.0.0.1:8000 --pid PID

Each of them asks for images again and again, now and then for too many. Prints how many were answered and how, how long it
took, and the server's memory on the way. Fails where anything but images, 413, 429 or 503 came back.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter
from pathlib import Path

import httpx


async def client(http: httpx.AsyncClient, number: int, until: float, seen: Counter, seconds: list[float]) -> None:
    request = 0
    while time.monotonic() < until:
        request += 1
        count = 1000 if request % 10 == 0 else 1 + (number + request) % 4
        start = time.monotonic()
        answer = await http.post("/images", json={"seeds": list(range(count)), "class": number % 10})
        seen[answer.status_code] += 1
        if answer.status_code == 200:
            seconds.append(time.monotonic() - start)
            assert answer.content.startswith(b"\x89PNG")
        await asyncio.sleep(0.2 if answer.status_code in (429, 503) else 0)


def memory(pid: int) -> float:
    """MiB that a process has in memory."""
    fields = Path(f"/proc/{pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) / 1024


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, required=True, help="the server's process")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    seen: Counter = Counter()
    seconds: list[float] = []
    limits = httpx.Limits(max_connections=arguments.clients)
    async with httpx.AsyncClient(base_url=arguments.url, timeout=60, limits=limits) as http:
        for part in ("warm-up", "first half", "second half"):
            until = time.monotonic() + arguments.seconds / (10 if part == "warm-up" else 2)
            await asyncio.gather(*(client(http, k, until, seen, seconds) for k in range(arguments.clients)))
            print(f"after the {part}: {dict(seen)}, memory {memory(arguments.pid):.0f} MiB", flush=True)
    seconds.sort()
    print(f"{len(seconds)} answers; median {seconds[len(seconds) // 2]:.2f} s, longest {seconds[-1]:.2f} s")
    assert set(seen) <= {200, 413, 429, 503}, seen


if __name__ == "__main__":
    asyncio.run(main())
