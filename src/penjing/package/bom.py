"""The bill of materials of a package: CycloneDX 1.6, a machine-learning-model with its pedigree and model card.

The document is cyclonedx-python-lib's; the model card is added to it, as the library has no class for that part of the
standard. The same package gives the same document: it holds no time, and its serial number comes from the digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penjing._version import __version__
from penjing.errors import InputError, MissingExtraError
from penjing.files import appearing
from penjing.package import archive, layout, provenance

try:
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType, Pedigree
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion
except ImportError as error:
    raise MissingExtraError(
        "a bill of materials needs the package cyclonedx-python-lib", hint="pip install 'penjing[secure]'"
    ) from error


def document(
    package: str | os.PathLike[str],
    *,
    network: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The bill of materials of a package, as plain JSON values.

    network: what report.json says of it (task, inputs, outputs); report: a report.json, whose figures become
    performance metrics. Raises PackageError for what is no package, or sealed.
    """
    path = Path(package)
    data = archive.load(path)
    header = layout.parse_header(data)
    chain = provenance.trace_package(data)
    card = _card(network or {}, report, chain.digest)
    sha = hashlib.sha256(data).hexdigest()
    ancestors = [] if chain.original in (None, chain.digest) else [_original(chain)]
    model = Component(
        name=chain.name or path.stem,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=chain.digest[:12],
        bom_ref=f"network-{chain.digest}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha)],
        pedigree=Pedigree(ancestors=ancestors, notes=str(chain)),
        properties=_properties(chain, {"package:digest": header.digest.hex(), "package:bytes": str(len(data))}),
    )
    tool = Component(name="penjing", type=ComponentType.APPLICATION, version=__version__)
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"urn:sha256:{sha}"), metadata=BomMetaData(component=model))
    bom.metadata.tools.components.add(tool)
    written = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string()
    found: dict[str, Any] = json.loads(written)
    found["metadata"].pop("timestamp", None)  # the time of writing says nothing about the package
    if card:
        found["metadata"]["component"]["modelCard"] = card
    return found


def write(
    out: str | os.PathLike[str],
    package: str | os.PathLike[str],
    *,
    network: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
) -> None:
    """Writes `document` as a file."""
    text = json.dumps(document(package, network=network, report=report), indent=2)
    with appearing(out) as aside:
        aside.write_text(text + "\n", encoding="utf8")


def _original(chain: provenance.Provenance) -> Component:
    return Component(
        name=chain.name or "original",
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=str(chain.original)[:12],
        bom_ref=f"network-{chain.original}",
        description="the network that the first step started from",
        properties=[Property(name="penjing:network:digest", value=chain.original)],
    )


def _properties(chain: provenance.Provenance, more: Mapping[str, str]) -> list[Property]:
    """The digest, and each step with its settings, in order."""
    held = {"network:digest": chain.digest, **more}
    for number, link in enumerate(chain.links, 1):
        held[f"history:{number:03}"] = json.dumps({"name": link.name, "settings": link.settings, "seed": link.seed})
    return [Property(name=f"penjing:{name}", value=value) for name, value in held.items()]


def _card(network: Mapping[str, Any], report: Mapping[str, Any] | None, digest: str) -> dict[str, Any]:
    card: dict[str, Any] = {}
    parameters = {
        "task": network.get("task"),
        "inputs": [{"format": _look(i)} for i in network.get("inputs", ())],
        "outputs": [{"format": str(name)} for name in network.get("outputs", ())],
    }
    if held := {k: v for k, v in parameters.items() if v}:
        card["modelParameters"] = held
    if report is not None:
        try:
            of, metrics = report["network"]["digest"], _metrics(report["result"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError("the report is no report.json", hint="penjing evaluate writes one") from error
        if of != digest:
            raise InputError("the report is of another network than the package", hint="evaluate this one")
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    return card


def _look(spec: Mapping[str, Any]) -> str:
    shape: Sequence[Any] = spec.get("shape", ())
    return f"{spec.get('name')}: {'×'.join(map(str, shape)) or 'scalar'} {spec.get('dtype')}"


def _metrics(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The measurement's figures, each with the runtime that gave it."""
    where = f"{result.get('runtime')}, {result.get('precision')}"
    found: list[dict[str, Any]] = []
    metric = result.get("metric") or {}
    if metric.get("value") is not None:
        row: dict[str, Any] = {"type": str(metric.get("name")), "value": str(metric["value"]), "slice": where}
        low, high = metric.get("ci95") or (None, None)
        if low is not None and high is not None:
            row["confidenceInterval"] = {"lowerBound": str(low), "upperBound": str(high)}
        found.append(row)
    latency = (result.get("latency_ms") or {}).get("p50")
    figures = {"latency_ms p50": latency} | {
        key: result.get(key) for key in ("peak_memory_bytes", "file_bytes", "wire_bytes", "parameters", "macs")
    }
    found += [{"type": k, "value": str(v), "slice": where} for k, v in figures.items() if v is not None]
    return found
