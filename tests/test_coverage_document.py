"""The page that benchmarks/coverage.py writes has a row for every network of the zoo."""

from __future__ import annotations

import re
from pathlib import Path

from penjing.testing.networks import ZOO

PAGE = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"


def test_every_network_has_a_row() -> None:
    rows = re.findall(r"^\| (\w+) \| ([\w -]+) \| ", PAGE.read_text(encoding="utf8"), re.M)
    listed = {name: kind for name, kind in rows if name != "network"}
    missing = {name: a.kind for name, a in ZOO.items() if listed.get(name) != a.kind}
    assert not missing, "python benchmarks/coverage.py writes docs/coverage.md anew"
