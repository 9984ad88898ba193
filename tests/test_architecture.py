"""The shape of the source tree: imports go only from a later line of ORDER to an earlier one, without cycles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "penjing"
ORDER = [
    "_version", "errors", "registry", "progress", "files", "digests", "budget", "tensors", "network", "training",
    "analysis", "task", "data", "recipe", "runtimes", "methods", "compression", "package", "evaluation", "report",
    "search", "deployment", "serving", "cli", "testing",
]  # fmt: skip
APART = {"methods", "runtimes"}  # siblings in here never import each other, but for what is named below
SHARED = {
    "methods": set(),
    "runtimes": {
        "base",
        "timing",
        "cpu",
        "trace",
        "parity",
        "onnx_graph",
        "onnx_passes",
        "onnx_views",
        "onnx_nodes",
        "onnx_activations",
        "onnx_weights",
        "onnx_codebooks",
        "onnx_attention",
        "onnx_biases",
        "onnx_products",
        "onnx_recurrent",
        "onnx_skeleton",
    },
}
LAZY = ("runtimes/", "search/", "serving/", "cli/", "__init__.py", "__main__.py")
FILES = sorted(SOURCE.rglob("*.py"))


def _module(file: Path) -> str:
    parts = ["penjing", *file.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(f): f for f in FILES}


def _imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(module of penjing, whether inside a function); those for type checkers alone do not count."""
    tree = ast.parse(file.read_text(encoding="utf8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
        if inner is not node
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            assert node.level == 0, f"{file}: relative import"
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "penjing":
                yield name, id(node) in inside


def _place(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_to_earlier_boxes(module: str) -> None:
    place = _place(module)
    if place in ("", "__main__"):
        return
    assert place in ORDER, f"{place} has no place in the order"
    for imported, inside in _imports(MODULES[module]):
        other = _place(imported)
        if not other or (inside and place == "cli"):
            continue
        assert ORDER.index(other) <= ORDER.index(place), f"{module} imports {imported}"
        if other == place and place in APART and imported.count(".") > 1 and not MODULES[module].name.startswith("__"):
            assert imported.split(".")[2] in SHARED[place], f"{module} imports its sibling {imported}"


def test_there_are_no_cycles() -> None:
    graph = {m: {i for i, _ in _imports(f) if i != m and i in MODULES} for m, f in MODULES.items()}
    for package in [m for m, f in MODULES.items() if f.name == "__init__.py"]:
        for module in graph:  # a package's own files may be gathered by its __init__
            if module.startswith(package + "."):
                graph[module].discard(package)
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_functions_import_only_where_packages_are_optional(file: Path) -> None:
    where = str(file.relative_to(SOURCE))
    tree = ast.parse(file.read_text(encoding="utf8"))
    found = [
        ast.unparse(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    assert not found or where.startswith(LAZY), found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_files_are_short_and_well_named(file: Path) -> None:
    assert len(file.read_text(encoding="utf8").splitlines()) <= 400
    assert file.stem not in ("utils", "helpers", "common", "misc")


def _loads(code: str) -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(out.stdout.split())


def test_import_penjing_is_light() -> None:
    heavy = {"onnxruntime", "openvino", "optuna", "starlette", "uvicorn", "transformers", "torch"}
    assert not _loads("import penjing") & heavy


def test_everything_public_loads_no_runtime() -> None:
    loaded = _loads("import penjing\nfor name in penjing.__all__: getattr(penjing, name)")
    assert "torch" in loaded
    assert not loaded & {"onnxruntime", "openvino", "optuna", "starlette", "uvicorn", "transformers"}


def test_reading_a_package_needs_no_torch() -> None:
    assert "torch" not in _loads("import penjing.package")


def test_public_names() -> None:
    import penjing

    assert penjing.__all__ == sorted(penjing.__all__)
    assert set(penjing.__all__) == {
        "Bundle",
        "CodeWeights",
        "Distill",
        "Equalize",
        "Factorize",
        "Finetune",
        "FuseWeights",
        "Gradually",
        "MergeFactors",
        "MixPrecision",
        "Network",
        "PenjingError",
        "Plan",
        "PruneChannels",
        "PruneHeads",
        "PruneLayers",
        "PruneWeights",
        "Quantize",
        "Recipe",
        "Regularize",
        "Report",
        "Result",
        "SearchAmount",
        "Sensitivity",
        "ShareWeights",
        "Step",
        "Target",
        "Task",
        "TrainLowEntropy",
        "TrainQuantized",
        "__version__",
        "capture",
        "compress",
        "deploy",
        "evaluate",
        "pack",
        "sensitivity",
        "unpack",
    }
