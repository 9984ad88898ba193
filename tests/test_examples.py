"""Every example runs, and does what it says."""

import subprocess
import sys
from pathlib import Path

import pytest

from penjing.recipe import Recipe

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def _run(name: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *args], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    out = _run("quickstart.py", str(tmp_path))
    assert "unpacked, it computes the same: True" in out
    assert (tmp_path / "bundle" / "report.html").is_file()


def test_groups() -> None:
    out = _run("groups.py")
    assert "0.weight: (32, 1, 3, 3) -> (28, 1, 3, 3)" in out
    assert "3.weight: (64, 32, 3, 3) -> (64, 28, 3, 3)" in out


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda f: f.name)
def test_recipes_are_readable(file: Path) -> None:
    assert len(Recipe.load(file)) > 0


def test_no_example_is_forgotten() -> None:
    assert {p.name for p in EXAMPLES.glob("*.py")} == {"quickstart.py", "groups.py", "digits.py"}
