"""deploy, pack, unpack: a network becomes a folder that is ready to ship, or one small file.

A bundle appears whole or not at all: it is written to a folder beside its place and renamed. What was measured is
what is shipped: with a Report, the very files that were evaluated go into the bundle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing import package
from penjing.compression import compress
from penjing.data import Data
from penjing.errors import BudgetError, InputError, OutputError, RecipeError
from penjing.evaluation import Report, data_digest, describe, environment
from penjing.evaluation.layering import layered
from penjing.files import appearing_folder
from penjing.methods import CodeWeights, SearchAmount
from penjing.network import Network
from penjing.package import onnx_model, refining
from penjing.package.layered import check as check_layers
from penjing.progress import SILENT, Progress
from penjing.recipe import Recipe
from penjing.report import render_html, render_markdown
from penjing.runtimes import RUNTIMES, Target
from penjing.task import Task, get_task

KIND = "penjing bundle"
VERSION = 1
PACKAGE = "network.penjing"
PROVENANCE = "provenance.json"
#: Rates that are tried until a metric only just holds.
_TRIALS = 10
#: How many times as far off outputs are judged too. Two roundings of ResNet-56 lose 0.07 and 0.29 points on images that
#: it was trained on, 0.29 and 0.55 on others, where this expects 0.40 and 0.75; stretching more changes little.
_STRETCH = 2.5

Targets = str | Target | Sequence[str | Target]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The folder that :func:`deploy` wrote.

    Attributes:
        path: the folder.
        artifacts: one row for each exported file, as in report.json: path, runtime, bytes, sha256, parity.
        provenance: versions, seeds, digests of what went in, and of every file in the folder.
        report: report.json; None if the bundle was made without an evaluation.
    """

    path: Path
    artifacts: tuple[dict[str, Any], ...]
    provenance: dict[str, Any]
    report: dict[str, Any] | None = None

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = True) -> Bundle:
        """Open a bundle; ``verify`` compares every file with its digest.

        Raises:
            InputError: no bundle, or a file is missing or was changed.
        """
        path = Path(path)
        provenance = _provenance(path)
        if verify:
            for name, expected in provenance["files"].items():
                file = path / name
                if not file.is_file():
                    raise InputError(f"the bundle {path} lacks its file {name}", hint="deploy it again")
                if _sha256(file) != expected:
                    raise InputError(
                        f"{name} in the bundle {path} is not the file that was written", hint="deploy it again"
                    )
        report = path / "report.json"
        return cls(
            path=path,
            artifacts=tuple(provenance["artifacts"]),
            provenance=provenance,
            report=json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None,
        )

    def network(self) -> Network:
        """The deployed network itself, ready for more compression or another target."""
        return unpack(self.path / PACKAGE)

    def artifact(self, runtime: str) -> Path:
        """The exported file for a runtime.

        Raises:
            InputError: the bundle has none.
        """
        for row in self.artifacts:
            if row["runtime"] == runtime:
                return self.path / str(row["path"])
        known = ", ".join(sorted(str(row["runtime"]) for row in self.artifacts))
        raise InputError(f"the bundle {self.path} has no file for {runtime}", hint=f"it was deployed for {known}")


def deploy(
    network: Network,
    *,
    target: Targets,
    out: str | Path,
    report: Report | None = None,
    recipe: Recipe | None = None,
    data: Any = None,
    progress: Progress = SILENT,
) -> Bundle:
    """Write ``network`` as a bundle: artefacts, ``network.penjing``, report, recipe, provenance.

    Args:
        network: what to ship.
        target: for which runtimes; one file for each runtime.
        out: the folder; absent, empty, or an earlier bundle, which is replaced.
        report: the evaluation of this very network; its measured files are shipped, and its three views written.
        recipe: written as ``recipe.yaml``.
        data: the samples it was made with: their digest goes into the provenance, and files that are exported here
            hold the parity gate on them (on random ones of the captured look otherwise).
        progress: told what is going on.

    Raises:
        OutputError: ``out`` holds something else, or cannot be written.
        InputError: the report is of another network.
        ExportError, ParityError, TargetError, MissingExtraError: from the runtimes. Nothing is left behind.
    """
    listed = Target.several(target)
    runtimes = list(dict.fromkeys(each.runtime for each in listed))
    described = describe(network)
    if report is not None and report.network.get("digest") != described["digest"]:
        raise InputError(
            "the report is of another network than the one to deploy", hint="evaluate this network, or omit report="
        )
    samples = None if data is None else Data(data)
    with appearing_folder(Path(out), ours=_is_bundle) as folder:
        artifacts = [_artifact(network, runtime, folder, report, samples, progress) for runtime in runtimes]
        pack(network, folder / PACKAGE)
        views = None if report is None else _write_report(report, artifacts, folder)
        if recipe is not None:
            recipe.dump(folder / "recipe.yaml")
        files = {each.name: _sha256(each) for each in sorted(folder.iterdir())}
        provenance = {
            "kind": KIND,
            "version": VERSION,
            "network": described,
            "targets": [str(each) for each in listed],
            "artifacts": artifacts,
            "recipe": None if recipe is None else recipe.to_dict(),
            "seeds": _seeds(network, report),
            "inputs": _input_digests(samples, report),
            "history": list(network.history),
            "environment": environment(),
            "files": files,
        }
        text = json.dumps(provenance, indent=2, ensure_ascii=False, default=str) + "\n"
        (folder / PROVENANCE).write_text(text, encoding="utf-8")
    return Bundle(path=Path(out), artifacts=tuple(artifacts), provenance=json.loads(text), report=views)


