"""penjing inspect: what is inside a network, a bundle or a package."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penjing.cli import options
from penjing.cli.models import load_network
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
        typer.Argument(metavar="WHAT", help="A .penjing file, a bundle's folder, or any MODEL as in penjing compress."),
    ],
    data: options.OptionalData = None,
    input_shape: options.Shapes = None,
    groups: Annotated[
        bool, typer.Option("--groups", help="Also the channel groups: what can only be removed together.")
    ] = False,
    json: options.Json = False,
) -> int:
    """Shows what is inside a network, a bundle or a package.

    [bold]penjing inspect net.penjing[/]   [bold]penjing inspect net.py:build --input-shape 1x3x32x32 --groups[/]
    """
    from penjing.data import load_data

    screen: Screen = context.obj
    found: dict[str, Any] = {"schema": 1, "what": model}
    path = Path(model).expanduser()
    if path.suffix == ".penjing" and path.is_file():
        found["package"] = _package(screen, path)
    if path.is_dir() and (path / "report.json").is_file():
        found["report"] = _report(screen, path)
    samples = load_data(data) if data else None
    network = load_network(model, data=samples, shapes=input_shape)
    found["network"] = _network(screen, network)
    if groups:
        found["groups"] = [str(g) for g in network.groups()]
        screen.say("[bold]Channel groups[/]")
        for text in found["groups"]:
            screen.line(text)
    screen.emit(found)
    return 0


def _package(screen: Screen, path: Path) -> dict[str, Any]:
    from penjing import package

    contents = package.inspect(path)
    screen.line(str(contents))
    screen.say()
    to_dict = getattr(contents, "to_dict", None)
    return to_dict() if to_dict is not None else dict(vars(contents))


def _report(screen: Screen, folder: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json_module.loads((folder / "report.json").read_text(encoding="utf8"))
        show_report(screen, report)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / 'report.json'} is damaged: {error}", hint="write the bundle again with penjing deploy"
        ) from error
    screen.say()
    return report


def _network(screen: Screen, network: Network) -> dict[str, Any]:
    from penjing.evaluation import words
    from penjing.network.footprint import footprint

    tensors = network.tensors()
    rows = [
        {
            "name": name,
            "shape": list(t.shape),
            "dtype": str(t.dtype).removeprefix("torch."),
            "bytes": t.numel() * t.element_size(),
            "zeros": float((t == 0).float().mean()) if t.numel() else 0.0,
        }
        for name, t in tensors.items()
    ]
    described = {
        "name": network.name,
        "task": network.task,
        "inputs": [
            {
                "name": i.name,
                "shape": ["N" if d in i.dynamic else s for d, s in enumerate(i.shape)],
                "dtype": str(i.dtype).removeprefix("torch."),
            }
            for i in network.inputs
        ],
        "outputs": list(network.output_names),
        "parameters": network.parameter_count(),
        "macs": footprint(network).macs,
        "tensor_bytes": sum(r["bytes"] for r in rows),
        "history": list(network.history),
        "tensors": rows,
    }
    screen.say(
        facts(
            [
                (
                    "inputs",
                    ", ".join(
                        f"{i['name']} {'×'.join(map(str, i['shape']))} {i['dtype']}" for i in described["inputs"]
                    ),
                ),
                ("outputs", ", ".join(described["outputs"])),
                ("parameters", f"{described['parameters']:,}"),
                ("multiply-adds", f"{described['macs']:,} a sample"),
                ("tensors", f"{words.size(described['tensor_bytes'])} in {len(rows)}"),
                ("history", ", then ".join(str(e.get("name") or e.get("event")) for e in network.history) or "none"),
            ],
            network.name,
        )
    )
    made = table()
    for column, side in (
        ("tensor", "left"),
        ("shape", "right"),
        ("type", "left"),
        ("size", "right"),
        ("zeros", "right"),
    ):
        made.add_column(column, justify=side, overflow="fold")  # type: ignore[arg-type]
    big = sorted(rows, key=lambda r: -r["bytes"])[:_ROWS]
    for row in big:
        shape = "×".join(map(str, row["shape"])) or "scalar"
        made.add_row(row["name"], shape, row["dtype"], words.size(row["bytes"]), f"{100 * row['zeros']:.0f} %")
    screen.say(made)
    if len(rows) > _ROWS:
        screen.note(f"the {_ROWS} largest of {len(rows)} tensors; --json lists them all")
    return described
