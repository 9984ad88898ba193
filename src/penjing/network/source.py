"""`file.py:callable` and `package.module:callable`: how networks and data are named on a command line."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from penjing.errors import InputError
from penjing.registry import did_you_mean

_FOREIGN = tuple(
    str(path)
    for path in (
        Path(__file__).resolve().parents[1],
        *(Path(sysconfig.get_paths()[kind]).resolve() for kind in ("stdlib", "purelib", "platlib")),
    )
)


def line_of(error: BaseException) -> str | None:
    """`net.py, line 12: x = y`: the innermost line of the user's own code that led to `error`."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}: {(error.text or '').strip()}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and not str(Path(frame.filename).resolve()).startswith(_FOREIGN)
    ]
    if not frames:
        return None
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}: {(frames[-1].line or '').strip()}"


def load_callable(text: str) -> Callable[[], Any]:
    """The function or class that `text` names; raises InputError with a "did you mean" for one that is not there."""
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise InputError(f"'{text}' is not of the form file.py:callable or package.module:callable")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    found = getattr(module, name, None)
    if found is None:
        public = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
        raise InputError(f"{place} has nothing called '{name}'", hint=did_you_mean(name, public))
    if not callable(found):
        raise InputError(f"'{name}' of {place} is a {type(found).__name__}, not something that can be called")

    def call() -> Any:
        try:
            return found()
        except Exception as error:
            raise InputError(f"calling {text} raised {type(error).__name__}: {error}", hint=line_of(error)) from error

    return call


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    resolved = path.resolve()
    name = f"penjing_user_{resolved.stem}_{abs(hash(str(resolved))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(resolved.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"running {path} raised {type(error).__name__}: {error}", hint=line_of(error)) from error
    finally:
        sys.path.remove(str(resolved.parent))
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"there is no module called '{error.name}'", hint="is it installed in this environment?"
        ) from None
    except Exception as error:
        raise InputError(f"importing {name} raised {type(error).__name__}: {error}", hint=line_of(error)) from error
