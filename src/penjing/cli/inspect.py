"""penjing inspect: what is inside a network, a bundle or a package."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from penjing.cli import options
from penjing.cli.models import load_network
from penjing.cli.outputs import output_file
from penjing.cli.screen import Screen
from penjing.cli.show import show_report
from penjing.cli.tables import facts, table
from penjing.errors import InputError

if TYPE_CHECKING:
    from penjing.network import Network

_ROWS = 40


def inspect(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="A package, a bundle's folder, or any MODEL as in penjing compress."),
    ],
    data: options.OptionalData = None,
    input_shape: options.Shapes = None,
    groups: Annotated[
        bool, typer.Option("--groups", help="Also the channel groups: what can only be removed together.")
    ] = False,
    provenance: Annotated[
        bool, typer.Option("--provenance", help="Also where it comes from: the original, every step, the digests.")
    ] = False,
    bom: Annotated[
        str | None,
        typer.Option(
            "--bom", metavar="FILE", help="Also write a package's or bundle's bill of materials, in CycloneDX."
        ),
    ] = None,
    json: options.Json = False,
) -> int:
    """Shows what is inside a network, a bundle or a package.

    [bold]penjing inspect net.penjing[/]   [bold]penjing inspect net.py:build --input-shape 1x3x32x32 --groups[/]
    """
    from penjing import package
    from penjing.analysis.footprint import footprint
    from penjing.data import load_data
    from penjing.evaluation import describe
    from penjing.package.directory import is_package
    from penjing.package.provenance import trace

    screen: Screen = context.obj
    found: dict[str, Any] = {"schema": 1, "what": model}
    path = Path(model).expanduser()
    written = None if bom is None else output_file(bom, suffixes=(".json",))
    packed = is_package(path) or (path.suffix == ".penjing" and path.is_file())
    inner = path if packed else path / "network.penjing"
    if written is not None and not packed and not inner.is_file():
        raise InputError(
            f"{model} is no package or bundle", hint="a bill of materials is of a package: penjing pack makes one"
        )
    if packed:
        contents = package.inspect(path)
        found["package"] = contents.to_dict()
        screen.line(str(contents))
        if contents.sealed_bytes:
            return _sealed(screen, found, provenance or groups or bom is not None)
        if contents.delta is not None:
            return _delta(screen, found, provenance or groups or bom is not None)
        screen.say()
    if path.is_dir() and not packed:
        found["report"] = _report(screen, path)
    samples = load_data(data) if data else None
    network = load_network(model, data=samples, shapes=input_shape)
    found["network"] = {
        **describe(network),
        "parameters": network.parameter_count(),
        "macs": footprint(network).macs,
        "history": list(network.history),
        "tensors": _tensors(network),
    }
    screen.say(_summary(found["network"]))
    if "package" not in found:
        _show_tensors(screen, found["network"]["tensors"])
    if provenance:
        chain = trace(network.state()[0], found["network"]["digest"])
        found["provenance"] = chain.to_dict()
        screen.line(str(chain))
    if written is not None:
        from penjing.package import bom as materials

        materials.write(written, inner, network=found["network"], report=found.get("report"))
        found["bom"] = str(written)
        screen.line(f"{written}: the bill of materials")
    if groups:
        found["groups"] = [str(g) for g in network.groups()]
        screen.say("[bold]Channel groups[/]")
        screen.line(str(network.groups()))
    screen.emit(found)
    return 0


def _sealed(screen: Screen, found: dict[str, Any], more: bool) -> int:
    """Of a sealed package nothing else can be told."""
    if more:
        raise InputError(f"{found['what']} is sealed", hint="penjing decrypt opens it for its recipients")
    screen.emit(found)
    return 0


def _delta(screen: Screen, found: dict[str, Any], more: bool) -> int:
    """Nor of what changed in a network without that network."""
    if more:
        raise InputError(
            f"{found['what']} holds only what changed in a network", hint="penjing patch gives the new one"
        )
    screen.emit(found)
    return 0


def _report(screen: Screen, folder: Path) -> dict[str, Any] | None:
    if not (folder / "report.json").is_file():
        return None
    try:
        report: dict[str, Any] = json_module.loads((folder / "report.json").read_text(encoding="utf8"))
        show_report(screen, report)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / 'report.json'} is damaged ({type(error).__name__})",
            hint="write the bundle again with penjing deploy",
        ) from error
    screen.say()
    return report


def _tensors(network: Network) -> list[dict[str, Any]]:
    sizes, bits = network.stored_bytes(), network.code_bits()
    return [
        {
            "name": name,
            "shape": list(t.shape),
            "dtype": str(t.dtype).removeprefix("torch."),
            "bits": bits.get(name, 8 * t.element_size()),
            "bytes": sizes[name],
            "zeros": float((t == 0).float().mean()) if t.numel() else 0.0,
        }
        for name, t in network.tensors().items()
    ]


def _summary(described: dict[str, Any]) -> Table:
    looks = [f"{i['name']} {'×'.join(map(str, i['shape']))} {i['dtype']}" for i in described["inputs"]]
    size = sum(t["bytes"] for t in described["tensors"])
    pairs = (
        ("inputs", ", ".join(looks)),
        ("outputs", ", ".join(described["outputs"])),
        ("parameters", f"{described['parameters']:,}"),
        ("multiply-adds", f"{described['macs']:,} a sample"),
        ("tensors", f"{len(described['tensors'])}, {size:,} bytes"),
        ("history", ", ".join(str(e.get("name") or e.get("event")) for e in described["history"]) or "none"),
    )
    return facts(pairs, described["name"])


def _show_tensors(screen: Screen, tensors: list[dict[str, Any]]) -> None:
    made = table()
    for column in ("tensor", "shape", "type", "bytes", "zeros"):
        made.add_column(column, justify="left" if column in ("tensor", "type") else "right", overflow="fold")
    for t in sorted(tensors, key=lambda t: -int(t["bytes"]))[:_ROWS]:
        shape = "×".join(map(str, t["shape"])) or "scalar"
        kind = t["dtype"] if t["bits"] >= 8 else f"{t['bits']}-bit codes"
        made.add_row(t["name"], shape, kind, f"{t['bytes']:,}", f"{100 * t['zeros']:.0f} %")
    screen.say(made)
    if len(tensors) > _ROWS:
        screen.note(f"the {_ROWS} largest of {len(tensors)} tensors; --json lists them all")
