"""Which units of a channel group the layers behind it can do without, judged on what those layers really read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from penjing.analysis.lane import Lane
from penjing.analysis.reconstruct import Layer, as_rows, find_layers, norm_scale, rows_wanted
from penjing.network.channels.groups import Group
from penjing.network.edits import SetWeights
from penjing.network.network import Network
from penjing.progress import SILENT, Progress
from penjing.tensors.least_squares import Consumer, Elimination, Moments, eliminate


@dataclass(frozen=True)
class Reader:
    """A layer that reads a group, as `eliminate` sees it: weights scaled by the norm behind, moments of its inputs."""

    layer: Layer
    moments: Moments
    consumer: Consumer


@torch.no_grad()
def watch_inputs(
    network: Network, weights: Sequence[str], batches: list[dict[str, Tensor]], progress: Progress = SILENT
) -> dict[str, tuple[Layer, Moments]]:
    """The layers with these weights and the moments of what they read, from one run over `batches`."""
    layers = [layer for layer in find_layers(network) if layer.weight in set(weights) and layer.groups == 1]
    lane = Lane(network, batches)
    seen: dict[str, tuple[Layer, Moments]] = {}
    generator = torch.Generator().manual_seed(0)
    with progress.task("watching what layers read", len(layers)) as advance:
        for layer in layers:
            source, shape = layer.node.args[0], lane.tensors[layer.weight].shape
            if not isinstance(source, fx.Node):
                continue
            moments = Moments(1, shape[1:].numel(), 1)
            limit = rows_wanted(shape, 1) // (4 * len(batches)) + 1
            axis = 1 if layer.convolution else -1
            # The outputs serve only to say how many positions there are; running on is needed for the layers behind
            # anyway.
            inputs, outputs = lane.value(source.name), lane.value(layer.node.name)
            for x, y in zip(inputs, outputs, strict=True):
                moments.add(*as_rows(layer, shape, x, y.narrow(axis, 0, 1), 1, limit, generator))
            seen[layer.weight] = (layer, moments)
            advance(1)
    return seen


def readers_of(group: Group, seen: Mapping[str, tuple[Layer, Moments]], tensors: Mapping[str, Tensor]) -> list[Reader]:
    """The layers behind `group` whose inputs were watched."""
    found = []
    for member in group.consumers:
        if member.dim != 1 or member.parameter not in seen:
            continue
        layer, moments = seen[member.parameter]
        weight = tensors[member.parameter].detach()
        kernel = weight[0, 0].numel()
        flat = weight.flatten(1).double() * norm_scale(layer, tensors)[:, None]
        gram = (moments.centred()[0] if _has_constant(layer) else moments.xx)[0] / max(moments.rows, 1)
        index = torch.as_tensor(member.indices)
        columns = (index[:, :, None] * kernel + torch.arange(kernel)).flatten(1)
        energy = float(((flat @ gram) * flat).sum())
        found.append(Reader(layer, moments, Consumer(gram, flat, columns, 1 / max(energy, 1e-12))))
    return found


def eliminate_units(
    readers: Sequence[Reader], keep: int, snapshot: int, order: Sequence[int] | None = None
) -> Elimination:
    """Units in the order the readers can do without them, and the readers' error as they go."""
    return eliminate([r.consumer for r in readers], order=order, keep=keep, snapshots=(snapshot,))


def without_units(
    readers: Sequence[Reader], weights: Sequence[Tensor], tensors: Mapping[str, Tensor]
) -> tuple[SetWeights, ...]:
    """Edits that give each reader the (scaled) weights of an Elimination, its constant following the inputs' means."""
    edits = []
    for reader, weight in zip(readers, weights, strict=True):
        layer, old = reader.layer, tensors[reader.layer.weight].detach()
        scale = norm_scale(layer, tensors)
        plain = weight / torch.where(scale == 0, torch.ones_like(scale), scale)[:, None]
        edits.append(SetWeights(parameter=layer.weight, value=plain.reshape(old.shape).to(old.dtype)))
        if not _has_constant(layer):
            continue
        mean = reader.moments.sum_x[0] / max(reader.moments.rows, 1)
        shift = (reader.consumer.weight - weight) @ mean
        name = str(layer.norm.args[2].target) if layer.norm is not None else str(layer.bias)  # type: ignore[union-attr]
        held = tensors[name].detach()
        edits.append(SetWeights(parameter=name, value=(held.double() + shift).to(held.dtype)))
    return tuple(edits)


def zeroed_units(group: Group, units: Sequence[int], tensors: Mapping[str, Tensor]) -> tuple[SetWeights, ...]:
    """Edits that silence units where they are made: rows, biases, gains and offsets become zero."""
    edits: dict[str, Tensor] = {}
    for member in group.members:
        if member.role == "consumer" or member.parameter.endswith(("running_mean", "running_var")):
            continue
        value = edits.get(member.parameter, tensors[member.parameter].detach()).clone()
        if value.is_floating_point():
            value.index_fill_(member.dim, torch.as_tensor(member.indices[list(units)]).flatten(), 0)
            edits[member.parameter] = value
    return tuple(SetWeights(parameter=name, value=value) for name, value in edits.items())


def _has_constant(layer: Layer) -> bool:
    return layer.norm is not None or layer.bias is not None
