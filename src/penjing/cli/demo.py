"""penjing demo: the whole journey on handwritten digits, in about a minute."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from penjing.cli import options, views
from penjing.cli.outputs import output_folder
from penjing.cli.screen import Screen

_PRETTY = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch"}


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

    import penjing as pj
    from penjing.cli.digits import DigitsNet, digits
    from penjing.cli.targets import installed_targets

    targets = installed_targets(("onnxruntime", "openvino"))
    train, test = digits(seed)
    import torch

    torch.manual_seed(seed)
    raw = pj.capture(DigitsNet(), inputs=(train.tensors[0][:2],), name="digits")
    teach = pj.Recipe(pj.Finetune(epochs=15, lr=0.1))
    _tell(screen, start, "1. training the network on 1347 digits (450 are held out)")
    original = pj.compress(raw, teach, data=train, task="classification", seed=seed, progress=screen).network

    recipe = pj.Recipe(
        pj.PruneChannels(ratio=0.5),
        pj.Finetune(epochs=10, lr=0.05, teacher="original"),
        pj.Quantize(weights="int8", activations="int8"),
    )
    _tell(
        screen, start, "2. compressing it: half of the channels out, taught again by the original, then 8-bit integers"
    )
    result = pj.compress(original, recipe, data=train, task="classification", test=test, seed=seed, progress=screen)

    reports: list[dict[str, Any]] = []
    for target in targets:
        name = _PRETTY.get(target.runtime, target.runtime)
        _tell(screen, start, f"3. measuring both on {name}, taking turns, and writing the bundle")
        report = pj.evaluate(
            result.network,
            test,
            baseline=original,
            target=target,
            task="classification",
            steps=result.steps,
            progress=screen,
        )
        pj.deploy(result.network, target=target, out=folder / target.runtime, report=report, recipe=recipe)
        reports.append(report.to_dict())
    _tell(screen, start, "4. packing both for the wire")
    pj.pack(original, folder / "original.penjing")
    pj.pack(result.network, folder / "digits.penjing")
    seconds = time.monotonic() - start
    screen.say()
    screen.say(_summary(reports))
    for report in reports:
        for sentence in views.honest_words(report):
            screen.say(f"[yellow]{sentence}[/]")
    _next(screen, folder, targets[0].runtime, seconds)
    screen.emit({"schema": 1, "out": str(folder), "seconds": seconds, "reports": reports})
    return 0


def _tell(screen: Screen, start: float, text: str) -> None:
    screen.say(f"[dim]{time.monotonic() - start:4.0f} s[/]  {text}")


def _summary(reports: list[dict[str, Any]]) -> Table:
    """One table: what is the same everywhere first, then speed and accuracy on every runtime."""
    table = Table(header_style="bold", pad_edge=False)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("change")
    first = reports[0]
    for row in views.rows(first.get("baseline"), first["result"]):
        if row[0] in views.EVERYWHERE:
            table.add_row(*row)
    for report in reports:
        table.add_section()
        runtime = _PRETTY.get(report["result"]["runtime"], report["result"]["runtime"])
        precision = f"{report['baseline'].get('precision')}", f"{report['result'].get('precision')}"
        table.add_row(f"[bold]on {runtime}[/]", *(f"[dim]{p}[/]" for p in precision), "")
        for row in views.rows(report.get("baseline"), report["result"]):
            if row[0] not in views.EVERYWHERE:
                table.add_row("  " + row[0], *row[1:])
    return table


def _next(screen: Screen, folder: Path, runtime: str, seconds: float) -> None:
    screen.say(f"\nDone in {seconds:.0f} s. [bold]Where things are[/]")
    screen.line(
        f"  {folder}/{runtime}/report.html    the same numbers with their spread, step by step: open it in a browser"
    )
    screen.line(
        f"  {folder}/{runtime}/               the bundle: the file that {runtime} opens, report, recipe, provenance"
    )
    screen.line(f"  {folder}/digits.penjing           the network in one small file for the wire")
    screen.say("[bold]What to try next[/]")
    screen.line(f"  penjing inspect {folder}/digits.penjing")
    screen.line(f"  penjing unpack {folder}/digits.penjing again.safetensors")
    screen.line("  penjing compress yours.py:build --data yours.py:train --test yours.py:test --task classification")
