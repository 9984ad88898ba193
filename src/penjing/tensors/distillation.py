"""How far a student's outputs are from a teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_labels(student: Tensor, teacher: Tensor, temperature: float, dim: int = 1) -> Tensor:
    """KL divergence of the teacher's class distribution from the student's at `temperature`, times temperature².

    Both are logits of one shape with the classes along `dim`; the mean is over everything else. The square keeps the
    gradient's size when the temperature changes (Hinton, Vinyals & Dean 2015, "Distilling the knowledge", §2).
    """
    told = F.log_softmax(teacher / temperature, dim)
    said = F.log_softmax(student / temperature, dim)
    return (told.exp() * (told - said)).sum(dim).mean() * temperature**2


def matching(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference, relative to the teacher's variance, for outputs that need not be logits.

    For logits this is the limit of soft labels at a high temperature (Hinton et al. 2015, §2.1).
    """
    return F.mse_loss(student, teacher) / teacher.var().clamp_min(1e-12)
