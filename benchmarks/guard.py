#!/usr/bin/env python
"""A load test of the guarded server on the loopback: throughput and latency with and without the guard, and memory.

python benchmarks/guard.py                                    1,000 requests each way, four clients
python benchmarks/guard.py --requests 20 --steps 4 --model tests/golden/tiny-eps

Needs fastapi, uvicorn and httpx (extra "server"). The server runs in this process, so its memory is this process's.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from memorization.errors import InputError  # noqa: E402
from memorization.flags import ArgumentParser, add_flags, run_script, value  # noqa: E402
from memorization.io.tables import markdown  # noqa: E402
from memorization.settings import Count, NotNegative, value_of  # noqa: E402


def resident() -> float:
    """MiB of memory of this process; NaN where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), float("nan"))


@contextmanager
def running(app):
    """The app on a free port of the loopback; gives its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise InputError("the server did not start")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def load(address: str, requests: int, clients: int) -> dict[str, float]:
    """Send so many requests: what they took, and the memory after a tenth of them (caches are full) and at the end."""
    import httpx

    warm, memory = max(1, requests // 10), {}
    with httpx.Client(base_url=address, timeout=600) as client:

        def send(number: int) -> tuple[float, int]:
            started = time.perf_counter()
            answer = client.post("/draw", json={"prompt": f"a picture of number {number}", "seed": number})
            if number == warm:
                gc.collect()
                memory["warm"] = resident()
            return time.perf_counter() - started, answer.status_code

        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(send, range(requests + 1)))
        seconds = time.perf_counter() - started
    gc.collect()
    if wrong := {status for _, status in answers} - {200, 451}:
        raise InputError(f"the server answered with status {', '.join(map(str, wrong))}")
    latency = np.array([one for one, _ in answers])
    return {
        "requests a second": len(answers) / seconds, "p50, s": np.quantile(latency, 0.5),
        "p99, s": np.quantile(latency, 0.99), "refused": sum(status == 451 for _, status in answers),
        "MiB after a tenth": memory["warm"], "MiB at the end": resident(),
    }  # fmt: skip


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add_flags(parser, "--model", default="testbed-eps")
    add_flags(parser, "--steps", "--device", "--dtype")
    count = value(Count)
    parser.add_argument("--requests", type=count, default=1000, metavar="N", help="each way (default: %(default)s)")
    parser.add_argument("--clients", type=count, default=4, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument("--threshold", default="1e9", metavar="X|FILE", help="(default: %(default)s, which flags none)")
    args = parser.parse_args()
    import memorization as mem

    try:
        from guard_server import server
    except ImportError as error:
        raise InputError(f"{error.name}: not installed; pip install fastapi uvicorn httpx") from None
    model = mem.load(args.model, device=args.device, dtype=args.dtype)
    pipe, options = model.pipe, {"num_inference_steps": args.steps, "guidance_scale": model.spec.scale}
    known = args.threshold if Path(args.threshold).is_file() else value_of(NotNegative, args.threshold, "--threshold")
    rows = []
    for name in ("plain", "guarded"):
        protected = mem.protect(pipe, known, action=("reseed", "refuse")) if name == "guarded" else nullcontext()
        with protected as guard, running(server(pipe, guard, **options)) as address:
            rows.append({"pipeline": name, **load(address, args.requests, args.clients)})
    print(markdown(pd.DataFrame(rows).round(3)))


if __name__ == "__main__":
    run_script(main)
