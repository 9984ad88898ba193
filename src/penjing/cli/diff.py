"""penjing diff: what changed from one version of a network to the next."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penjing.cli import options
from penjing.cli.models import load_network
from penjing.cli.outputs import output_file, output_package
from penjing.cli.screen import Screen
from penjing.errors import InputError


def diff(
    context: typer.Context,
    old: Annotated[str, typer.Argument(metavar="OLD", help="The package that is out there, or its folder.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new version: a package, or any MODEL.")],
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="The package to write, ending in .penjing.")],
    onto_grids: Annotated[
        bool,
        typer.Option(
            "--onto-grids", help="NEW is a float network: put its weights on OLD's grids, same scales, first."
        ),
    ] = False,
    slack: Annotated[
        float,
        typer.Option(
            help="With --onto-grids: a code changes where it is off by more than ½ + this part of a step; more makes "
            "smaller deltas and larger errors."
        ),
    ] = 0.0,
    new_package: Annotated[
        str | None, typer.Option("--new", metavar="FILE", help="Also write the new version whole, as a package.")
    ] = None,
    data: options.OptionalData = None,
    input_shape: options.Shapes = None,
    layout: options.Layout = "file",
    json: options.Json = False,
) -> int:
    """Writes what changed from OLD to NEW; penjing patch makes NEW of OLD and it, to the last bit.

    [bold]penjing diff old.penjing new.penjing delta.penjing[/]
    [bold]penjing diff old.penjing tuned.safetensors delta.penjing --onto-grids[/]
    """
    import penjing as pj
    from penjing import package
    from penjing.analysis.regrid import onto_grids as moved
    from penjing.data import load_data
    from penjing.evaluation import words
    from penjing.package import delta as deltas

    screen: Screen = context.obj
    path = output_package(delta, layout)
    written = None if new_package is None else output_file(new_package, suffixes=(".penjing",))
    if slack and not onto_grids:
        raise InputError("--slack goes with --onto-grids", hint="a new version that is packed has its codes already")
    before = package.read(old)
    note = ""
    if onto_grids or not _is_package(new):
        network = load_network(new, data=load_data(data) if data else None, shapes=input_shape)
        if onto_grids:
            network, found = moved(network, pj.Network.from_state(*before[:2]), slack=slack)
            note = str(found)
        after = (*network.state(), {"name": network.name})
    else:
        after = package.read(new)
    with screen.task("diff"):
        coded = deltas.encode(before, after, progress=screen)
        whole = package.encode(after[0], after[1], metadata=after[2], progress=screen)
    if written is not None:
        package.save(whole, written)
    size = package.save(coded, path, layout=layout)
    if note:
        screen.note(note)
    screen.line(f"{path}: {words.size(size)}, {size / len(whole):.1%} of the new version's {words.size(len(whole))}")
    screen.emit({"schema": 1, "path": str(path), "bytes": size, "whole_bytes": len(whole)})
    return 0


def _is_package(text: str) -> bool:
    from penjing.package import directory

    path = Path(text).expanduser()
    return path.suffix == ".penjing" or (path.is_dir() and directory.is_package(path))
