"""penjing doctor: what is installed, whether it really works, and the command for what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from penjing._version import __version__
from penjing.cli.options import Json
from penjing.cli.screen import Screen
from penjing.cli.tables import facts, table
from penjing.errors import InputError, PenjingError

if TYPE_CHECKING:
    from penjing.network import Network

_PACKAGES = (
    "torch",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "transformers",
    "safetensors",
    "constriction",
)
_FEATURES = {  # flag in /proc/cpuinfo: what it is good for
    "avx2": "fast float32",
    "avx512f": "wider float32",
    "avx512_vnni": "fast int8",
    "avx_vnni": "fast int8",
    "avx512_bf16": "fast bfloat16",
    "amx_bf16": "very fast bfloat16",
    "amx_int8": "very fast int8",
    "asimddp": "fast int8",
    "i8mm": "fast int8",
    "bf16": "fast bfloat16",
}


def doctor(context: typer.Context, json: Json = False) -> int:
    """Tells what works on this machine: every runtime exports and runs a tiny network for real."""
    screen: Screen = context.obj
    found: dict[str, Any] = {
        "schema": 1,
        "penjing": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "machine": _machine(),
        "free_disk_bytes": {"here": _free(Path.cwd()), "temporary files": _free(Path(tempfile.gettempdir()))},
    }
    screen.say(_packages_table(found))
    screen.say(_machine_table(found))
    network = _tiny_network()
    found["checks"] = [_package_check(network), *_runtime_checks(screen, network)]
    screen.say(_checks_table(found["checks"]))
    found["ok"] = found["checks"][0]["ok"]
    missing = [c for c in found["checks"] if not c["ok"]]
    for check in missing:
        screen.line(f"{check['name']}: {check['says']}")
        screen.line(f"   do: {check['remedy']}")
    if not missing:
        screen.say("[green]All is well.[/] Next: [bold]penjing demo[/]")
    screen.emit(found)
    return 0 if found["ok"] else 2


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    flags: set[str] = set()
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
            if key.strip() == "model name":
                model = value.strip()
    except OSError:
        pass  # not Linux: the features stay unknown
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": model,
        "cores": cores,
        "threads": os.environ.get("OMP_NUM_THREADS") or cores,
        "features": {name: name in flags for name in _FEATURES},
    }


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _tiny_network() -> Network:
    """A convolution, a batch norm and a linear layer. InputError where not even this can be captured."""
    try:
        import torch
        from torch import nn

        import penjing as pj

        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )
        return pj.capture(module.eval(), inputs=(torch.rand(2, 3, 8, 8),))
    except Exception as error:  # a broken installation can fail in any way
        raise InputError(
            f"the core does not work here: {type(error).__name__}: {error}",
            hint="pip install --force-reinstall penjing",
        ) from error


def _package_check(network: Network) -> dict[str, Any]:
    import penjing as pj

    def work(folder: Path) -> str:
        pj.pack(network, folder / "tiny.penjing")
        again = pj.unpack(folder / "tiny.penjing")
        same = all(bool((t == again.tensors()[n]).all()) for n, t in network.tensors().items())
        if not same:
            raise InputError("a packed network came back changed")
        return "captured, packed and unpacked bit for bit"

    return _checked("core", work, "pip install --force-reinstall penjing")


def _runtime_checks(screen: Screen, network: Network) -> list[dict[str, Any]]:
    from penjing.runtimes import RUNTIMES, Target

    checks = []
    for name in RUNTIMES.names():
        runtime = RUNTIMES.get(name)
        if not runtime.available():
            install = f"pip install 'penjing[{name}]'"
            checks.append({"name": name, "ok": False, "seconds": 0.0, "says": "not installed", "remedy": install})
            continue

        def work(folder: Path, name: str = name) -> str:
            runtime = RUNTIMES.get(name)
            artifact = runtime.export(network, folder / f"tiny{runtime.suffix}")
            session = runtime.load(Path(artifact.path), Target(runtime=name))
            feed = {k: v.numpy() for k, v in network.bind(network.example()).items()}
            shapes = [tuple(o.shape) for o in session.run(feed)]
            return f"exported, agreed within {artifact.parity.max_abs:.1e}, ran as {session.precision}: {shapes[0]}"

        with screen.task(f"trying {name}"):
            checks.append(_checked(name, work, f"pip install --force-reinstall 'penjing[{name}]'"))
    return checks


def _checked(name: str, work: Any, remedy: str) -> dict[str, Any]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="penjing-doctor-") as folder:
        try:
            says, ok = work(Path(folder)), True
        except PenjingError as error:
            says, ok, remedy = error.message, False, error.hint or remedy
        except Exception as error:  # a runtime that is installed but broken can fail in any way
            says, ok = f"{type(error).__name__}: {error}", False
    return {"name": name, "ok": ok, "seconds": time.monotonic() - start, "says": says, "remedy": None if ok else remedy}


def _packages_table(found: dict[str, Any]) -> Table:
    rows = [("penjing", found["penjing"]), ("python", found["python"])]
    rows += [(n, v or "not installed") for n, v in found["packages"].items()]
    return facts(rows, "Versions")


def _machine_table(found: dict[str, Any]) -> Table:
    machine = found["machine"]
    have = [f"{n} ({_FEATURES[n]})" for n, yes in machine["features"].items() if yes]
    int8 = any(machine["features"][n] for n in ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"))
    rows: list[tuple[str, object]] = [
        ("processor", f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads used"),
        ("good for", ", ".join(have) or "unknown: no list of processor features here"),
    ]
    if not int8 and have:
        rows.append(("note", "no int8 instructions (VNNI, AMX): int8 gains less speed here than on newer processors"))
    free = found["free_disk_bytes"]
    rows.append(("free disk", ", ".join(f"{v / 1e9:.1f} GB ({k})" for k, v in free.items())))
    return facts(rows, "\nMachine")


def _checks_table(checks: list[dict[str, Any]]) -> Table:
    made = table("\nTried just now")
    for column in ("", "works", "seconds", "what happened"):
        made.add_column(column)
    for c in checks:
        made.add_row(c["name"], "[green]yes[/]" if c["ok"] else "[red]no[/]", f"{c['seconds']:.1f}", c["says"])
    return made
