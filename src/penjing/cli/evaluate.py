"""penjing evaluate: networks measured on the runtimes that will run them, beside a baseline."""

from __future__ import annotations

from typing import Annotated

import typer

from penjing.cli import options
from penjing.cli.models import load_network
from penjing.cli.screen import Screen
from penjing.cli.show import show_report


def evaluate(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL_OR_BUNDLE...", help="Networks or bundles, named as in penjing compress."),
    ],
    data: options.RequiredData,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="MODEL", help="What to compare with: runs are interleaved with its runs."),
    ] = None,
    task: options.Task = None,
    target: options.Targets = None,
    json: options.Json = False,
) -> int:
    """Measures accuracy, latency, memory and size of networks on real runtimes.

    [bold]penjing evaluate small/ --data net.py:test --baseline net.py:build --task classification --target openvino[/]
    """
    import penjing as pj
    from penjing.cli.targets import parse_targets
    from penjing.data import load_data
    from penjing.task import get_task

    screen: Screen = context.obj
    targets = parse_targets(target)
    samples = load_data(data)
    goal = get_task(task) if task else None
    base = load_network(baseline, data=samples) if baseline else None
    networks = [(name, load_network(name, data=samples)) for name in models]
    rows = []
    for name, network in networks:
        report = pj.evaluate(network, samples, baseline=base, target=targets, task=goal, progress=screen).to_dict()
        rows.append({"model": name, **report})
        show_report(screen, report, name)
    screen.emit({"schema": 1, "reports": rows})
    return 0
