from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from penjing.errors import DataError, RecipeError
from penjing.training import Batch, Diverged, Training, augment, call, train

X = torch.randn(96, 6, generator=torch.Generator().manual_seed(3))
Y = X @ torch.randn(6, 2, generator=torch.Generator().manual_seed(4))


def batches(epoch: int) -> Iterator[Batch]:
    order = torch.randperm(96, generator=torch.Generator().manual_seed(epoch))
    for chosen in order.split(16):
        yield X[chosen], Y[chosen]


def squared(module: nn.Module, batch: Batch) -> torch.Tensor:
    return (call(module, batch[0]) - batch[1]).square().mean()


def model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_loss_falls_and_the_module_ends_in_eval(optimizer: str) -> None:
    module = model()
    done = train(module, batches, squared, Training(epochs=20, lr=0.02, optimizer=optimizer), steps_per_epoch=6)
    assert done.steps == 120 and len(done.losses) == 10
    assert done.losses[-1] < 0.5 * done.losses[0]
    assert not module.training and all(p.grad is None for p in module.parameters())


def test_epochs_may_be_a_fraction() -> None:
    assert train(model(), batches, squared, Training(epochs=1.5), steps_per_epoch=6).steps == 9
    assert train(model(), batches, squared, Training(epochs=0.01), steps_per_epoch=6).steps == 1


def test_the_same_seed_gives_the_same_weights_and_leaves_the_callers_random_numbers() -> None:
    found = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        module = model()
        torch.manual_seed(noise)
        expected = torch.rand(3)
        torch.manual_seed(noise)
        train(module, batches, squared, Training(epochs=2, seed=5), steps_per_epoch=6)
        assert torch.equal(torch.rand(3), expected)
        found.append(module.state_dict())
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_the_average_is_that_of_the_weights_after_each_step() -> None:
    module, seen = model(), []

    def look(trained: nn.Module, share: float, rate: float) -> None:
        seen.append({n: p.detach().clone() for n, p in trained.named_parameters()})

    masks = {"0.weight": torch.rand(16, 6, generator=torch.Generator().manual_seed(1)) > 0.5}
    module.get_parameter("0.weight").data.mul_(masks["0.weight"])
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    train(
        module,
        batches,
        squared,
        Training(epochs=4, lr=0.1, average=0.6),
        steps_per_epoch=6,
        after_step=look,
        keep=masks,
        frozen=lambda n: n == "3.bias",
    )
    for name, expected in start.items():
        for step, values in enumerate(seen):
            held = values[name] * masks[name] if name in masks else values[name]
            keep = min(0.6, (1 + step) / (10 + step))
            expected = keep * expected + (1 - keep) * held
        torch.testing.assert_close(module.get_parameter(name).detach(), expected)
    assert not module.get_parameter("0.weight")[~masks["0.weight"]].any()
    assert torch.equal(module.get_parameter("3.bias"), start["3.bias"])


def test_masked_weights_stay_zero_and_frozen_ones_stay() -> None:
    module = model()
    mask = torch.rand(16, 6) > 0.5
    with torch.no_grad():
        module.get_parameter("0.weight").mul_(mask)
    frozen = module.get_parameter("3.weight").detach().clone()
    train(
        module,
        batches,
        squared,
        Training(epochs=2),
        steps_per_epoch=6,
        keep={"0.weight": mask},
        frozen=lambda name: name == "3.weight",
    )
    weight = module.get_parameter("0.weight")
    assert (weight[~mask] == 0).all() and (weight[mask] != 0).all()
    assert torch.equal(module.get_parameter("3.weight"), frozen)


def test_a_loss_that_is_no_number_stops_with_a_sentence() -> None:
    with pytest.raises(Diverged, match="training diverged: the loss was nan at step 1 of 12") as caught:
        train(model(), batches, lambda m, b: squared(m, b) * float("nan"), Training(epochs=2), steps_per_epoch=6)
    assert "learning rate" in (caught.value.hint or "")


def test_nothing_to_train_and_nothing_to_train_on() -> None:
    with pytest.raises(RecipeError, match="nothing to train"):
        train(model(), batches, squared, Training(), steps_per_epoch=6, frozen=lambda name: True)
    with pytest.raises(DataError, match="no batch"):
        train(model(), lambda epoch: iter(()), squared, Training(), steps_per_epoch=6)


def test_flips_and_crops_are_those_of_the_image() -> None:
    image = torch.arange(1.0, 65.0).view(1, 1, 8, 8).expand(64, 1, 8, 8)
    varied = augment(image, "flip-crop", torch.Generator().manual_seed(0))
    assert varied.shape == image.shape
    padded = nn.functional.pad(image[:1], (1, 1, 1, 1))
    possible = {
        tuple(p[0, 0, i : i + 8, j : j + 8].flatten().tolist())
        for p in (padded, padded.flip(3))
        for i in range(3)
        for j in range(3)
    }
    seen = {tuple(v.flatten().tolist()) for v in varied}
    assert seen <= possible and len(seen) > 9
    with pytest.raises(DataError, match="flip-crop"):
        augment(torch.rand(4, 3), "flip-crop", torch.Generator())


def test_bfloat16_follows_float32_and_leaves_the_module_as_it_was() -> None:
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    dtypes = set()

    def loss(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        got = module(batch[0])
        dtypes.add(got.dtype)
        return (got - batch[1]).square().mean()

    found = {}
    for precision in ("f32", "bf16"):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        trained = train(
            module, lambda epoch: iter([(x, y)] * 8), loss, Training(epochs=4, lr=0.1, precision=precision),
            steps_per_epoch=8,
        )  # fmt: skip
        assert "forward" not in vars(module)
        found[precision] = (trained.losses[-1], module[0].weight.detach())
    assert dtypes == {torch.float32}
    assert found["bf16"][0] == pytest.approx(found["f32"][0], rel=0.05)
    assert not torch.equal(found["bf16"][1], found["f32"][1])


def test_affine_images_are_turned_scaled_and_shifted_a_little() -> None:
    """A blot in the middle moves by less than two pixels, never mirrored, and keeps about its mass."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(64, 1, 28, 28)
    images[:, :, 12:16, 6:22] = 1.0  # a bar
    varied = augment(images, "affine", generator)
    assert varied.shape == images.shape and not torch.equal(varied[0], varied[1])
    mass = varied.sum((1, 2, 3))
    assert bool((mass > 64 * 0.75).all() and (mass < 64 * 1.3).all())
    places = torch.arange(28.0)
    down = (varied.sum((1, 3)) * places).sum(1) / mass
    right = (varied.sum((1, 2)) * places).sum(1) / mass
    assert float((down - 13.5).abs().max()) < 1.5 and float((right - 13.5).abs().max()) < 1.5
    again = augment(images, "affine", torch.Generator().manual_seed(0))
    assert torch.equal(varied, again)
