"""What every test may ask for: the real networks and data sets, if they are there, and tiny networks of one's own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes, the tests of a file stay in one, and in the zoo those of a network: captured once."""
    for item in items:
        path = str(item.path.relative_to(ROOT))
        callspec = getattr(item, "callspec", None)
        network = callspec.params.get("name") if callspec and "channels" in path else None
        item.add_marker(pytest.mark.xdist_group(f"zoo {network}" if network else path))


@pytest.fixture(scope="session")
def hub() -> ModuleType:
    """The module with the pretrained networks and real data sets; skips where they are not on this machine."""
    file = DATA / "hub.py"
    if not file.exists():
        pytest.skip("the pretrained networks and data sets are not on this machine")
    spec = importlib.util.spec_from_file_location("hub", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hub"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
