"""penjing deploy: a network exported for a runtime, checked against itself, in a folder ready to ship."""

from __future__ import annotations

from typing import Annotated

import typer

from penjing.cli import options, views
from penjing.cli.models import load_network
from penjing.cli.outputs import output_folder
from penjing.cli.screen import Screen


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
    from penjing.cli.targets import bundle_folders, parse_targets
    from penjing.data import load_data

    screen: Screen = context.obj
    targets = parse_targets(target)
    folder = output_folder(out)
    samples = load_data(data) if data else None
    network = load_network(model, data=samples, shapes=input_shape)
    artifacts = []
    with bundle_folders(folder, targets) as places:
        for one, place in places:
            with screen.task(f"export for {one.runtime}"):
                bundle = pj.deploy(network, target=one, out=place)
            artifacts += [a if isinstance(a, dict) else vars(a) for a in bundle.artifacts]
    screen.say(views.facts([(str(a.get("path")), views.bytes_(a.get("bytes"))) for a in artifacts], "Written"))
    screen.emit({"schema": 1, "out": str(folder), "artifacts": artifacts})
    return 0
