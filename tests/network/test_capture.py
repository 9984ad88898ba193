"""capture: what comes in goes out again the same, trains, and leaves the caller's module alone."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.errors import CaptureError, DataError, InputError
from penjing.network import Network, capture


class Attention(nn.Module):
    """Attention whose dropout probability torch.export keeps as a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8 * 64, 5),
    )


IDS = torch.randint(0, 90, (2, 7))
SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
MODELS = {
    "convolutional": (convolutional, (torch.rand(2, 3, 8, 8),)),
    "lstm": (lambda: nn.LSTM(4, 8, 2, batch_first=True, dropout=0.5), (torch.rand(2, 5, 4),)),
    "attention": (Attention, (torch.rand(2, 5, 8),)),
    "bert": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, vocab_size=90)),
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=90, bos_token_id=0, eos_token_id=0)
        ),
        {"input_ids": IDS},
    ),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def captured(request: pytest.FixtureRequest) -> tuple[nn.Module, object, Network]:
    torch.manual_seed(0)
    make, inputs = MODELS[request.param]
    model = make()
    return model, inputs, capture(model, inputs)


def outputs_of(model: nn.Module, inputs: object) -> list[Tensor]:
    result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    if isinstance(result, dict):
        result = [v for v in result.values() if isinstance(v, Tensor)]
    flat: list[Tensor] = []

    def walk(value: object) -> None:
        if isinstance(value, Tensor):
            flat.append(value)
        elif isinstance(value, tuple | list):
            for v in value:
                walk(v)

    walk(result)
    return flat


def more(inputs: object, batch: int) -> object:
    def grow(t: Tensor) -> Tensor:
        return torch.cat([t] * batch)[:batch]

    return {k: grow(v) for k, v in inputs.items()} if isinstance(inputs, dict) else tuple(grow(t) for t in inputs)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_same_outputs_at_any_batch(captured: tuple[nn.Module, object, Network], batch: int) -> None:
    model, inputs, network = captured
    model.eval()
    given = more(inputs, batch)
    for got, wanted in zip(network.run(given), outputs_of(model, given), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_eval_is_deterministic_and_training_is_not(captured: tuple[nn.Module, object, Network]) -> None:
    model, inputs, network = captured
    module = network.module()
    first, second = outputs_of(module, inputs), outputs_of(module, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    module.train()
    assert any(
        not torch.equal(a, b) for a, b in zip(outputs_of(module, inputs), outputs_of(module, inputs), strict=True)
    )
    module.eval()
    if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        assert all(torch.equal(a, b) for a, b in zip(first, outputs_of(module, inputs), strict=True))


def test_module_trains_and_the_network_stays(captured: tuple[nn.Module, object, Network]) -> None:
    _, inputs, network = captured
    module = network.module()
    module.train()
    before = [t.clone() for t in network.run(inputs)]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    sum(o.square().mean() for o in outputs_of(module, inputs)).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, network.run(inputs), strict=True))
    assert set(module.state_dict()) == set(network.tensors())


def test_save_and_load_are_exact(captured: tuple[nn.Module, object, Network], tmp_path: Path) -> None:
    _, inputs, network = captured
    again = Network.load(network.save(tmp_path / "net.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(network.run(inputs), again.run(inputs), strict=True))
    assert again.state()[0] == network.state()[0]
    assert again.parameter_names == network.parameter_names


def test_the_module_is_not_touched() -> None:
    model = convolutional()
    model[3].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    network = capture(model, (torch.rand(1, 3, 8, 8),))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        model[0].weight.zero_()
    assert network.tensors()["0.weight"].abs().sum() > 0


def test_names_and_shapes() -> None:
    network = capture(convolutional(), (torch.rand(1, 3, 8, 8),))
    assert {"0.weight", "0.bias", "1.running_mean", "5.weight"} <= set(network.tensors())
    assert network.batch_is_dynamic
    with pytest.raises(DataError, match="N×3×8×8, got 1×3×9×8"):
        network.bind(torch.rand(1, 3, 9, 8))
    with pytest.raises(DataError, match="takes 1 inputs"):
        network.bind((torch.rand(1, 3, 8, 8), torch.rand(1)))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, d: dict[str, Tensor]) -> dict[str, object]:
        y = F.relu(self.layer(d["a"]) + d["b"], inplace=True)
        y[:, 0] = 7
        y[:, 1:3] *= 2
        y += 1
        return {"sum": y.sum(1), "parts": (y * 2, [y - 1])}


def test_in_place_writes_and_nested_structures() -> None:
    model = InPlace()
    given = {"a": torch.rand(2, 4), "b": torch.rand(2, 4)}
    network = capture(model, (given,))
    wanted, got = model(given), network(given)
    assert got.keys() == wanted.keys() and isinstance(got["parts"][1], list)
    torch.testing.assert_close(got["sum"], wanted["sum"])
    torch.testing.assert_close(got["parts"][1][0], wanted["parts"][1][0])
    assert not any(
        str(n.target).split(".")[-2].endswith("_") for n in network.graph_module.graph.nodes if n.op == "call_function"
    )


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.layer(x)
        return x


def test_what_cannot_be_captured_names_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError, match=r"test_capture.py, line \d+: if x.sum\(\) > 0:") as caught:
        capture(Branches(), (torch.rand(2, 4),))
    assert "torch.where" in (caught.value.hint or "")
    assert capsys.readouterr() == ("", "")


