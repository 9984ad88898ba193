"""A network with every kind of layer that may share or transpose a stored weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Tied(nn.Module):
    """An embedding that the output layer reads too, a depthwise and a transposed convolution, and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 10)
        self.depthwise = nn.Conv1d(10, 10, 3, padding=1, groups=10)
        self.up = nn.ConvTranspose1d(10, 6, 2)
        self.lstm = nn.LSTM(6, 10, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        seen = self.up(torch.relu(self.depthwise(self.table(tokens).transpose(1, 2)))).transpose(1, 2)
        return self.lstm(seen)[0] @ self.table.weight.t()


TOKENS = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(0))
