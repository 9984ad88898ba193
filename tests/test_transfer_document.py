"""The commands and the code of docs/transfer.md run as they stand, but for the host."""

import contextlib
import functools
import http.server
import io
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


def test_the_page_on_transfers_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    page = (ROOT / "docs" / "transfer.md").read_text(encoding="utf8")
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", page, re.S | re.M)
    assert len(blocks) >= 4
    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        for language, code in blocks:
            code = code.replace(HOST, host)
            if language == "python":
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    exec(compile(code, "transfer.md", "exec"), {"__name__": "document"})
                assert said.getvalue().startswith("True ")
                continue
            for command in code.splitlines():
                program, *arguments = shlex.split(command)
                assert program == "penjing"
                assert main(arguments) == 0, f"{command}\n{capfd.readouterr().err}"
        server.shutdown()
    whole = Path("digits.penjing").read_bytes()
    assert all(Path(f"{name}.penjing").read_bytes() == whole for name in ("joined", "pulled", "here"))
    assert {f.name for f in Path("again").iterdir()} == {f.name for f in Path("site/digits").iterdir()}
