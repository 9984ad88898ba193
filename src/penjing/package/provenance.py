"""Where a network comes from: the original, every step that it went through, and the digests in between."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from typing import Any

from penjing.digests import digest
from penjing.errors import PackageError
from penjing.package import archive
from penjing.package.claims import is_deep

_DIGEST = re.compile(r"[0-9a-f]{64}")
_WORD = re.compile(r"[A-Za-z][\w .-]{0,79}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """One event of a network's history. `before` and `after`: digests of the network (penjing.digests), where known."""

    name: str
    settings: dict[str, Any]
    seed: int | None
    before: str | None
    after: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """The chain from the original to a network.

    original: the digest of the network that the first step started from, which is the network itself where there was no
    step, and None where the history does not tell. Digests hold the history before them: each stands for all before it.
    """

    name: str
    original: str | None
    links: tuple[Link, ...]
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {**dataclasses.asdict(self), "links": [dataclasses.asdict(link) for link in self.links]}

    def __str__(self) -> str:
        lines = [
            f"{_shown(self.name)}: provenance",
            f"  original  {self.original or 'not known'}",
        ]
        for number, link in enumerate(self.links, 1):
            settings = ", ".join(f"{_word(k)}={_shown(v)}" for k, v in link.settings.items())
            seed = "" if link.seed is None else f", seed {link.seed}"
            lines.append(f"  {number:>3}. {link.name}({settings}){seed}")
            if link.after is not None:
                lines.append(f"       gave {link.after}")
        return "\n".join([*lines, f"  network   {self.digest}"])


def trace(topology: str, network_digest: str) -> Provenance:
    """The chain that a topology tells of. Raises PackageError where it holds no history of a network."""
    described = _described(topology)
    events = described.get("history", [])
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise PackageError(
            "the topology holds no history that can be read", hint="the package was made by a faulty writer"
        )
    before = [_digest(event.get("before")) for event in events]
    links = tuple(
        Link(
            name=_name(event),
            settings=_settings(event),
            seed=event["seed"] if type(event.get("seed")) is int else None,
            before=before[i],
            after=before[i + 1] if i + 1 < len(events) else network_digest,
        )
        for i, event in enumerate(events)
    )
    stepped = [i for i, event in enumerate(events) if event.get("event") != "capture"]  # steps, and grids of a parent
    original = before[stepped[0]] if stepped else network_digest
    return Provenance(name=str(described.get("name", "")), original=original, links=links, digest=network_digest)


def read(path: str | os.PathLike[str]) -> Provenance:
    """The chain of the network in a package. Raises PackageError."""
    return trace_package(archive.load(path))


def trace_package(data: bytes) -> Provenance:
    """The chain of the network in a package in memory. Raises PackageError."""
    topology, arrays, _ = archive.decode(data)
    return trace(topology, digest(topology, arrays))


def _described(topology: str) -> dict[str, Any]:
    try:
        described = json.loads(topology)
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict) or is_deep(described):
        raise PackageError("the topology is no network's", hint="packages of networks are made by penjing pack")
    return described


def _name(event: dict[str, Any]) -> str:
    """The step's or the event's name."""
    return _word(event.get("name") or event.get("event"))


def _word(value: Any) -> str:
    """A word as it is; anything else quoted, as it comes from a file and goes to a terminal."""
    return value if isinstance(value, str) and _WORD.fullmatch(value) else json.dumps(value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)


def _settings(event: dict[str, Any]) -> dict[str, Any]:
    held = event.get("settings")
    if isinstance(held, dict):
        return held
    return {k: v for k, v in event.items() if k not in ("event", "name", "seed", "before")}


def _digest(value: Any) -> str | None:
    return value if isinstance(value, str) and _DIGEST.fullmatch(value) else None
