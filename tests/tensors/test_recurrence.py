"""LSTMs step by step are torch's own, and what their products read can be changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from penjing.tensors.recurrence import lstm_by_steps


def by_steps(lstm: nn.LSTM, x: Tensor, state: tuple[Tensor, Tensor], **more: object) -> tuple[Tensor, Tensor, Tensor]:
    settings = {"biases": lstm.bias, "layers": lstm.num_layers, "bidirectional": lstm.bidirectional}
    settings |= {"batch_first": lstm.batch_first, "read": lambda t: t} | more
    return lstm_by_steps(x, state, lstm._flat_weights, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (3, False), (1, True), (2, True)])
@torch.no_grad()
def test_equals_torch(layers: int, bidirectional: bool, batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 5, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional)
    x = torch.randn(4, 6, 3)
    state = tuple(torch.randn(2, layers * (1 + bidirectional), 4 if batch_first else 6, 5))
    output, (h, c) = lstm(x, state)
    for got, want in zip(by_steps(lstm, x, state), (output, h, c), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_read_sees_hidden_states_and_inner_inputs_but_not_the_first() -> None:
    lstm, seen = nn.LSTM(3, 5, 2, bidirectional=True), []

    def read(t: Tensor) -> Tensor:
        seen.append(tuple(t.shape))
        return t * 0

    x, state = torch.randn(6, 4, 3), (torch.randn(4, 4, 5), torch.zeros(4, 4, 5))
    output, *_ = by_steps(lstm, x, state, read=read)
    assert seen == [(4, 5)] * 12 + [(6, 4, 10)] + [(4, 5)] * 12
    assert torch.equal(output[0, 0, :5], output[0, 1, :5]), "nothing of the second layer depends on the samples now"


def test_projected_states_are_refused() -> None:
    lstm = nn.LSTM(3, 5, proj_size=2)
    with pytest.raises(ValueError, match="projected"):
        by_steps(lstm, torch.randn(6, 4, 3), (torch.zeros(1, 4, 2), torch.zeros(1, 4, 5)))
