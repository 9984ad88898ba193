"""How to scale the channels of links so that grids fit the network better; the network computes the same.

- `equalize_weights`: what makes a channel and what reads it get the same range (cross-layer equalization: Nagel et al.
  2019, "Data-free quantization through weight equalization and bias correction", §4.1).
- `smooth`: large activations move into the weights that read them (Xiao et al. 2023, "SmoothQuant", equation 4).
- `awq`: channels that carry much get finer steps of the weights that read them, as far as that makes the error of
  those layers' outputs smaller (Lin et al. 2024, "AWQ", §3.2).

Each takes `links` and the network's `tensors`, which it updates in place, and gives the scale of every link.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from penjing.analysis.channel_scales import Link, Reader, column_maxima, rescaled
from penjing.analysis.lane import Lane
from penjing.analysis.reconstruct import Layer, as_rows, find_layers, rows_wanted
from penjing.network.network import Network
from penjing.progress import SILENT, Progress
from penjing.tensors.gptq import GridRule
from penjing.tensors.grids import fake_quantize

_ROUNDS, _CHANGE = 20, 1e-3
#: No channel is scaled by more than this, or by less than its inverse: biases and dead channels would run away.
_MOST = 100.0
#: Exponents between none and all of the activations' size that are tried.
_EXPONENTS = tuple(step / 20 for step in range(21))
_WORK = 2e9


@torch.no_grad()
def equalize_weights(links: Sequence[Link], tensors: dict[str, Tensor]) -> list[Tensor]:
    """Scales (channels,) of the links, which must be made by layers; all are gone through until nothing changes.

    s = √(r₁ r₂) / r₂, where r₁ is the range of the weights that make a channel and r₂ that of those that read it. A
    channel that either side leaves at zero keeps its scale.
    """
    total = [torch.ones(link.channels, dtype=torch.float64) for link in links]
    for _ in range(_ROUNDS):
        change = 0.0
        for place, link in enumerate(links):
            name, axis = link.tensors[0]
            made = tensors[name].abs().movedim(axis, 0).flatten(1).amax(1).double()
            read = torch.stack([column_maxima(r, tensors[r.weight], link.channels) for r in link.readers]).amax(0)
            wanted = torch.where((made > 0) & (read > 0), (made / read.double().clamp_min(1e-30)).sqrt(), 1.0)
            scale = (total[place] * wanted).clamp(1 / _MOST, _MOST) / total[place]
            total[place] *= scale
            tensors.update(rescaled(link, scale, tensors))
            change = max(change, float(scale.log().abs().max()))
        if change < _CHANGE:
            break
    return total


@torch.no_grad()
def smooth(
    network: Network,
    links: Sequence[Link],
    tensors: dict[str, Tensor],
    batches: Sequence[Mapping[str, Tensor]],
    alpha: float,
    progress: Progress = SILENT,
) -> list[Tensor]:
    """Scales s = max|x|^alpha / max|w|^(1 - alpha) by channel, over the samples and over all that read it."""
    scales = []
    for link, inputs in _inputs(network, links, batches, progress):
        largest = torch.zeros(link.channels, dtype=torch.float64)
        for reader, values in inputs:
            for x in values:
                largest = torch.maximum(largest, _by_channel(x.abs(), reader, link.channels).amax(1).double())
        read = torch.stack([column_maxima(r, tensors[r.weight], link.channels) for r in link.readers]).amax(0).double()
        useful = (largest > 0) & (read > 0)
        wanted = largest.clamp_min(1e-30) ** alpha / read.clamp_min(1e-30) ** (1 - alpha)
        scales.append(_centred(torch.where(useful, wanted, _middle(wanted, useful))))
        tensors.update(rescaled(link, scales[-1], tensors))
    return scales


@torch.no_grad()
def awq(
    network: Network,
    links: Sequence[Link],
    tensors: dict[str, Tensor],
    batches: Sequence[Mapping[str, Tensor]],
    rule: GridRule,
    alpha: float | None = None,
    progress: Progress = SILENT,
) -> list[Tensor]:
    """Scales s = mean|x|^alpha by channel; `alpha` None: whichever of 21 makes the error of the readers' outputs least
    when their weights are rounded by `rule`. A link whose error no scale makes smaller keeps ones.

    Readers must be layers that `find_layers` knows.
    """
    layers = {layer.weight: layer for layer in find_layers(network)}
    scales = []
    for link, inputs in _inputs(network, links, batches, progress):
        size, rows = torch.zeros(link.channels, dtype=torch.float64), 0
        grams = []
        for reader, values in inputs:
            gram = _gram(layers[reader.weight], tensors[reader.weight], values)
            grams.append(gram / gram.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-30))
            for x in values:
                by_channel = _by_channel(x.abs(), reader, link.channels)
                size += by_channel.sum(1).double()
                rows += by_channel.shape[1]
        size = (size / max(rows, 1)).clamp_min(1e-8)
        best, least = torch.ones(link.channels, dtype=torch.float64), torch.inf
        for exponent in _EXPONENTS if alpha is None else (0.0, alpha):
            scale = _centred(size**exponent)
            error = sum(
                _error(tensors[r.weight], r, scale, gram, rule) for r, gram in zip(link.readers, grams, strict=True)
            )
            if error < least:
                best, least = scale, error
        scales.append(best)
        tensors.update(rescaled(link, best, tensors))
    return scales


def _inputs(
    network: Network, links: Sequence[Link], batches: Sequence[Mapping[str, Tensor]], progress: Progress
) -> Iterator[tuple[Link, list[tuple[Reader, list[Tensor]]]]]:
    """Each link with its readers' inputs, which scaling changes in a known way only: the original's will do."""
    sources = [{r.source.name for r in link.readers} for link in links]
    lane = Lane(network, batches, hold=set().union(*sources))
    with progress.task("scaling channels", len(links)) as advance:
        for place, link in enumerate(links):
            yield link, [(reader, lane.value(reader.source.name)) for reader in link.readers]
            for name in sources[place] - set().union(*sources[place + 1 :]):
                lane.release(name)
            advance(1)


def _by_channel(x: Tensor, reader: Reader, channels: int) -> Tensor:
    """The inputs of a reader as (channels, all that is in each)."""
    axis = x.ndim - 1 if reader.product else 1
    return x.movedim(axis, 0).reshape(channels, -1)


def _gram(layer: Layer, weight: Tensor, values: Sequence[Tensor]) -> Tensor:
    """The Gram matrices (G, D, D) of a layer's inputs."""
    generator = torch.Generator().manual_seed(0)
    limit = rows_wanted(weight.shape, layer.groups, _WORK) // max(len(values), 1) + 1
    total = torch.zeros(())
    for x in values:
        rows, _ = as_rows(layer, weight.shape, x, _outputs_of(layer, weight, x), layer.groups, limit, generator)
        total = total + rows.mT @ rows
    return total.double()


