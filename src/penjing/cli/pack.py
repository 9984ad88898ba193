"""penjing pack: a network as one small file."""

from __future__ import annotations

from typing import Annotated

import typer

from penjing.cli import options
from penjing.cli.models import load_network
from penjing.cli.outputs import output_file
from penjing.cli.screen import Screen


def pack(
    context: typer.Context,
    model: options.Model,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The package to write, ending in .penjing.")],
    rate: Annotated[
        float | None,
        typer.Option(
            help="Choose grids for few bytes first: the relative error of the outputs that rounding would do, 0 to 1. "
            "Samples given by --data make the same error smaller."
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="The fewest bytes that keep the task's metric on --data within so much: points, or the metric's unit."
        ),
    ] = None,
    data: options.OptionalData = None,
    task: options.Task = None,
    seed: options.Seed = 0,
    input_shape: options.Shapes = None,
    json: options.Json = False,
) -> int:
    """Packs MODEL into one entropy-coded file for the wire, bit for bit, or with fewer bytes for a little less.

    [bold]penjing pack bundle/ net.penjing[/]
    [bold]penjing pack model.py:net net.penjing --max-drop 0.5 --data samples.npz --task classification[/]
    """
    import penjing as pj
    from penjing.data import load_data
    from penjing.evaluation import words

    screen: Screen = context.obj
    path = output_file(file, suffixes=(".penjing",))
    samples = load_data(data) if data else None
    network = load_network(model, data=samples, shapes=input_shape)
    with screen.task("pack"):
        pj.pack(network, path, rate=rate, max_drop=max_drop, data=samples, task=task, seed=seed, progress=screen)
    size = path.stat().st_size
    raw = sum(network.stored_bytes().values())
    screen.line(f"{path}: {words.size(size)} ({_beside(size, raw)} than the tensors themselves, {words.size(raw)})")
    screen.emit({"schema": 1, "path": str(path), "bytes": size, "tensor_bytes": raw})
    return 0


def _beside(size: int, raw: int) -> str:
    return f"{raw / size:.2f}× smaller" if raw >= size else f"{size / max(raw, 1):.2f}× larger"
