"""penjing sensitivity: what the metric becomes as each part of a network alone loses more and more."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penjing.cli import options
from penjing.cli.models import load_network
from penjing.cli.outputs import output_folder
from penjing.cli.screen import Screen
from penjing.errors import DataError, InputError
from penjing.files import appearing

if TYPE_CHECKING:
    from penjing.data import Data
    from penjing.evaluation import Sensitivity
    from penjing.network import Network
    from penjing.recipe import Recipe
    from penjing.task import Task

_FILES = ("sensitivity.json", "sensitivity.html")


def sensitivity(
    context: typer.Context,
    model: options.Model,
    data: options.RequiredData,
    task: options.Task = None,
    ratios: Annotated[
        str | None,
        typer.Option(
            "--ratios", metavar="R,R,…", help="Shares to take away, 0 to 1; without it, 0.1 to 0.9 in nine steps."
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            "--kind", metavar="KIND", help="channels (a curve for each channel group) or weights (for each weight)."
        ),
    ] = "channels",
    criterion: Annotated[
        str | None,
        typer.Option(
            "--criterion",
            metavar="NAME",
            help="Which go first: a criterion of PruneChannels (l2), of weights magnitude or random.",
        ),
    ] = None,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="The layers behind make up for what goes, as in PruneChannels.")
    ] = False,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where", metavar="PATTERN", help="Only layers of such paths (conv*, !head). Give it again for more."
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, metavar="N", help="Samples to measure on.")] = 256,
    cache: options.Cache = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="DIR", help="Also write sensitivity.html (the curves drawn) and .json there."),
    ] = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> int:
    """Measures what each part of MODEL can do without: accuracy against the share taken away, part after part.

    [bold]penjing sensitivity net.py:build --data net.py:train --task classification --out curves[/]
    """
    import penjing as pj
    from penjing.cli import views
    from penjing.data import load_data
    from penjing.evaluation.silencing import RATIOS
    from penjing.task import get_task

    screen: Screen = context.obj
    goal = get_task(task) if task else None
    shares = RATIOS if ratios is None else _numbers(ratios)
    folder = None if out is None else output_folder(out, files=_FILES)
    source = load_data(data)
    require_labels(source, goal)
    network = load_network(model, data=source)
    if goal is None and network.task is None:
        screen.note("no --task: the error of the outputs is measured, labels are not looked at")
    curves = pj.sensitivity(
        network,
        source,
        task=goal,
        ratios=shares,
        kind=kind,
        criterion=criterion,
        reconstruct=reconstruct,
        where=where or "*",
        samples=samples,
        seed=seed,
        cache=cache,
        progress=screen,
    )
    screen.say()
    screen.say(views.sensitivity_table(curves, width=screen.console.width))
    found: dict[str, Any] = {**curves.to_dict(), "most_sensitive": list(curves.most_sensitive())}
    if folder is not None:
        _write(curves, folder)
        screen.line(f"written to {folder}/: {_FILES[1]}, {_FILES[0]}")
        found["out"] = str(folder)
    screen.emit(found)
    return 0


def curves_for(
    recipe: Recipe, network: Network, data: Data, task: Task | None, *, cache: str | None, seed: int, screen: Screen
) -> Sensitivity:
    """The curves that say most about `recipe`: of what its first pruning Step takes away, in the order it does so."""
    import penjing as pj

    require_labels(data, task)
    kinds = (pj.PruneChannels, pj.PruneHeads, pj.PruneWeights)
    first = next((step for step in recipe if isinstance(step, kinds)), None)
    settings: dict[str, Any] = {}
    if isinstance(first, pj.PruneWeights):
        settings = {"kind": "weights"}
    elif isinstance(first, pj.PruneChannels | pj.PruneHeads):
        settings = {"criterion": first.criterion, "reconstruct": bool(first.reconstruct)}
    return pj.sensitivity(network, data, task=task, seed=seed, cache=cache, progress=screen, **settings)


def require_labels(data: Data, task: Task | None) -> None:
    """Raises DataError if there is a task but the samples have no labels: said before the long work."""
    if task is not None and next(data.batches(1, limit=1))[1] is None:
        raise DataError(
            f"the task '{task.name}' needs labels, but the data has none",
            hint="give (inputs, labels), or leave --task out: then the error of the outputs is measured",
        )


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"--ratios takes numbers between 0 and 1, separated by commas, got {text!r}",
            hint="for example 0.25,0.5,0.75",
        ) from None


def _write(curves: Sensitivity, folder: Path) -> None:
    """Both files or, where something goes wrong while the first is made, none."""
    from penjing.report import render_sensitivity

    page = render_sensitivity(curves)
    new = not folder.exists()
    try:
        with appearing(folder / _FILES[1]) as aside:
            aside.write_text(page, encoding="utf-8")
            curves.save(folder / _FILES[0])
    except BaseException:
        if new:
            with suppress(OSError):
                folder.rmdir()
        raise