def _outputs_of(layer: Layer, weight: Tensor, x: Tensor) -> Tensor:
    """Zeros in the shape of what a layer gives for `x`: `as_rows` draws the same rows of both."""
    if not layer.convolution:
        return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])
    function = torch.conv2d if x.ndim == 4 else torch.conv1d
    geometry = layer.node.args[3:7]
    made: Tensor = function(x, torch.zeros_like(weight), None, *geometry)  # type: ignore[arg-type]
    return made


def _error(weight: Tensor, reader: Reader, scale: Tensor, gram: Tensor, rule: GridRule) -> float:
    """How far the outputs of a reader move when its scaled weights are rounded."""
    shape = [1] * weight.ndim
    shape[reader.axis] = -1
    columns = scale.repeat_interleave(reader.spread).to(weight.dtype).view(shape)
    rows = (weight * columns).flatten(1)
    off = (fake_quantize(rows, rule.grid(rows)).view(weight.shape) / columns - weight).double()
    off = off.reshape(gram.shape[0], -1, gram.shape[1])
    return float(((off @ gram) * off).sum())


def _middle(values: Tensor, useful: Tensor) -> Tensor:
    """The geometric mean of the useful ones, which those that nothing is known of take."""
    return values[useful].log().mean().exp() if bool(useful.any()) else torch.ones((), dtype=values.dtype)


def _centred(scale: Tensor) -> Tensor:
    """Scales about one: divided by the geometric mean of the largest and the smallest, and none out of bounds."""
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(1 / _MOST, _MOST)
