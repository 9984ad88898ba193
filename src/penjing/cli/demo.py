"""penjing demo: the whole journey on handwritten digits, in about a minute."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from penjing.cli import options
from penjing.cli.outputs import output_folder
from penjing.cli.screen import Screen
from penjing.cli.tables import table


def demo(
    context: typer.Context,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="The folder to write.")] = "demo",
    seed: options.Seed = 0,
    json: options.Json = False,
) -> int:
    """Trains a small network on handwritten digits, compresses it, and shows what came of it. Takes about a minute."""
    screen: Screen = context.obj
    folder = output_folder(out)
    screen.say("[bold]penjing demo[/]: a network that reads handwritten digits, made smaller and faster\n")
    start = time.monotonic()
    _tell(screen, start, "1. training the network on scikit-learn's digits; a fifth is held out to measure on")

    import torch

    import penjing as pj
    from penjing.cli import views
    from penjing.cli.digits import DigitsNet
    from penjing.cli.targets import installed_targets
    from penjing.data import digits

    targets = installed_targets(("onnxruntime", "openvino"))
    train, test = digits("train"), digits("test")
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # so small a network only waits for a second thread, long on a busy machine
    raw = pj.capture(DigitsNet(), inputs=(train.tensors[0][:2],), name="digits")
    teach = pj.Recipe(pj.Finetune(epochs=8, lr=0.1))
    original = pj.compress(raw, teach, data=train, task="classification", seed=seed, progress=screen).network

    recipe = pj.Recipe(
        pj.PruneChannels(ratio=0.5),
        pj.Finetune(epochs=6, lr=0.05, teacher="original"),
        pj.Quantize(weights="int8", activations="int8"),
    )
    _tell(
        screen, start, "2. compressing it: half of the channels out, taught again by the original, then 8-bit integers"
    )
    result = pj.compress(original, recipe, data=train, task="classification", test=test, seed=seed, progress=screen)

    names = " and ".join(views.pretty(t.runtime) for t in targets)
    _tell(screen, start, f"3. measuring both, taking turns, on {names}")
    report = pj.evaluate(
        result.network,
        test,
        baseline=original,
        target=targets,
        task="classification",
        steps=result.steps,
        plans=result.plans,
        seed=seed,
        progress=screen,
    )
    pj.deploy(result.network, target=targets, out=folder / "bundle", report=report, recipe=recipe)
    _tell(screen, start, "4. packing both for the wire")
    pj.pack(original, folder / "original.penjing")
    pj.pack(result.network, folder / "digits.penjing")
    seconds = time.monotonic() - start
    found = report.to_dict()
    screen.say()
    screen.say(_summary(found["targets"]))
    for sentence in views.warnings(found):
        screen.warn(sentence)
    _next(screen, folder, seconds)
    screen.emit({**found, "out": str(folder), "seconds": seconds})
    return 0


def _tell(screen: Screen, start: float, text: str) -> None:
    screen.say(f"[dim]{time.monotonic() - start:4.0f} s[/]  {text}")


def _summary(targets: list[dict[str, Any]]) -> Table:
    """One table: what is the same everywhere first, then what every runtime makes of it."""
    from penjing.cli import views

    made = table("What came of it")
    made.caption, made.caption_justify = "f32: numbers of 32 bits; int8: whole numbers of 8 bits", "left"
    for column in ("", "before", "after", "change"):
        made.add_column(column, justify="right" if column in ("before", "after") else "left")
    for line in views.lines(targets[0]):
        if line[0] in views.EVERYWHERE:
            made.add_row(line[0], line[1], *line[-2:])
    for target in targets:
        made.add_section()
        heading = f"[bold]on {views.pretty(target['result']['runtime'])}[/]"
        made.add_row(heading, *(f"[dim]{target[m]['precision']}[/]" for m in ("best_uncompressed", "result")), "")
        for line in views.lines(target):
            if line[0] not in views.EVERYWHERE:
                made.add_row("  " + line[0], *line[-3:])
    return made


def _next(screen: Screen, folder: Path, seconds: float) -> None:
    screen.say(f"\nDone in {seconds:.0f} s. [bold]Where things are[/]")
    rows = (
        ("bundle/report.html", "the same numbers with their spread, step by step: open it in a browser"),
        ("bundle/", "what to ship: the files that the runtimes open, report, recipe, provenance"),
        ("digits.penjing", "the small network in one file for the wire; original.penjing is the large one"),
    )
    for name, what in rows:
        screen.line(f"  {f'{folder}/{name}':<{len(str(folder)) + 22}}{what}")
    screen.say("[bold]What to try next[/]")
    screen.line(f"  penjing inspect {folder}/digits.penjing")
    samples = "--data digits:test --task classification"
    screen.line(f"  penjing evaluate {folder}/bundle --baseline {folder}/original.penjing {samples}")
    screen.line("  penjing compress yours.py:build --data yours.py:train --test yours.py:test --task classification")
