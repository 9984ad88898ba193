"""Web servers for tests of transfers: one that counts and lies on demand, and one below HTTP."""

import asyncio
import contextlib
import importlib.util
import socket
import threading
from pathlib import Path

from starlette.applications import Starlette
from starlette.responses import FileResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

_spec = importlib.util.spec_from_file_location(
    "transfer_benchmark", Path(__file__).resolve().parents[2] / "benchmarks" / "transfer.py"
)
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)


class Host:
    """Serves a folder, each request noted as (path, range); `lie(path, range)` may answer in its place.

    `lie` gives a Response, None for the true one, or a coroutine of either.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, ""
        self.honest()

    def honest(self):
        """Forgets what was asked of it, and all lies."""
        self.asked, self.headers = [], []
        self.lie = lambda path, wanted: None

    async def answer(self, request):
        path, wanted = request.path_params["path"], request.headers.get("range")
        self.asked.append((path, wanted))
        self.headers.append(dict(request.headers))
        said = self.lie(path, wanted)
        said = await said if asyncio.iscoroutine(said) else said
        if said is not None:
            return said
        file = self.folder / path
        return FileResponse(file) if file.is_file() else Response("no such thing", status_code=404)

    def whole(self, path) -> bytes:
        return (self.folder / path).read_bytes()


@contextlib.contextmanager
def hosting(folder):
    host = Host(folder)
    with benchmark.serving(Starlette(routes=[Route("/{path:path}", host.answer)])) as port:
        host.url = f"http://127.0.0.1:{port}"
        yield host


@contextlib.contextmanager
def raw(answer):
    """A server that sends the bytes `answer(request)` gives for each connection, whatever they are, and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(answer(connection.recv(65536)))

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def slowly(data, chunk, seconds):
    """A streamed answer that takes its time."""

    async def chunks():
        for at in range(0, len(data), chunk):
            yield data[at : at + chunk]
            await asyncio.sleep(seconds)

    return chunks()


def is_part(path):
    """Whether a path of a directory package is a part's."""
    return len(path.rpartition("/")[2]) == 64


def unranged(host):
    """Lies as a server that has never heard of ranges."""
    return lambda path, wanted: Response(host.whole(path)) if (host.folder / path).is_file() else None


__all__ = [
    "FileResponse",
    "RedirectResponse",
    "Response",
    "StreamingResponse",
    "benchmark",
    "hosting",
    "is_part",
    "raw",
    "slowly",
    "unranged",
]
