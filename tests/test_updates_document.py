"""The commands and the code of docs/updates.md run as they stand, but for the host."""

import functools
import http.server
import re
import shlex
import threading
from pathlib import Path

from penjing.cli.app import main

ROOT = Path(__file__).resolve().parents[1]
HOST = "https://example.org"


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        return None


def test_the_page_on_updates_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    page = (ROOT / "docs" / "updates.md").read_text(encoding="utf8")
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", page, re.S | re.M)
    assert len(blocks) >= 4
    names: dict[str, object] = {"__name__": "document"}
    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        for language, code in blocks:
            code = code.replace(HOST, f"http://127.0.0.1:{server.server_port}")
            if language == "python":
                exec(compile(code, "updates.md", "exec"), names)
                continue
            for command in code.splitlines():
                program, *arguments = shlex.split(command)
                assert program == "penjing"
                assert main(arguments) == 0, f"{command}\n{capfd.readouterr().err}"
        server.shutdown()
    said = capfd.readouterr().err
    assert re.search(r"layer 1: [\d,]+ bytes \(4\d\.\d%\), accuracy \d+\.\d\d% on 360 samples", said)
    assert Path("pulled.penjing").read_bytes() == Path("digits.penjing").read_bytes()
    assert Path("patched.penjing").read_bytes() == Path("new.penjing").read_bytes()
    assert Path("delta.penjing").stat().st_size < Path("new.penjing").stat().st_size / 2