def pack(
    network: Network,
    path: str | Path,
    *,
    layout: str = "file",
    rate: float | None = None,
    max_drop: float | None = None,
    layers: int | None = None,
    target: str | Target | None = None,
    data: Any = None,
    task: str | Task | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> int:
    """Write ``network`` coded for the wire; returns its size in bytes.

    Bit for bit, unless one of two knobs chooses grids for few bytes first, without any training.

    Args:
        network: what to pack.
        path: where to.
        layout: ``"file"``, or ``"directory"``: a manifest and one file a part, for any static web server. The
            directory is absent, empty, or an earlier package, which is replaced.
        rate: as in ``CodeWeights``; ``data`` is looked at if it is given.
        max_drop: by how much ``task``'s metric may get worse on the half of the labelled samples in ``data`` that the
            grids were not fitted to, by a standard error, and on samples that the network was not trained on, as far
            as these tell (``SearchAmount.stretch``): points where it lies between 0 and 100 %, else its own unit.
        layers: coarse values of all tensors first, then what makes them exact, in so many steps (2 to 8): the network
            runs once the first layer is there. With ``data``, errors go where the outputs feel them least, and with
            ``task`` too, its metric after each layer is kept in the package.
        target: put the graph into the package as this runtime (onnxruntime, openvino) reads it too: a client needs
            no torch then, ``penjing.package.onnx_model`` puts the ``.onnx`` together. The parity gate is held.

    Raises:
        InputError: no Network, no path, another layout; layers out of range, or of a network in which nothing can be
            cut.
        RecipeError: both knobs, or one out of range; the network is quantized already.
        DataError: ``max_drop`` without labelled samples.
        BudgetError: no grid keeps the metric.
        TargetError, ExportError, ParityError, MissingExtraError: from the runtime.
        OutputError: it cannot be written there.
    """
    if not isinstance(network, Network):
        raise InputError(
            f"pack takes a Network, got {type(network).__name__}", hint="network = pj.capture(model, inputs=(x,))"
        )
    path = _path(path)
    package.directory.check(layout)
    layers = None if layers == 1 and layers is not True else layers
    if layers is not None:
        check_layers(layers)
    if rate is not None and max_drop is not None:
        raise RecipeError("pack takes rate or max_drop, got both", hint="max_drop finds a rate by itself")
    recipe: Recipe | None = None
    if rate is not None:
        recipe = Recipe(CodeWeights(rate=rate))
    elif max_drop is not None:
        recipe = Recipe(_within(max_drop, task))
    if recipe is not None:
        result = compress(network, recipe, data=data, task=task, seed=seed, progress=progress)
        if not result.plans[0].edits:
            raise BudgetError(
                f"no grids keep {network.name} within {max_drop:g} of its metric",
                hint="allow more, or give more samples",
            )
        network = result.network
    samples = None if data is None else Data(data)
    packed = *network.state(), {"name": network.name}
    if target is not None:
        packed = _for_client(network, Target.parse(target), samples)
    if layers is not None:
        coded = layered(network, layers, packed=packed, data=samples, task=get_task(task), progress=progress)
    else:
        topology, arrays, metadata = packed
        coded = package.encode(topology, arrays, metadata=metadata, progress=progress)
    return package.save(coded, path, layout=layout)


def _for_client(network: Network, target: Target, samples: Data | None) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The network's state and metadata, with the graph of a runtime's file, from which a client makes that file."""
    engine = RUNTIMES.get(target.runtime)
    engine.need()
    topology, arrays = network.state()
    graph, held = engine.skeleton(network, arrays, onnx_model.HELD)
    topology, arrays = onnx_model.joined(topology, graph), {**arrays, **held}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"network{engine.suffix}"
        file.write_bytes(onnx_model.assemble(topology, arrays))
        engine.verify(network, file, samples=None if samples is None else samples.first(32))
    return topology, arrays, {"name": network.name, "runtime": target.runtime}


def _within(drop: float, task: str | Task | None) -> SearchAmount:
    """The search for the fewest bytes that keep a task's metric."""
    if isinstance(drop, bool) or not isinstance(drop, int | float) or not 0 < drop < math.inf:
        raise RecipeError(f"pack: max_drop must be above 0, got {drop!r}", hint="0.5 allows half a point")
    known = get_task(task)
    if known is None:
        raise RecipeError("pack: max_drop needs a task to judge by, and none was given", hint="task='classification'")
    limit = f"{drop:f}" + ("%" if known.unit == "%" else "")
    floor = f"{known.metric}>=-{limit}" if known.higher_is_better else f"{known.metric}<=+{limit}"
    # By a standard error: of few samples some are right by chance. Stretched: samples are often those trained on.
    return SearchAmount(
        step=CodeWeights(rate=1.0),
        floor=floor,
        held_out=0.5,
        trials=_TRIALS,
        resolution=1e-4,
        errors=1.0,
        stretch=_STRETCH,
    )


def unpack(path: str | Path, *, layers: int | None = None) -> Network:
    """The network in a package: a ``.penjing`` file or a directory.

    Args:
        path: of the package; with ``layers`` also the folder of a pull that is not done.
        layers: only so many of its quality layers: the same graph, coarser values. Parts of others may be missing.

    Raises:
        InputError: no path, there is no such file; layers below 1.
        PackageError: it is not a package, damaged, or too new; a part is missing.
    """
    path = _path(path)
    if not path.exists():
        raise InputError(f"there is no file {path}", hint="a package is what pack or deploy wrote")
    topology, arrays, _ = package.read(path) if layers is None else refining.read(path, layers=layers)
    return Network.from_state(topology, arrays)


def _path(path: str | Path) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"a path is a str or a Path, got {type(path).__name__}", hint="'net.penjing'")
    return Path(path)


