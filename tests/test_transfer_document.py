"""The commands and the code of docs/transfer.md run as they stand, but for the host."""

from pathlib import Path

from served_pages import run_page


def test_the_page_on_transfers_runs(tmp_path, monkeypatch, capfd):
    count, printed = run_page("transfer.md", tmp_path, monkeypatch, capfd)
    assert count >= 4
    assert printed[0].startswith("True ") and not any(printed[1:])
    assert Path("client.onnx").is_file()
    whole = Path("digits.penjing").read_bytes()
    assert all(Path(f"{name}.penjing").read_bytes() == whole for name in ("joined", "pulled", "here"))
    assert {f.name for f in Path("again").iterdir()} == {f.name for f in Path("site/digits").iterdir()}
