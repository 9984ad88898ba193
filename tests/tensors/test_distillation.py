"""Losses between a student and a teacher, against formulas in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from penjing.tensors.distillation import LOGIT_LOSSES, Softening, decoupled, merged, soft_labels, standardized
from penjing.tensors.feature_losses import FEATURE_LOSSES, attention, contrast, similarity

S = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGET = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


def test_temperatures_may_differ() -> None:
    wanted = F.kl_div(F.log_softmax(S / 2, 1), F.softmax(T / 3, 1), reduction="batchmean") * 6
    assert torch.allclose(soft_labels(S, T, 3.0, student_temperature=2.0), wanted)
    # The gradient's size does not hang on the temperature where the logits are small against it.
    sizes = []
    for t in (50.0, 100.0):
        student = S.clone().requires_grad_()
        soft_labels(student, T, t).backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_standardized_logits_forget_shift_and_scale() -> None:
    loss = LOGIT_LOSSES.get("standardized")
    how = Softening(temperature=2.0)
    assert torch.allclose(loss(3 * S + 7, T, how, None), loss(S, 0.2 * T - 1, how, None), rtol=1e-5)
    assert float(loss(5 * T - 2, T, how, None)) == pytest.approx(0, abs=1e-10)
    z = standardized(S)
    assert torch.allclose(z.mean(1), torch.zeros(8, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(z.std(1), torch.ones(8, dtype=torch.float64), atol=1e-5)


def test_the_divergence_is_its_two_parts() -> None:
    for told, said in ((3.0, 3.0), (4.0, 2.0)):
        first, second, own = decoupled(S, T, TARGET, (told, said))
        p, q = F.softmax(T / told, 1), F.softmax(S / said, 1)
        assert torch.allclose(first + (1 - own) * second, (p * (p / q).log()).sum(1))
        assert torch.allclose(own, p[torch.arange(8), TARGET])


def test_decoupled_weights_and_targets() -> None:
    loss = LOGIT_LOSSES.get("dkd")
    first, second, _ = decoupled(S, T, TARGET, (4.0, 4.0))
    how = Softening(target_weight=2.0, other_weight=3.0)
    assert torch.allclose(loss(S, T, how, TARGET), (2 * first + 3 * second).mean() * 16)
    # Without labels the teacher's own choice is the target; a label that is to be ignored likewise.
    chosen = loss(S, T, how, T.argmax(1))
    assert torch.equal(loss(S, T, how, None), chosen)
    assert torch.equal(loss(S, T, how, torch.full((8,), -100)), chosen)
    # Classes may lie anywhere: four positions of two samples, and as tokens.
    image_s, image_t = (x.reshape(2, 4, 5).movedim(2, 1) for x in (S, T))
    assert torch.allclose(loss(image_s, image_t, how, TARGET.reshape(2, 4)), loss(S, T, how, TARGET))


def test_multi_level_as_published() -> None:
    def by_hand(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        parts = []
        for temperature in (2.0, 3.0, 4.0, 5.0, 6.0):
            p, q = F.softmax(t / temperature, 1), F.softmax(s / temperature, 1)
            instances = F.kl_div(q.log(), p, reduction="batchmean") * temperature**2
            batch = (p @ p.T - q @ q.T).square().sum() / len(s)
            classes = (p.T @ p - q.T @ q).square().sum() / s.shape[1]
            parts.append(instances + batch + classes)
        return torch.stack(parts).mean()

    loss = LOGIT_LOSSES.get("multi-level")
    assert torch.allclose(loss(S, T, Softening(), None), by_hand(S, T))
    assert torch.allclose(loss(S[:3], T[:3], Softening(), None), by_hand(S[:3], T[:3]))  # more classes than samples
    # Positions are batches of their own.
    tokens = loss(S.reshape(4, 2, 5), T.reshape(4, 2, 5), Softening(dim=-1), None)
    assert torch.allclose(tokens, (by_hand(S[::2], T[::2]) + by_hand(S[1::2], T[1::2])) / 2)


@pytest.mark.parametrize("name", LOGIT_LOSSES.names())
def test_losses_are_least_at_the_teacher_and_have_gradients(name: str) -> None:
    loss = LOGIT_LOSSES.get(name)
    student = S.clone().requires_grad_()
    value = loss(student, T, Softening(), TARGET)
    value.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None and torch.isfinite(student.grad).all() and student.grad.norm() > 0
    assert float(loss(T, T, Softening(), TARGET)) == pytest.approx(0, abs=1e-6) and value > 0
    closer = loss((S - 0.1 * student.grad / student.grad.norm()), T, Softening(), TARGET)
    assert closer < value


def test_several_teachers_are_averaged_as_probabilities() -> None:
    together = merged([S, T], [1.0, 3.0], 4.0, 1)
    wanted = (F.softmax(S / 4, 1) + 3 * F.softmax(T / 4, 1)) / 4
    assert torch.allclose(F.softmax(together / 4, 1), wanted)
    assert torch.allclose(merged([S, T], [1.0, 3.0], 4.0, None), (S + 3 * T) / 4)
    assert merged([S], [2.0], 4.0, 1) is S


def test_attention_and_similarity_by_hand() -> None:
    a, b = torch.randn(3, 4, 4, 6), torch.randn(3, 4, 4, 9)  # channels last: their number may differ
    maps = [x.pow(2).mean(-1).reshape(3, -1) for x in (a, b)]
    maps = [m / m.norm(dim=1, keepdim=True) for m in maps]
    assert torch.allclose(attention(a, b), (maps[0] - maps[1]).pow(2).sum(1).mean())
    assert float(attention(a, 7 * a)) == pytest.approx(0, abs=1e-6)
    grams = [x.reshape(3, -1) @ x.reshape(3, -1).T for x in (a, b)]
    grams = [g / g.norm(dim=1, keepdim=True) for g in grams]
    assert torch.allclose(similarity(a, b), (grams[0] - grams[1]).pow(2).sum() / 9)


def test_contrast_finds_its_own() -> None:
    a, b = torch.randn(6, 16), torch.randn(6, 16)
    cosines = torch.stack([torch.stack([F.cosine_similarity(x, y, dim=0) for y in b]) for x in a]) / 0.5
    rows = -torch.log_softmax(cosines, 1).diagonal().mean()
    columns = -torch.log_softmax(cosines, 0).diagonal().mean()
    assert torch.allclose(contrast(a, b, 0.5), (rows + columns) / 2, atol=1e-6)
    own = torch.eye(6, 16)
    assert float(contrast(own, own)) < 1e-4 < float(contrast(own, own.roll(1, 0)))


def test_registered() -> None:
    assert FEATURE_LOSSES.names() == ["attention", "contrast", "fitnet", "similarity"]
    assert LOGIT_LOSSES.names() == ["dkd", "matching", "multi-level", "soft-labels", "standardized"]
