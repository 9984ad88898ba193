"""The code in the README and in the tour runs as it stands; links lead somewhere; pages keep their size."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from penjing.cli.app import main
from served_pages import run_page

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "docs" / "tour.md",
    ROOT / "docs" / "training.md",
    ROOT / "docs" / "sealing.md",
    ROOT / "docs" / "transfer.md",
    ROOT / "docs" / "updates.md",
    *sorted((ROOT / "docs" / "adr").glob("*.md")),
]


def _blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line number, code) of every block of a language."""
    text = page.read_text(encoding="utf8")
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.S | re.M)
    return [(text[: m.start(1)].count("\n"), m.group(1)) for m in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/tour.md"])
def test_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page in order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "document"}
    blocks = _blocks(ROOT / name, "python")
    assert blocks
    with contextlib.redirect_stdout(io.StringIO()):
        for line, code in blocks:
            exec(compile("\n" * line + code, name, "exec"), names)
    network, again, result = names["network"], names["again"], names["result"]
    assert (tmp_path / "bundle" / "report.html").is_file()
    assert again.parameter_count() == result.network.parameter_count() < network.parameter_count()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_page_on_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "document"}
    with contextlib.redirect_stdout(io.StringIO()):
        for line, code in _blocks(ROOT / "docs" / "training.md", "python"):
            exec(compile("\n" * line + code, "training.md", "exec"), names)
    assert len(list((tmp_path / "run").glob("step-0?.safetensors"))) == 3


def test_the_page_on_sealing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its blocks build on each other: Python and commands in the order of the page."""
    run_page("sealing.md", tmp_path, monkeypatch, capfd)
    assert (tmp_path / "again.penjing").read_bytes() == (tmp_path / "net.penjing").read_bytes()
    assert (tmp_path / "bom.json").is_file()


@pytest.mark.slow
def test_command_line_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands = [line for _, code in _blocks(ROOT / "README.md", "sh") for line in code.splitlines() if line.strip()]
    assert len(commands) >= 6
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "penjing"
        code = main(arguments)
        assert code == 0, f"{command}\n{capfd.readouterr().err}"
    assert {"small", "small-openvino", "small.penjing", "small.safetensors"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf8")):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_pages_keep_their_size() -> None:
    lines = {p.name: len(p.read_text(encoding="utf8").splitlines()) for p in PAGES}
    assert lines.pop("CONTRIBUTING.md") < 60
    assert lines.pop("README.md") < 120
    assert lines.pop("tour.md") < 300
    assert lines.pop("training.md") < 100
    assert lines.pop("sealing.md") < 120
    assert lines.pop("transfer.md") < 100
    assert lines.pop("updates.md") < 100
    assert all(n < 45 for n in lines.values()), "a decision is at most one screen"
