"""Evidence about single weights that only a running network gives: gradients, what weights multiply, movement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from penjing.analysis.operators import CONVOLUTIONS, RECURRENT, convolution_form
from penjing.analysis.weights import Reader, Weight
from penjing.errors import DataError
from penjing.network.network import Network
from penjing.progress import SILENT, Progress
from penjing.training import Batch, Training, train

Samples = Iterable[tuple[Any, Any]]  #: batches of (inputs, labels)
Loss = Callable[[nn.Module, Any, Any], Tensor]  #: module, inputs, labels → a scalar
#: How often masks are drawn anew in a training.
_REDRAWN = 50
#: The share of a training after which the full sparsity is reached.
_RAMP = 0.7


def gradients(network: Network, batches: Samples, loss: Loss) -> Iterator[dict[str, Tensor]]:
    """The loss's gradients by parameter, in eval mode, one dictionary a batch, made as they are asked for.

    They belong to the next batch as soon as that is asked for. Raises DataError if they are not finite.
    """
    module = network.module()
    for inputs, labels in batches:
        module.zero_grad(set_to_none=True)
        torch.autograd.backward(loss(module, inputs, labels))
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
        if not all(bool(torch.isfinite(g).all()) for g in found.values()):
            raise DataError(
                "the gradients of the loss are NaN or infinite on these samples",
                hint="look for NaN in samples and labels",
            )
        yield found


def gradient_sizes(
    network: Network, names: Sequence[str], batches: Samples, loss: Loss, progress: Progress = SILENT
) -> dict[str, Tensor]:
    """The root mean square, over batches, of the loss's gradient by parameter, in eval mode."""
    tensors = network.tensors()
    squares = {name: torch.zeros(tensors[name].shape) for name in names}
    count = 0
    with progress.task("looking at gradients", None) as advance:
        for found in gradients(network, batches, loss):
            for name, square in squares.items():
                square += found[name].float().square()
            count += 1
            advance(1)
    return {name: square.div_(max(count, 1)).sqrt_() for name, square in squares.items()}


# ------------------------------------------------------------------------------------------------------------ inputs
def input_norms(
    network: Network, weights: Iterable[Weight], batches: Sequence[Mapping[str, Tensor]], progress: Progress = SILENT
) -> dict[str, Tensor]:
    """For each weight the Euclidean norm, over samples and positions, of what it multiplies, in the weight's shape.

    A layer is linear in its weight: of the layer at squared inputs, the gradient of the summed outputs is just the sum
    of the squares that each weight multiplies, whatever the stride, padding, dilation and groups. Recurrent layers,
    which hide their inner values, are left out.
    """
    watcher = _Watcher(network.graph_module, list(weights))
    with progress.task("watching what weights multiply", len(batches)) as advance, torch.no_grad():
        for batch in batches:
            watcher.run(*batch.values())
            advance(1)
    return {name: total.sqrt() for name, total in watcher.sums.items()}


class _Watcher(fx.Interpreter):
    """Runs a graph and adds up the squares of what each weight multiplies."""

    def __init__(self, module: fx.GraphModule, weights: Sequence[Weight]) -> None:
        super().__init__(module)
        self.sums: dict[str, Tensor] = {}
        self.readers: dict[fx.Node, list[tuple[str, Reader]]] = {}
        for weight in weights:
            for reader in weight.readers:
                if reader.operator not in RECURRENT:
                    self.readers.setdefault(reader.node, []).append((weight.name, reader))

    def run_node(self, n: fx.Node) -> Any:
        for name, reader in self.readers.get(n, ()):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            place = reader.place
            if place is not None:
                squares = _squares(reader, place, args, kwargs, self.env[reader.source])
                self.sums[name] = self.sums[name] + squares if name in self.sums else squares
        return super().run_node(n)


def _squares(reader: Reader, place: int, args: tuple[Any, ...], kwargs: dict[str, Any], stored: Tensor) -> Tensor:
    """The sum of the squares of what each entry of `stored` multiplies in one call of a layer."""
    squared = [a.float().square() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    if reader.operator == "aten::linear" and not reader.through:
        return squared[0].flatten(0, -2).sum(0).expand(stored.shape)
    alike = reader.operator in CONVOLUTIONS and not reader.through and convolution_form(reader.node) == (False, 1)
    # All outputs of such a layer read the same: one of them is enough.
    weight = torch.zeros_like(stored[:1] if alike else stored, dtype=torch.float32, requires_grad=True)
    if reader.operator in CONVOLUTIONS and len(squared) > 2:
        squared[2] = None
    with torch.enable_grad():
        squared[place] = reader.seen(weight)
        function: Any = reader.node.target
        (found,) = torch.autograd.grad(function(*squared, **kwargs).sum(), weight)
    return found.expand(stored.shape)


# ---------------------------------------------------------------------------------------------------------- movement
def movement(
    network: Network,
    names: Sequence[str],
    batches: Callable[[int], Iterator[Batch]],
    loss: Loss,
    choose: Callable[[Mapping[str, Tensor], float], Mapping[str, Tensor]],
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Tensor]:
    """-Σ w·∂L/∂w by parameter over a training of `steps` batches under masks that grow with it: large where weights
    move away from zero (Sanh et al. 2020, "Movement pruning", §4: the gradient is taken at the masked weights and
    handed straight through, so that weights that are missed come back; the sparsity rises along a cubic).

    `choose(scores, part)` gives the masks at the share `part` (0 to 1) of the final sparsity. `network` is not changed:
    a copy is trained.
    """
    module = network.module()
    weights = {name: module.get_parameter(name) for name in names}
    scores = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
    dense: dict[str, Tensor] = {}
    masks: Mapping[str, Tensor] = {}
    step = 0

    def arrived(name: str, weight: nn.Parameter) -> None:
        weight.data = dense.pop(name)
        if weight.grad is not None:
            scores[name] = scores[name].to(weight.device) - (weight.grad * weight.data).float()
            weight.grad.mul_(masks[name].to(weight.device))

    def masked_loss(running: nn.Module, batch: Batch) -> Tensor:
        nonlocal masks, step
        for name in list(dense):  # the batch before did not reach it
            weights[name].data = dense.pop(name)
        if step % max(1, steps // _REDRAWN) == 0:
            masks = choose(scores, 1 - (1 - min(1.0, step / max(_RAMP * steps, 1))) ** 3)
        step += 1
        for name, weight in weights.items():
            dense[name] = weight.data
            weight.data = weight.data * masks[name].to(weight.device)
        return loss(running, batch[0], batch[1])

    for name, weight in weights.items():
        weight.register_post_accumulate_grad_hook(lambda w, name=name: arrived(name, w))  # type: ignore[no-untyped-call]
    train(
        module,
        batches,
        masked_loss,
        Training(epochs=1, lr=lr, weight_decay=0.0, seed=seed),
        steps_per_epoch=steps,
        alone=True,
        keep=network.masks,
        progress=progress,
        description="watching weights move",
    )
    return {name: score.cpu() for name, score in scores.items()}


__all__ = ["gradient_sizes", "gradients", "input_norms", "movement"]
