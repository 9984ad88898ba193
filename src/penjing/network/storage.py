"""One safetensors file that holds named arrays and a JSON text: how Networks and Plans are kept on disk without
pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from penjing.errors import InputError, OutputError
from penjing.files import appearing


def write(path: Path, text: str, arrays: Mapping[str, np.ndarray[Any, Any]], *, key: str) -> None:
    """Writes `arrays` with `text` under `key` in the header; the file appears whole or not at all (OutputError)."""
    held = {n: np.ascontiguousarray(a).reshape(a.shape) for n, a in arrays.items()}
    with appearing(path) as aside:
        try:
            save_file(held, aside, metadata={key: text})
        except SafetensorError as error:  # how the library tells of a full disk
            raise OutputError(f"cannot write {path}: {error}", hint="is there room, and permission?") from error


def read(path: Path, *, key: str) -> tuple[str, dict[str, np.ndarray[Any, Any]]]:
    """Text and arrays that `write` wrote under `key`; raises InputError for a file that is missing or something
    else.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if key not in metadata:
                raise InputError(
                    f"{path} holds tensors but no {key.removeprefix('penjing.')}",
                    hint="a state dict alone has no topology: load it into its nn.Module and capture that",
                )
            return metadata[key], {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error})") from error
