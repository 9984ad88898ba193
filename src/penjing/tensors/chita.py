"""Combinatorial pruning: which weights stay, and what they become, decided together for all weights of a network.

The loss about the trained weights w̄ is a quadratic whose Hessian is the empirical Fisher matrix AᵀA / n, of which only
A, the gradients of n small batches, is held: min ‖b − A w‖² / 2 + n λ ‖w − w̄‖² / 2 with b = A w̄ − 1, over w with few
entries that are not zero (Benbaki et al. 2023, "Fast as CHITA: neural network pruning with combinatorial
optimization"). Iterative hard thresholding finds the support; the weights on it are solved for in n unknowns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Weights (P,) → the mask of those that may stay.
Project = Callable[[Tensor], Tensor]


@torch.no_grad()
def prune_by_fisher(
    gradients: Tensor, weight: Tensor, project: Project, *, damping: float = 1e-2, iterations: int = 20
) -> tuple[Tensor, Tensor]:
    """Weights (P,) and mask (P,) that leave what `project` allows and raise the quadratic least.

    `gradients` (n, P) are those of the mean loss of n batches at `weight` (P,). `damping` is λ as a share of the Fisher
    matrix's largest eigenvalue, to which 1e-5 is added. The best of all supports met is returned.
    """
    n = gradients.shape[0]
    kernel = (gradients @ gradients.T).double()  # A Aᵀ has the eigenvalues of AᵀA that are not zero
    largest = float(torch.linalg.eigvalsh(kernel)[-1].clamp_min(1e-30))
    ridge = damping * largest + 1e-5 * n  # where gradients vanish, nothing is known: weights stay near what they were
    aim = gradients @ weight - 1

    def solved(mask: Tensor) -> tuple[float, Tensor, Tensor]:
        """The value of the quadratic at the best weights on a support (by Woodbury's identity), those, the support."""
        inside = gradients * mask
        system = (inside @ inside.T).double() + ridge * torch.eye(n, dtype=torch.float64)
        dual = torch.linalg.solve(system, (aim - inside @ weight).double())
        found = (weight + inside.T @ dual.float()) * mask
        error = float((aim - gradients @ found).double().square().sum())
        return error + ridge * float((found - weight).double().square().sum()), found, mask

    best = solved(project(weight))
    for _ in range(iterations):
        now = best[1]
        slope = gradients.T @ (gradients @ now - aim) + ridge * (now - weight)
        step, moved = 1 / (largest + ridge), None
        while step * ridge < 4:  # short steps leave the support as it is: they grow for as long as that helps
            trial = solved(project(now - step * slope))
            if moved is not None and trial[0] > moved[0]:
                break
            moved = trial
            step *= 4
        if moved is None or moved[0] >= best[0] * (1 - 1e-6):
            break
        best = moved
    return best[1], best[2]
