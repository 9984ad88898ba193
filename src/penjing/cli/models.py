"""MODEL arguments of the command line: every way to name a network, in one place.

file.py:callable, package.module:callable    a function without arguments that returns an nn.Module (or a Network)
net.pt2                                      a saved torch.export program
net.safetensors                              what Network.save wrote
net.penjing                                  a package; also a folder, in the directory layout
folder/                                      a bundle that penjing compress or deploy wrote
"""

from __future__ import annotations

import ast
import difflib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.errors import CaptureError, InputError

if TYPE_CHECKING:
    import torch

    from penjing.data import Data
    from penjing.network import Network

FORMS = "file.py:callable, package.module:callable, net.pt2, net.safetensors, net.penjing or a bundle's folder"
_LATER = {".onnx": "ONNX files", ".keras": "Keras files", ".h5": "Keras files", ".tflite": "TFLite files"}
_PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".th", ".pkl"}


def load_network(text: str, *, data: Data | None = None, shapes: list[str] | None = None) -> Network:
    """The network that MODEL `text` names.

    Code is captured with two samples of `data`, or with random inputs of `shapes` ("1x3x32x32[:dtype]", one for each
    input). Raises InputError where `text` names nothing usable, CaptureError where its module cannot be captured.
    """
    path = Path(text).expanduser()
    network = _from_file(text, path) if ":" not in text or path.exists() else _from_code(text, data, shapes or [])
    _refuse_nan(network, text)
    return network


def load_teachers(texts: list[str], *, data: Data | None = None) -> dict[str, list[Network]]:
    """The networks that NAME=MODEL options name, by NAME; a NAME that stands several times has several."""
    found: dict[str, list[Network]] = {}
    for text in texts:
        name, sign, model = text.partition("=")
        if not name or not sign or not model:
            raise InputError(f"--teacher takes NAME=MODEL, got {text!r}", hint="for example --teacher big=net.py:build")
        found.setdefault(name, []).append(load_network(model, data=data))
    return found


def _from_file(text: str, path: Path) -> Network:
    import penjing as pj
    from penjing.package.directory import is_package

    if path.suffix in _LATER:
        raise InputError(f"{text}: {_LATER[path.suffix]} cannot be read yet", hint=f"for now MODEL is {FORMS}")
    if not path.exists():
        raise InputError(f"there is no file {text}", hint=_nearest(path) or f"MODEL is {FORMS}")
    if path.is_dir() and is_package(path):
        return pj.unpack(path)
    if path.is_dir():
        return _from_folder(text, path)
    if path.suffix == ".py":
        raise InputError(f"{text} names a file but no function in it", hint=f"write {text}:NAME{_names_in(path)}")
    if path.suffix == ".penjing":
        return pj.unpack(path)
    if path.suffix == ".safetensors":
        return pj.Network.load(path)
    if path.suffix == ".pt2":
        return pj.capture(text)
    if path.suffix in _PICKLES:
        raise InputError(
            f"{text} is a pickle: it holds weights or code, not a network that can be opened safely",
            hint="write a function that builds the module and loads the weights, and name it as file.py:function",
        )
    raise InputError(f"{text} is no network that penjing can read", hint=f"MODEL is {FORMS}")


def _from_folder(text: str, path: Path) -> Network:
    import penjing as pj

    if (path / "provenance.json").exists():
        return pj.Bundle.load(path).network()
    if (path / "config.json").exists():
        raise InputError(
            f"{text} is a transformers folder, which cannot be read yet",
            hint="write a function that returns the model (from_pretrained) and name it as file.py:function",
        )
    inner = sorted(p.parent.name for p in path.glob("*/provenance.json"))
    raise InputError(
        f"the folder {text} is not a bundle",
        hint=f"name one of the bundles in it: {', '.join(inner)}"
        if inner
        else "a bundle is what penjing compress or deploy wrote",
    )


def _from_code(text: str, data: Data | None, shapes: list[str]) -> Network:
    import penjing as pj

    try:
        return pj.capture(text, inputs=_example(data, shapes), name=text.rpartition(":")[2])
    except CaptureError as error:
        if error.message.startswith("expected an nn.Module"):
            got = error.message.rpartition(" ")[2]
            raise InputError(
                f"{text} returned {_article(got)}, not an nn.Module",
                hint="MODEL is a function without arguments that returns the module",
            ) from error
        if "no example inputs" in error.message:
            raise InputError(
                f"{text} needs example inputs to be captured",
                hint="add --input-shape 1x3x32x32 (once for each input), or --data",
            ) from error
        raise


# ---------------------------------------------------------------------------------------------------- inputs
def _example(data: Data | None, shapes: list[str]) -> Any:
    """Example inputs for capture: random ones of `shapes`, else two samples of `data`, else None."""
    if shapes:
        return tuple(_random(s) for s in shapes)
    return None if data is None else data.first(2)


def _random(shape: str) -> torch.Tensor:
    """A tensor for "1x3x32x32" or "8x128:int64": uniform in 0..1, integers 0 or 1."""
    import torch

    sizes, _, kind = shape.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    numbers = sizes.lower().split("x")
    if not isinstance(dtype, torch.dtype) or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise InputError(
            f"{shape!r} is not a shape", hint="write it as 1x3x32x32 or 1x128:int64: batch first, every size above 0"
        )
    generator = torch.Generator().manual_seed(0)
    size = [int(n) for n in numbers]
    if dtype.is_floating_point:
        return torch.rand(size, generator=generator).to(dtype)
    return torch.randint(0, 2, size, generator=generator).to(dtype)


def _refuse_nan(network: Network, text: str) -> None:
    """capture refuses NaN in modules; files can hold it too."""
    bad = [n for n in network.parameter_names if not _all_finite(network.tensors()[n])]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise InputError(
            f"{text} holds NaN or infinite numbers in {bad[0]}{more}",
            hint="check how the network was trained or loaded",
        )


def _all_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or not tensor.numel() or math.isfinite(float(tensor.detach().double().sum()))


# ---------------------------------------------------------------------------------------------------- words
def _nearest(path: Path) -> str | None:
    """A hint naming the most similar file beside `path`."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"did you mean {path.parent / near[0]}?" if near else None


def _names_in(path: Path) -> str:
    """An example of a function or class of a Python file, read without running it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""
    names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    return f", for example {path}:{names[0]}" if names else ""


def _article(noun: str) -> str:
    return "None" if noun == "NoneType" else f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