class BranchesInTraining(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if not self.training or x.sum() > 0 else x


def test_eval_mode_is_the_fallback() -> None:
    network = capture(BranchesInTraining(), (torch.rand(2, 4),))
    assert "captured in eval mode" in network.history[0]["notes"][0]


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).reshape(2, 4) * torch.ones(2, 1)


def test_a_fixed_batch_is_kept_and_said() -> None:
    network = capture(FixedBatch(), (torch.rand(2, 4),))
    assert not network.batch_is_dynamic
    assert "the network fixes its batch size" in network.history[0]["notes"]


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (nn.Linear(4, 4), None, "no example inputs"),
        (nn.Linear(4, 4), (torch.rand(2, 5),), "fails on the example inputs"),
        (nn.Linear(4, 4), (torch.rand(0, 4),), "empty"),
        (nn.Linear(4, 4), (torch.full((2, 4), float("nan")),), "NaN"),
        (nn.Linear(4, 4), ("text",), "must be tensors"),
        (42, (torch.rand(2, 4),), "expected an nn.Module, got int"),
    ],
)
def test_bad_input_is_one_sentence(model: object, inputs: object, words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        capture(model, inputs)


def test_nan_weights_are_refused() -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.bias[2] = float("nan")
    with pytest.raises(CaptureError, match="weights of bias hold NaN"):
        capture(model, (torch.rand(2, 4),))


def test_from_files(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        textwrap.dedent("""
        import torch
        def small(): return torch.nn.Linear(4, 2)
        def broken(): raise ValueError("no weights here")
        size = 3
        """)
    )
    file = tmp_path / "nets.py"
    network = capture(f"{file}:small", (torch.rand(2, 4),))
    assert network.name == "small"
    program = torch.export.export(nn.Linear(4, 2), (torch.rand(2, 4),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "net.pt2")
    assert capture(tmp_path / "net.pt2").run(torch.rand(5, 4))[0].shape == (5, 2)
    for text, words in [
        (f"{file}:smal", "has nothing called 'smal'\nhint: did you mean 'small'"),
        (f"{file}:broken", "raised ValueError: no weights here"),
        (f"{file}:size", "not something that can be called"),
        (f"{tmp_path}/none.py:small", "there is no file"),
        ("no_such_package:small", "no module called 'no_such_package'"),
        ("nonsense", "not of the form"),
        (str(tmp_path / "none.pt2"), "there is no file"),
        (str(file) + "2.pt2", "there is no file"),
    ]:
        with pytest.raises((InputError, CaptureError)) as caught:
            capture(text, (torch.rand(2, 4),))
        assert words in str(caught.value)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    network = capture(nn.Linear(4, 2), (torch.rand(2, 4),))
    path = network.save(tmp_path / "net.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        Network.load(path)
    (tmp_path / "net.pt2").write_bytes(b"PK\3\4 not a program")
    with pytest.raises(CaptureError, match="not a readable .pt2 file"):
        capture(tmp_path / "net.pt2")


def test_any_number_of_inputs_and_names_at_once() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, *parts: Tensor, **named: Tensor) -> Tensor:
            return self.layer(sum(parts)) + sum(named.values())

    a, b = torch.rand(2, 4), torch.rand(2, 4)
    network = capture(Sum(), (a, b))
    assert network.batch_is_dynamic
    torch.testing.assert_close(network.run((a[:1], b[:1]))[0], network.run((a, b))[0][:1])


def test_the_same_tensor_given_twice() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * 2 + y

    x = torch.rand(2, 3)
    network = capture(Two(), (x, x))
    torch.testing.assert_close(network.run((x, torch.zeros(2, 3)))[0], x * 2)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("learned", [False, True])
def test_numbers_that_numpy_does_not_know_are_named(tmp_path: Path, dtype: torch.dtype, learned: bool) -> None:
    class Eight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            held = torch.ones(4).to(dtype)
            self.eight = nn.Parameter(held, requires_grad=False) if learned else nn.Buffer(held)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.eight.float()

    network = capture(Eight(), (torch.rand(2, 4),))
    with pytest.raises(InputError, match=f"tensor 'eight' is {str(dtype)[6:]}, which cannot be kept") as caught:
        network.save(tmp_path / "net.safetensors")
    assert caught.value.hint and not list(tmp_path.iterdir())
