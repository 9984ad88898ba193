"""penjing pack: a network as one small file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penjing.cli import options
from penjing.cli.models import load_network
from penjing.cli.outputs import output_package
from penjing.cli.screen import Screen
from penjing.cli.show import show_ladder
from penjing.errors import InputError


def pack(
    context: typer.Context,
    model: options.Model,
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="The package to write, ending in .penjing; or a folder.")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FILE", help="The same, as an option.")] = None,
    layout: options.Layout = "file",
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
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers",
            metavar="N",
            help="Coarse values of all tensors first, then what makes them exact, in N steps: the network runs from "
            "the first on. --data says where errors do least, with --task each layer is measured.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="RUNTIME",
            help="onnxruntime or openvino: put the graph in as it reads it, so that a client gets an .onnx file "
            "without torch.",
        ),
    ] = None,
    data: options.OptionalData = None,
    task: options.Task = None,
    seed: options.Seed = 0,
    input_shape: options.Shapes = None,
    json: options.Json = False,
) -> int:
    """Packs MODEL, entropy-coded for the wire, bit for bit, into one file or a folder to put on a web server; or into
    fewer bytes for a little less.

    [bold]penjing pack bundle/ net.penjing[/]   [bold]penjing pack bundle/ --out net/ --layout directory[/]
    [bold]penjing pack bundle/ net.penjing --layers 3[/]
    [bold]penjing pack model.py:net net.penjing --max-drop 0.5 --data samples.npz --task classification[/]
    """
    import penjing as pj
    from penjing.data import load_data
    from penjing.evaluation import words

    screen: Screen = context.obj
    path = _place(context, file, out, layout)
    samples = load_data(data) if data else None
    network = load_network(model, data=samples, shapes=input_shape)
    with screen.task("pack"):
        size = pj.pack(
            network,
            path,
            layout=layout,
            rate=rate,
            max_drop=max_drop,
            layers=layers,
            target=target,
            data=samples,
            task=task,
            seed=seed,
            progress=screen,
        )
    raw = sum(network.stored_bytes().values())
    beside = f" ({_beside(size, raw)} than the tensors themselves, {words.size(raw)})" if raw else ""
    screen.line(f"{path}: {words.size(size)}{beside}")
    found = {"schema": 1, "path": str(path), "bytes": size, "tensor_bytes": raw}
    if layers is not None:
        found["ladder"] = show_ladder(screen, path)
    screen.emit(found)
    return 0


def _place(context: typer.Context, file: str | None, out: str | None, layout: str) -> Path:
    """Where the package goes, which stands as an argument or behind --out."""
    if (file is None) == (out is None):
        raise InputError(
            "the package's FILE is missing" if file is None else "FILE is given twice",
            hint=f"{context.command_path} --help lists what it takes",
        )
    return output_package(file or out or "", layout)


def _beside(size: int, raw: int) -> str:
    return f"{raw / size:.2f}× smaller" if raw >= size else f"{size / raw:.2f}× larger"
