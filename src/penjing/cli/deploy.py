"""penjing deploy: a network exported for a runtime, checked against itself, in a folder ready to ship."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penjing.cli import options
from penjing.cli.models import load_network
from penjing.cli.outputs import output_folder
from penjing.cli.screen import Screen
from penjing.cli.tables import facts

if TYPE_CHECKING:
    from penjing.network import Network


def deploy(
    context: typer.Context,
    model: options.Model,
    target: options.Targets = None,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="The folder to write.")] = "bundle",
    data: options.OptionalData = None,
    input_shape: options.Shapes = None,
    json: options.Json = False,
) -> int:
    """Exports MODEL for a runtime and checks that the file says what the network says.

    [bold]penjing deploy net.penjing --target openvino --out bundle[/]
    """
    import penjing as pj
    from penjing.cli.targets import parse_targets
    from penjing.data import load_data

    screen: Screen = context.obj
    targets = parse_targets(target)
    folder = output_folder(out)
    samples = load_data(data) if data else None
    network = load_network(model, data=samples, shapes=input_shape)
    bundle = pj.deploy(network, target=targets, out=folder, data=samples, progress=screen)
    artifacts = [{**a, "in_float": _in_float(network, folder / str(a["path"]), a["runtime"])} for a in bundle.artifacts]
    rows = [(f"{folder / str(a['path'])}", _described(a)) for a in artifacts]
    screen.say(facts(rows, f"Written to {folder}/"))
    for artifact in artifacts:
        for line in _said(artifact):
            screen.line(line)
    screen.emit({"schema": 1, "out": str(folder), "artifacts": artifacts})
    return 0


def _described(artifact: Mapping[str, Any]) -> str:
    from penjing.evaluation import words

    return f"{words.size(artifact['bytes'])}, outputs within {artifact['parity']['max_abs']:.2g} of the network's own"


def _in_float(network: Network, path: Path, name: str) -> dict[str, str]:
    """Layers on integer grids that the runtime runs in float on this machine."""
    from penjing.runtimes import RUNTIMES

    runtime = RUNTIMES.get(name)
    return runtime.in_float(network, path, runtime.load(path)) if network.is_quantized else {}


def _said(artifact: Mapping[str, Any]) -> list[str]:
    from penjing.evaluation import words

    wider = words.widened(artifact["widened"])
    return words.in_float({"result": artifact, "in_float": artifact["in_float"]}) + (
        [f"On {artifact['runtime']} {wider}."] if wider else []
    )
