"""Two processes on the CPU, as `accelerate launch` starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.network import Network, SetWeights

X = torch.randn(96, 1, 6, 6, generator=torch.Generator().manual_seed(3))
Y = (X.mean((1, 2, 3)) > 0).long()


def network(norm: bool) -> Network:
    torch.manual_seed(0)
    middle = nn.BatchNorm2d(4) if norm else nn.Identity()
    layers = (nn.Conv2d(1, 4, 3), middle, nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    return pj.capture(nn.Sequential(*layers), inputs=(X[:2],))


PLAIN = pj.Finetune(epochs=4, batch_size=8)
#: What differs between processes if nobody sees to it: norms' statistics, dropped batches, scores that decide.
RECIPE = pj.Recipe(
    pj.PruneWeights(sparsity=0.5, criterion="movement"),
    pj.Finetune(epochs=4, batch_size=8, average=0.9, held_out=0.2, patience=3, teacher="original", accumulate=2),
    pj.PruneChannels(ratio=0.5),
)
#: An average of the student, adapters and a teacher's answers beside the student.
TAUGHT = pj.Recipe(
    pj.PruneChannels(ratio=0.5),
    pj.Distill(epochs=4, batch_size=8, teacher=["original", "self"], features="auto", held_out=0.2),
)
LAUNCHED = """
import sys
sys.path.insert(0, {tests!r})
import os
import torch
import test_processes as here
from penjing.training import checkpoint, is_main_process
checkpoint.SECONDS = checkpoint._MOST = 0
rank = int(os.environ["RANK"])
torch.set_num_threads(1)
if rank:  # whoever writes a file puts it in its place so
    def refuse(*args): raise AssertionError("only the first process writes")
    os.replace = refuse
from penjing.training import loop
loop._LOOKS = 3
if {kill}:
    learn = loop._Run.learn
    def dying(run, group):
        if run.monitor and run.step == {kill}:
            os._exit(9)
        learn(run, group)
    loop._Run.learn = dying
data = here.X[:{count}], here.Y[:{count}]
result = here.pj.compress(here.network({norm}), {recipe}, data=data, task="classification", resume={run!r})
state = {{name: tensor.detach() for name, tensor in result.network.tensors().items()}}
notes = [plan.notes for plan in result.plans]
torch.save((state, notes), {out!r} + f".{{rank}}")
"""


def launch(
    folder: Path, recipe: str, *, norm: bool, run: Path | None = None, kill: int = 0, count: int = 96
) -> list[Any]:
    script, out = folder / "script.py", folder / "out"
    where = None if run is None else str(run)
    script.write_text(
        LAUNCHED.format(
            tests=str(Path(__file__).parent), norm=norm, recipe=recipe, run=where, out=str(out), kill=kill, count=count
        )
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}  # gloo, also beside a GPU
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)
    if kill:
        assert done.returncode != 0
        return []
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(f"{out}.{rank}") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--cpu", "--num_processes", "2"), ("--cpu", "--num_processes", "1")])
def test_a_launcher_that_starts_one_of_two_is_told_of(tmp_path: Path, options: tuple[str, ...]) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_processes as here\n"
        "here.pj.compress(here.network(False), here.pj.Recipe(here.pj.PruneWeights(sparsity=0.5)))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(script)]
    # Other tests, and libraries that they call, set variables of this process that a person's shell has not.
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert ("asked for several processes and started one" in done.stderr) == ("2" in options), done.stderr


def assert_same(found: Any, expected: Any) -> None:
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(found[0][n], expected[0][n]) for n in expected[0])


@pytest.mark.slow
def test_both_end_with_the_same_network_also_after_a_kill(tmp_path: Path) -> None:
    first, second = launch(tmp_path, "here.RECIPE", norm=True)
    assert_same(first, second)
    run = tmp_path / "run"
    launch(tmp_path, "here.RECIPE", norm=True, run=run, kill=8)
    assert list(run.glob("step-02/training-*.safetensors"))
    again = launch(tmp_path, "here.RECIPE", norm=True, run=run)
    assert_same(again[0], first)
    assert_same(again[1], first)
    with pytest.raises(pj.PenjingError, match="holds another run, with other number of processes"):
        pj.compress(network(True), RECIPE, data=(X, Y), task="classification", resume=run)


@pytest.mark.slow
def test_both_learn_the_same_from_teachers(tmp_path: Path) -> None:
    first, second = launch(tmp_path, "here.TAUGHT", norm=True)
    assert_same(first, second)
    start = network(True)
    pruned = pj.compress(start, pj.Recipe(TAUGHT.steps[0])).network
    learned = pruned.apply([SetWeights(parameter=n, value=t) for n, t in first[0].items() if t.is_floating_point()])
    told, before, after = (n.run((X,))[0].softmax(1) for n in (start, pruned, learned))
    assert (after - told).square().mean() < 0.5 * (before - told).square().mean()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "steps"), [(96, 24), (84, 24), (7, 4)])
def test_two_take_the_steps_that_one_takes_with_twice_as_many_samples(tmp_path: Path, count: int, steps: int) -> None:
    """Also where a pass ends with an odd batch, of fewer samples, or has but one."""
    first, second = launch(tmp_path, "here.pj.Recipe(here.PLAIN)", norm=False, count=count)
    assert_same(first, second)
    alone = pj.Recipe(pj.Finetune(epochs=4, batch_size=8, accumulate=2))
    expected = pj.compress(network(False), alone, data=(X[:count], Y[:count]), task="classification")
    assert first[1][0][0].partition(";")[0] == f"{steps} steps" == expected.plans[0].notes[0].partition(";")[0]
    for name, tensor in expected.network.tensors().items():
        torch.testing.assert_close(first[0][name], tensor.detach(), rtol=1e-4, atol=1e-5)
