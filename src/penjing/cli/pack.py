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
    data: options.OptionalData = None,
    input_shape: options.Shapes = None,
    json: options.Json = False,
) -> int:
    """Packs MODEL into one entropy-coded file for the wire, bit for bit.

    [bold]penjing pack bundle/ net.penjing[/]
    """
    import penjing as pj
    from penjing.data import load_data
    from penjing.evaluation import words

    screen: Screen = context.obj
    path = output_file(file, suffixes=(".penjing",))
    samples = load_data(data) if data else None
    network = load_network(model, data=samples, shapes=input_shape)
    with screen.task("pack"):
        pj.pack(network, path)
    size = path.stat().st_size
    raw = sum(network.stored_bytes().values())
    screen.line(f"{path}: {words.size(size)} ({_beside(size, raw)} than the tensors themselves, {words.size(raw)})")
    screen.emit({"schema": 1, "path": str(path), "bytes": size, "tensor_bytes": raw})
    return 0


def _beside(size: int, raw: int) -> str:
    return f"{raw / size:.2f}× smaller" if raw >= size else f"{size / max(raw, 1):.2f}× larger"