def _is_bundle(folder: Path) -> bool:
    try:
        _provenance(folder)
    except InputError:
        return False
    return True


def _artifact(
    network: Network, runtime: str, folder: Path, report: Report | None, samples: Data | None, progress: Progress
) -> dict[str, Any]:
    engine = RUNTIMES.get(runtime)
    name = f"network-{runtime}{engine.suffix}"
    if report is not None and report.files is not None:
        for row in report.artifacts:
            if row["runtime"] == runtime and report.files.copy(row["path"], folder / name):
                if _sha256(folder / name) == row["sha256"]:
                    return {**row, "path": name}
                raise OutputError(
                    f"the evaluated file for {runtime} changed before it was deployed", hint="evaluate again"
                )
    made = engine.export(
        network, folder / name, samples=None if samples is None else samples.first(32), progress=progress
    )
    return made.row()


def _write_report(report: Report, artifacts: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    described = report.to_dict()
    described["artifacts"] = list(artifacts)
    text = json.dumps(described, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(render_html(described), encoding="utf-8")
    (folder / "report.md").write_text(render_markdown(described), encoding="utf-8")
    return described


def _seeds(network: Network, report: Report | None) -> dict[str, Any]:
    steps = [event["seed"] for event in network.history if "seed" in event]
    return {"steps": steps, "evaluation": None if report is None else report.environment.get("seed")}


def _input_digests(samples: Data | None, report: Report | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if report is not None:
        found["measured_on"] = report.data
        found["baseline_network"] = report.network.get("baseline_digest")
    if samples is not None:
        found["data"] = data_digest(samples)
    return found


def _provenance(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a bundle", hint="a bundle is the folder that deploy wrote") from error
    fields = ("files", "artifacts")
    if not isinstance(found, dict) or found.get("kind") != KIND or any(field not in found for field in fields):
        raise InputError(f"{path} is not a bundle", hint="a bundle is the folder that deploy wrote")
    names = [*found["files"], *(str(row.get("path")) for row in found["artifacts"])]
    if any(name != Path(name).name for name in names):
        raise InputError(f"the bundle {path} names files outside of itself", hint="do not trust it")
    if found.get("version") != VERSION:
        raise InputError(f"the bundle {path} has version {found.get('version')}; this penjing reads {VERSION}")
    return found


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
