"""penjing compress: a recipe applied, the result measured beside the original, and everything written to one folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penjing.cli import options
from penjing.cli.models import load_network, load_teachers
from penjing.cli.outputs import output_folder
from penjing.cli.screen import Screen
from penjing.cli.sensitivity import curves_for
from penjing.cli.show import show_report
from penjing.errors import InputError

if TYPE_CHECKING:
    from penjing.recipe import Recipe

_SENSITIVE = 10


def compress(
    context: typer.Context,
    model: options.Model,
    data: options.RequiredData,
    test: Annotated[
        str | None, typer.Option("--test", metavar="DATA", help="Samples to measure on; without it, those of --data.")
    ] = None,
    task: options.Task = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", metavar="FILE", help="Steps in YAML or JSON; without it, a default that suits --task."
        ),
    ] = None,
    target: options.Targets = None,
    teacher: options.Teachers = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="The folder to write; without it, NAME-compressed.")
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="First measure, on samples of --data, what each part of MODEL can do without; drawn in the report.",
        ),
    ] = False,
    cache: options.Cache = None,
    resume: options.Resume = None,
    track: options.Trackers = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> int:
    """Makes MODEL smaller and faster, measures it beside the original, and writes a bundle.

    [bold]penjing compress net.py:build --data net.py:train --test net.py:test --task classification[/]
    """
    import penjing as pj
    from penjing.cli import views
    from penjing.cli.targets import parse_targets
    from penjing.data import load_data
    from penjing.progress import SILENT
    from penjing.task import get_task
    from penjing.training import is_main_process, require_trackers

    screen: Screen = context.obj
    require_trackers(track or ())
    if track and resume is None:
        raise InputError("--track writes to the folder of --resume, and none is named", hint="add --resume DIR")
    if cache is not None and not sensitivity:
        raise InputError("--cache keeps sensitivity curves, which are not asked for", hint="add --sensitivity")
    targets = parse_targets(target)
    goal = get_task(task) if task else None
    steps = pj.Recipe.load(Path(recipe)) if recipe else default_recipe(task)
    if out is not None:
        output_folder(out)
    samples = load_data(data)
    held_out = load_data(test) if test else None
    network = load_network(model, data=samples)
    teachers = load_teachers(teacher or [], data=samples)
    folder = output_folder(out or f"{network.name}-compressed")
    if recipe is None:
        why = (
            "channels, distillation, int8"
            if task
            else "int8 only; with --task, channels are pruned and trained again too"
        )
        screen.note(f"no --recipe: the default one ({why})")
    if held_out is None:
        screen.note("no --test: measured on the samples of --data, which flatters the result")

    curves = None
    if sensitivity:
        curves = curves_for(steps, network, samples, goal, cache=cache, seed=seed, screen=screen)
    kept = [resume, *(getattr(step, field) for step in steps for field in step.keeping)]
    if folders := " and ".join(dict.fromkeys(k for k in kept if k)):
        screen.kept = f"no bundle was written; the same command goes on from what {folders} holds"
    first = is_main_process()
    result = pj.compress(
        network,
        steps,
        data=samples,
        task=goal,
        test=held_out,
        seed=seed,
        teachers=teachers,
        resume=resume,
        trackers=track or (),
        progress=screen if first else SILENT,
    )
    if not first:  # of several processes, one measures and writes
        return 0
    report = pj.evaluate(
        result.network,
        held_out or samples,
        baseline=network,
        target=targets,
        task=goal,
        steps=result.steps,
        plans=result.plans,
        sensitivity=curves,
        seed=seed,
        progress=screen,
    )
    pj.deploy(result.network, target=targets, out=folder, report=report, recipe=steps)
    found = report.to_dict()
    screen.say(views.steps_table(found["steps"]))
    if curves is not None:
        screen.say(views.sensitivity_table(curves, report.kept, width=screen.console.width, rows=_SENSITIVE))
    show_report(screen, found)
    screen.line(f"written to {folder}/: the files to deploy, report.html, report.json, the recipe")
    screen.emit({**found, "out": str(folder)})
    return 0 if report.met else 3


def default_recipe(task: str | None) -> Recipe:
    """What is done when nothing is asked for: with a task, channels and distillation before int8; without, int8 alone.

    Without labels there is nothing to train towards, and pruning without training costs accuracy.
    """
    import penjing as pj

    quantize = pj.Quantize(weights="int8", activations="int8")
    if task is None:
        return pj.Recipe(quantize)
    return pj.Recipe(pj.PruneChannels(ratio=0.3), pj.Finetune(epochs=3, teacher="original"), quantize)
