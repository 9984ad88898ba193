"""The arguments that several verbs share, spelled once."""

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The network: file.py:callable, package.module:callable, net.pt2, net.safetensors, net.penjing "
        "or a bundle.",
    ),
]
RequiredData = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help="Samples: file.py:callable (a Dataset or DataLoader), samples.npz (arrays x and y), "
        "a folder of class folders of images, or digits.",
    ),
]
OptionalData = Annotated[
    str | None,
    typer.Option("--data", metavar="DATA", help="Samples, as in penjing compress; example inputs come from them."),
]
Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="NAME",
        help="What good means: classification, regression, segmentation, language-modelling, reconstruction. "
        "Without it, labels are never looked at.",
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="TARGET",
        help="The runtime, with options: onnxruntime, openvino:threads=2,precision=f32. Give it again for more.",
    ),
]
Teachers = Annotated[
    list[str] | None,
    typer.Option(
        "--teacher",
        metavar="NAME=MODEL",
        help="A further network that Steps call NAME: a teacher, a peer, a checkpoint. Give it again for more; the "
        "same NAME again makes several of it.",
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="SHAPE",
        help="Where there is no data: the shape of an input, batch first, as 1x3x32x32 or 1x128:int64; "
        "once for each input.",
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        help="A folder to keep the curves in: the same network, samples and settings are then read, not measured.",
    ),
]
Resume = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="DIR",
        help="A folder to keep what is reached in: a run that was killed goes on there when it is started again.",
    ),
]
Trackers = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="NAME",
        help="Draw the curves of all trainings in tensorboard, wandb (offline) or mlflow, under the folder of "
        "--resume. Give it again for more.",
    ),
]
Layout = Annotated[
    str,
    typer.Option(
        "--layout",
        metavar="LAYOUT",
        help="file, or directory: a manifest and one file a part, for any static web server.",
    ),
]
Layers = Annotated[
    int | None,
    typer.Option("--layers", min=1, metavar="N", help="Only the first N quality layers, which are a network already."),
]
Signature = Annotated[
    str | None,
    typer.Option(
        "--signature", metavar="FILE", help="The signature; default: beside the package, ending in .dsse.json."
    ),
]
AtLeast = Annotated[
    int | None, typer.Option("--at-least", metavar="N", min=0, help="Refuse releases older than this one.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Makes the run repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]
