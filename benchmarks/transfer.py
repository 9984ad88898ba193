"""Pulls through a proxy that kills connections at random: does every one end with the same bytes, and at what cost?

    python benchmarks/transfer.py [--pulls 200] [--mean 400000] [--seed 0] [--out FILE]

A package of about 10 MB stands on a web server (uvicorn with Starlette; nginx too where it is installed), as one file
and as a directory. Between it and `penjing.package.transfer.pull` stands a proxy that kills every connection after a
number of bytes drawn from an exponential distribution of mean MEAN, one in ten at once. Pulls take turns between
servers and layouts. Prints one JSON object: how many ended identical to the original, how many connections were
killed, and the bytes that the proxy passed on, as a multiple of the package.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import socket
import socketserver
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from penjing import package
from penjing.errors import PenjingError
from penjing.package import manifest
from penjing.package.transfer import Patience, pull


def network(megabytes: int) -> bytes:
    """An encoded package of random int8 weights and their scales."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for i in range(megabytes):
        arrays[f"{i}.weight"] = np.clip(np.rint(rng.normal(0, 25, (1024, 1024))), -127, 127).astype(np.int8)
        arrays[f"{i}.scale"] = rng.random(1024).astype(np.float32)
    return package.encode("a topology", arrays, metadata={"name": "transfer"})


class Proxy(socketserver.ThreadingTCPServer):
    """Passes TCP connections on to a port of this machine, and kills each after a random number of bytes."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, to: int, *, mean: float, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.port = self.server_address[1]
        self.killed = self.passed = 0
        self._to, self._mean, self._random = to, mean, random.Random(seed)

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def pass_on(self, client: socket.socket) -> None:
        """One connection, to its end."""
        left = 0.0 if self._random.random() < 0.1 else self._random.expovariate(1 / self._mean)
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._to)) as server:
            threading.Thread(target=_copy, args=(client, server), daemon=True).start()
            while data := server.recv(16 << 10):
                piece = data[: max(0, int(left))]
                left -= len(data)
                client.sendall(piece)
                self.passed += len(piece)
                if left <= 0:
                    self.killed += 1
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
                    return


class _Connection(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Proxy)
        self.server.pass_on(self.request)


def _copy(client: socket.socket, server: socket.socket) -> None:
    """The requests; when the client ends, the server is told so."""
    with contextlib.suppress(OSError):
        while data := client.recv(16 << 10):
            server.sendall(data)
        server.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def starlette(folder: Path) -> Iterator[int]:
    """A Starlette static file server on a free port, which it gives."""
    from starlette.applications import Starlette
    from starlette.routing import Mount
    from starlette.staticfiles import StaticFiles

    with serving(Starlette(routes=[Mount("/", StaticFiles(directory=folder))])) as port:
        yield port


@contextlib.contextmanager
def serving(app: Any) -> Iterator[int]:
    """Any ASGI application on a free port, which it gives."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


@contextlib.contextmanager
def nginx(folder: Path, *, more: str = "") -> Iterator[int]:
    """nginx on a free port, which it gives; `more`: directives of its server block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as own:
        user = "user root;" if os.geteuid() == 0 else ""
        temporary = " ".join(
            f"{kind}_temp_path {own}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (Path(own) / "nginx.conf").write_text(
            f"daemon off; master_process off; pid {own}/pid; error_log {own}/error.log; {user}\n"
            f"events {{}} http {{ access_log off; {temporary}\n"
            f"server {{ listen 127.0.0.1:{port}; root {folder}; {more} }} }}"
        )
        command = ["nginx", "-c", f"{own}/nginx.conf", "-e", f"{own}/error.log"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            for _ in range(500):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.01)
            yield port
        finally:
            process.terminate()
            process.wait(10)


def measure(data: bytes, *, pulls: int, mean: float, seed: int) -> dict[str, Any]:
    """Pulls `pulls` times; the figures of all together."""
    servers = {"starlette": starlette, **({"nginx": nginx} if shutil.which("nginx") else {})}
    rows = []
    with tempfile.TemporaryDirectory() as own, contextlib.ExitStack() as stack:
        folder = Path(own) / "web"
        folder.mkdir()
        package.save(data, folder / "net.penjing")
        package.save(data, folder / "net", layout="directory")
        proxies = {
            name: stack.enter_context(Proxy(stack.enter_context(serve(folder)), mean=mean, seed=seed + i))
            for i, (name, serve) in enumerate(servers.items())
        }
        ways = [(name, place) for name in proxies for place in ("net.penjing", "net/")]
        for i in range(pulls):
            name, place = ways[i % len(ways)]
            proxy = proxies[name]
            before, killed = proxy.passed, proxy.killed
            out = Path(own) / f"{i}.penjing"
            began = time.monotonic()
            try:
                pull(
                    f"http://127.0.0.1:{proxy.port}/{place}",
                    out,
                    patience=Patience(tries=12, pause=0.01, timeout=10),
                )
                same = out.read_bytes() == data
                out.unlink()
            except PenjingError as error:
                print(error, file=sys.stderr)
                same = False
            rows.append(
                {
                    "server": name,
                    "layout": "directory" if place.endswith("/") else "file",
                    "identical": same,
                    "seconds": time.monotonic() - began,
                    "passed": (proxy.passed - before) / len(data),
                    "killed": proxy.killed - killed,
                }
            )
    return {
        "package_bytes": len(data),
        "parts": len(manifest.parse(data).parts),
        "pulls": len(rows),
        "identical": sum(r["identical"] for r in rows),
        "connections_killed": sum(r["killed"] for r in rows),
        "killed_a_pull": round(statistics.mean(r["killed"] for r in rows), 2),
        "bytes_passed_over_package": {
            "mean": round(statistics.mean(r["passed"] for r in rows), 4),
            "most": round(max(r["passed"] for r in rows), 4),
        },
        "seconds": {
            "median": round(statistics.median(r["seconds"] for r in rows), 3),
            "most": round(max(r["seconds"] for r in rows), 3),
        },
        "ways": {
            f"{name} {layout}": sum(r["identical"] for r in rows if (r["server"], r["layout"]) == (name, layout))
            for name in servers
            for layout in ("file", "directory")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pulls", type=int, default=200)
    parser.add_argument("--mean", type=float, default=400_000.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = measure(network(12), pulls=args.pulls, mean=args.mean, seed=args.seed)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    text = json.dumps({"benchmark": "transfer", "machine": machine, "mean": args.mean, "results": results}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
