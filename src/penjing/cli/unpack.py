"""penjing unpack: the network in a package, as a file that any tool reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penjing.cli.models import load_network
from penjing.cli.options import Json, Layers
from penjing.cli.outputs import output_file
from penjing.cli.screen import Screen
from penjing.errors import InputError


def unpack(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The package, ending in .penjing, or its folder.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The file to write, ending in .safetensors or .onnx.")],
    layers: Layers = None,
    json: Json = False,
) -> int:
    """Unpacks FILE into a .safetensors file: its tensors open anywhere, its graph with Network.load. Or into an .onnx
    file, if it was packed with --target.

    [bold]penjing unpack net.penjing net.safetensors[/]   [bold]penjing unpack net.penjing net.onnx[/]
    [bold]penjing unpack net.penjing.pull net.safetensors --layers 1[/]
    """
    from penjing.package import onnx_model
    from penjing.package.directory import is_package

    screen: Screen = context.obj
    if not file.endswith(".penjing") and not is_package(Path(file).expanduser()):
        raise InputError(f"{file} is not a package", hint="a package ends in .penjing; penjing pack writes one")
    path = output_file(out, suffixes=(".safetensors", ".onnx"))
    if path.suffix == ".onnx":
        size = onnx_model.write(file, path, layers=layers)
        screen.line(f"{path}: {size:,} bytes")
        screen.emit({"schema": 1, "path": str(path), "bytes": size})
        return 0
    import penjing as pj
    from penjing.evaluation import words

    network = load_network(file) if layers is None else pj.unpack(file, layers=layers)
    network.save(path)
    size = path.stat().st_size
    screen.line(f"{path}: {words.size(size)}, {len(network.tensors())} tensors")
    screen.emit({"schema": 1, "path": str(path), "bytes": size, "tensors": len(network.tensors())})
    return 0
