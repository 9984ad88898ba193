"""penjing unpack: the network in a package, as a file that any tool reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from penjing.cli.models import load_network
from penjing.cli.options import AtLeast, Json, Layers, Signature
from penjing.cli.outputs import output_file
from penjing.cli.screen import Screen
from penjing.errors import InputError
from penjing.files import appearing


def unpack(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The package, ending in .penjing, or its folder.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The file to write, ending in .safetensors or .onnx.")],
    layers: Layers = None,
    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key", metavar="KEY.pub", help="Unpack only what the holder of KEY signed. Give it again for more."
        ),
    ] = None,
    signature: Signature = None,
    at_least: AtLeast = None,
    json: Json = False,
) -> int:
    """Unpacks FILE into a .safetensors file: its tensors open anywhere, its graph with Network.load. Or into an .onnx
    file, if it was packed with --target.

    [bold]penjing unpack net.penjing net.safetensors[/]   [bold]penjing unpack net.penjing net.onnx[/]
    [bold]penjing unpack net.penjing.pull net.safetensors --layers 1[/]
    [bold]penjing unpack net.penjing net.safetensors --key maker.pub --at-least 2[/]
    """
    from penjing.package import onnx_model
    from penjing.package.directory import is_package

    screen: Screen = context.obj
    if not file.endswith(".penjing") and not is_package(Path(file).expanduser()):
        raise InputError(f"{file} is not a package", hint="a package ends in .penjing; penjing pack writes one")
    path = output_file(out, suffixes=(".safetensors", ".onnx"))
    if not key and (signature is not None or at_least is not None):
        raise InputError("--signature and --at-least go with --key", hint="name the maker's public key, KEY.pub")
    verified = _verified(screen, Path(file).expanduser(), layers, key, signature, at_least) if key else None
    if path.suffix == ".onnx":
        data = onnx_model.load(file, layers=layers) if verified is None else onnx_model.assemble(*verified)
        with appearing(path) as aside:
            aside.write_bytes(data)
        screen.line(f"{path}: {len(data):,} bytes")
        screen.emit({"schema": 1, "path": str(path), "bytes": len(data)})
        return 0
    import penjing as pj
    from penjing.evaluation import words

    if verified is not None:
        network = pj.Network.from_state(*verified)
    else:
        network = load_network(file) if layers is None else pj.unpack(file, layers=layers)
    network.save(path)
    size = path.stat().st_size
    screen.line(f"{path}: {words.size(size)}, {len(network.tensors())} tensors")
    screen.emit({"schema": 1, "path": str(path), "bytes": size, "tensors": len(network.tensors())})
    return 0


def _verified(
    screen: Screen, path: Path, layers: int | None, keys: list[str], signature: str | None, at_least: int | None
) -> tuple[str, dict[str, Any]]:
    """Topology and arrays of a package that one of `keys` signed: every part is held against the manifest that was
    verified, whatever becomes of the file meanwhile."""
    from penjing.package import signatures
    from penjing.package.refining import Refining

    reading = Refining(path, layers=layers)
    signed = signatures.verify_manifest(
        reading.manifest,
        path,
        [Path(k).expanduser() for k in keys],
        signature=None if signature is None else Path(signature).expanduser(),
        at_least=at_least,
    )
    screen.line(f"{path}: release {signed.release}, signed by {signed.key[:12]}")
    reading.refresh()
    reading.require()
    return reading.read()[:2]
