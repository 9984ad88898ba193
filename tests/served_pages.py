"""Pages whose commands fetch from a host: run as they stand, with a server of this folder in its place."""

import contextlib
import functools
import http.server
import io
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

from penjing.cli.app import main

ROOT = Path(__file__).resolve().parents[1]
HOST = "https://example.org"


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        return None


def run_page(name, folder, monkeypatch, capfd):
    """Runs the blocks of docs/`name` in `folder`; gives their number, and what Python's, which share their
    names, have printed."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (folder / "examples").symlink_to(ROOT / "examples")
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / "docs" / name).read_text(encoding="utf8"), re.S | re.M)
    names: dict[str, object] = {"__name__": "document"}
    printed = []
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        for language, code in blocks:
            code = code.replace(HOST, f"http://127.0.0.1:{server.server_port}")
            if language == "python":
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    exec(compile(code, name, "exec"), names)
                printed.append(said.getvalue())
                continue
            for command in code.splitlines():
                program, *arguments = shlex.split(command)
                if program == "python":
                    subprocess.run([sys.executable, *arguments], check=True)
                    continue
                assert program == "penjing"
                assert main(arguments) == 0, f"{command}\n{capfd.readouterr().err}"
        server.shutdown()
    return len(blocks), printed
