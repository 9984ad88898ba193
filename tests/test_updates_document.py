"""The commands and the code of docs/updates.md run as they stand, but for the host."""

import re
from pathlib import Path

from served_pages import run_page


def test_the_page_on_updates_runs(tmp_path, monkeypatch, capfd):
    count, _ = run_page("updates.md", tmp_path, monkeypatch, capfd)
    assert count >= 4
    said = capfd.readouterr().err
    assert re.search(r"layer 1: [\d,]+ bytes \(4\d\.\d%\), accuracy \d+\.\d\d% on 360 samples", said)
    assert Path("pulled.penjing").read_bytes() == Path("digits.penjing").read_bytes()
    assert Path("patched.penjing").read_bytes() == Path("new.penjing").read_bytes()
    assert Path("delta.penjing").stat().st_size < Path("new.penjing").stat().st_size / 2
