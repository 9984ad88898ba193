"""penjing patch: the next version of a network, of the one before and what changed."""

from __future__ import annotations

from typing import Annotated

import typer

from penjing.cli import options
from penjing.cli.outputs import output_package
from penjing.cli.screen import Screen
from penjing.cli.show import show_ladder
from penjing.errors import InputError


def patch(
    context: typer.Context,
    old: Annotated[str, typer.Argument(metavar="OLD", help="The package that the delta was made from, or its folder.")],
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="What penjing diff wrote.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The package to write, ending in .penjing.")],
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers", min=2, max=8, metavar="N", help="Cut NEW into N quality layers, as penjing pack --layers does."
        ),
    ] = None,
    data: options.OptionalData = None,
    task: options.Task = None,
    layout: options.Layout = "file",
    json: options.Json = False,
) -> int:
    """Makes the new version of OLD and DELTA, bit for bit; another OLD than the delta's is refused.

    [bold]penjing patch old.penjing delta.penjing new.penjing[/]
    [bold]penjing patch old.penjing delta.penjing new.penjing --layers 3[/]
    """
    from penjing.package import delta as deltas

    screen: Screen = context.obj
    path = output_package(new, layout)
    if layers is None and (data or task):
        raise InputError("--data and --task go with --layers", hint="without layers there is nothing to choose")
    found: dict[str, object] = {"schema": 1, "path": str(path)}
    with screen.task("patch"):
        if layers is None:
            size = deltas.patch(old, delta, path, layout=layout, progress=screen)
        else:
            import penjing as pj
            from penjing import package
            from penjing.data import load_data
            from penjing.evaluation.layering import layered
            from penjing.task import get_task

            # What can be known coarsely, the network says, and samples say what errors do: a delta holds neither.
            packed = deltas.read(old, delta, progress=screen)
            network, samples = pj.Network.from_state(*packed[:2]), load_data(data) if data else None
            coded = layered(network, layers, packed=packed, data=samples, task=get_task(task), progress=screen)
            size = package.save(coded, path, layout=layout)
    screen.line(f"{path}: {size:,} bytes")
    if layers is not None:
        found["ladder"] = show_ladder(screen, path)
    screen.emit(found | {"bytes": size})
    return 0
