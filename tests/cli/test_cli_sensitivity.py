"""penjing sensitivity and compress --sensitivity: the numbers of the API, kept, drawn, and refused where senseless."""

import json
from functools import partial

import pytest

import penjing as pj
from penjing.cli.models import load_network
from penjing.data import load_data
from penjing.evaluation import LatencySettings, Sensitivity, silencing
from penjing.files import appearing

VERB = ("sensitivity", "net.py:build", "--data", "net.py:samples")
QUICK = ("--task", "classification", "--ratios", "0.25,0.5,0.75", "--samples", "64")


def files(folder) -> set[str]:
    return {p.name for p in folder.iterdir() if p.name != "__pycache__"}


def api(**settings) -> Sensitivity:
    data = load_data("net.py:samples")
    given = {"task": "classification", "ratios": (0.25, 0.5, 0.75), "samples": 64, **settings}
    return pj.sensitivity(load_network("net.py:build", data=data), data, **given)


def test_it_prints_and_writes_what_the_api_gives(penjing, desk):
    done = penjing(*VERB, *QUICK, "--out", "curves", "--json")
    assert done.code == 0, done.err
    wanted = api()
    assert done.json == {**wanted.to_dict(), "most_sensitive": list(wanted.most_sensitive()), "out": "curves"}
    assert files(desk / "curves") == {"sensitivity.json", "sensitivity.html"}
    assert Sensitivity.load(desk / "curves" / "sensitivity.json") == wanted
    assert (desk / "curves" / "sensitivity.html").read_text().count("<polyline") == 2
    names = [line.split()[0] for line in done.err.splitlines() if line.strip().startswith("body.")]
    assert names == list(wanted.most_sensitive()) and len(names) == 2
    again = penjing(*VERB, *QUICK, "--out", "curves")  # what it wrote itself it may write again
    assert again.code == 0 and again.out == ""


@pytest.mark.parametrize(
    ("args", "settings"),
    [
        (("--kind", "weights", "--where", "body*"), {"kind": "weights", "where": ["body*"]}),
        (("--criterion", "taylor", "--seed", "3"), {"criterion": "taylor", "seed": 3}),
        (("--reconstruct", "--samples", "32"), {"reconstruct": True, "samples": 32}),
    ],
)
def test_every_setting_arrives(penjing, args, settings):
    done = penjing(*VERB, *QUICK, *args, "--json")
    assert done.code == 0, done.err
    assert Sensitivity.from_dict({k: v for k, v in done.json.items() if k != "most_sensitive"}) == api(**settings)


def test_without_a_task_labels_are_not_looked_at(penjing):
    done = penjing(*VERB, "--ratios", "0.5", "--json")
    assert done.code == 0 and done.json["metric"] is None and "no --task" in done.err


def test_a_second_run_reads_the_cache(penjing, desk, monkeypatch):
    first = penjing(*VERB, *QUICK, "--cache", "kept", "--json")
    assert len(files(desk / "kept")) == 1
    with monkeypatch.context() as patched:
        patched.setattr(silencing, "silence", None)
        assert penjing(*VERB, *QUICK, "--cache", "kept", "--json").json == first.json
    other = (desk / "net.py").read_text().replace("manual_seed(0)", "manual_seed(1)")
    (desk / "other.py").write_text(other)
    done = penjing("sensitivity", "other.py:build", "--data", "net.py:samples", *QUICK, "--cache", "kept", "--json")
    assert done.code == 0 and done.json["digest"] != first.json["digest"] and done.json["rows"] != first.json["rows"]
    assert len(files(desk / "kept")) == 2


def test_a_narrow_terminal_shows_fewer_ratios(penjing, monkeypatch):
    for width, columns in (("120", 9), ("60", 4)):
        monkeypatch.setenv("COLUMNS", width)
        done = penjing(*VERB, "--task", "classification", "--samples", "16")
        row = next(line for line in done.err.splitlines() if line.strip().startswith("body.0"))
        assert len(row.split()) == 3 + columns and all(len(line) <= int(width) for line in done.err.splitlines())


def test_compress_draws_them_beside_what_it_kept(penjing, desk, monkeypatch):
    quick = LatencySettings(warm_up=1, seconds=0.01, least_rounds=3, most_rounds=3)
    monkeypatch.setattr(pj, "evaluate", partial(pj.evaluate, memory=False, latency=quick))
    (desk / "recipe.yaml").write_text("steps: [{PruneChannels: {ratio: 0.5, criterion: l1, samples: 32}}]")
    args = ("--task", "classification", "--recipe", "recipe.yaml", "--target", "torch", "--out", "small", "--json")
    done = penjing("compress", *VERB[1:], *args, "--sensitivity", "--cache", "kept")
    assert done.code == 0, done.err
    found = done.json["sensitivity"]
    wanted = api(ratios=silencing.RATIOS, samples=256, criterion="l1", reconstruct=True)
    assert found["curves"] == json.loads(json.dumps(wanted.to_dict()))
    small = pj.Bundle.load("small").network()
    assert found["kept"] == {group.name: group.size for group in small.groups()}
    assert sum(found["kept"].values()) == 12 and done.json["network"]["baseline_digest"] == wanted.digest
    assert json.loads((desk / "small" / "report.json").read_text())["sensitivity"] == found
    page, text = ((desk / "small" / name).read_text() for name in ("report.html", "report.md"))
    assert page.count("<polyline") == 2 and page.count('class="at"') == 2 and "## Sensitivity" in text
    assert "kept" in done.err and len(files(desk / "kept")) == 1


# ------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("args", "error", "hint"),
    [
        ((*VERB, "--task", "clasification"), "'clasification'", "did you mean 'classification'?"),
        (
            (*VERB, *QUICK, "--ratios", "0.5,1.5"),
            "ratios must be numbers between 0 and 1, got (0.5, 1.5)",
            "for example",
        ),
        ((*VERB, *QUICK, "--ratios", "half"), "--ratios takes numbers between 0 and 1", "0.25,0.5,0.75"),
        ((*VERB, *QUICK, "--ratios", ""), "--ratios takes numbers", ""),
        ((*VERB, *QUICK, "--kind", "layers"), "kind must be one of channels, weights, got 'layers'", ""),
        ((*VERB, *QUICK, "--criterion", "l3"), "'l3'", ""),
        ((*VERB, "--criterion", "taylor"), "labels", ""),
        ((*VERB, *QUICK, "--samples", "0"), "--samples", "--help"),
        ((*VERB, *QUICK, "--where", "tail*"), "nothing to silence that 'where' selects", "groups"),
        ((*VERB, *QUICK, "--kind", "weights", "--reconstruct"), "reconstruct is for channels", ""),
        ((*VERB, *QUICK, "--out", "thesis"), "holds other files", "--out"),
        ((*VERB, *QUICK, "--cache", "net.py"), "cannot write net.py", ""),
        (("sensitivity", "net.py:build", "--data", "bare.npz", *QUICK), "needs labels", "leave --task out"),
        (("sensitivity", "net.py:build", "--data", "net.py:wrong_shape", *QUICK), "", ""),
        (("sensitivity", "net.py:single", "--data", "net.py:samples", *QUICK), "no channel groups", "weights"),
        (("compress", *VERB[1:], "--cache", "kept"), "--cache keeps sensitivity curves", "--sensitivity"),
        (("compress", "net.py:single", *VERB[2:], "--sensitivity"), "no channel groups", "weights"),
        (("compress", "net.py:build", "--data", "bare.npz", "--task", "classification", "--sensitivity"), "labels", ""),
    ],
)
def test_bad_arguments(penjing, desk, args, error, hint):
    import numpy as np

    np.savez(desk / "bare.npz", x=np.random.default_rng(0).random((12, 1, 8, 8), dtype=np.float32))
    with (desk / "net.py").open("a") as file:
        file.write("\n\ndef single():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()\n")
    (desk / "thesis").mkdir()
    (desk / "thesis" / "chapter1.tex").write_text("years of work")
    before = files(desk)
    done = penjing(*args)
    lines = [line for line in done.err.splitlines() if line.startswith(("error:", "hint:"))]
    assert done.code == 2 and done.out == "", done.err
    assert len(lines) == 2 and error in lines[0] and hint in lines[1], done.err
    assert files(desk) == before and files(desk / "thesis") == {"chapter1.tex"}


@pytest.mark.parametrize("moment", ["measuring", "writing"])
def test_interrupted_nothing_is_left(penjing, desk, monkeypatch, moment):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt  # no real signal: with AMX in use its frame overflows pytest's alternate stack

    before = files(desk)
    place = (silencing, "silence") if moment == "measuring" else (Sensitivity, "save")
    monkeypatch.setattr(*place, interrupted)
    done = penjing(*VERB, *QUICK, "--out", "curves", *(("--cache", "kept") if moment == "measuring" else ()))
    assert done.code == 130 and "nothing was written" in done.err
    assert files(desk) == before


def test_a_full_disk_leaves_nothing(penjing, desk, monkeypatch):
    def full(self, path):
        with appearing(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Sensitivity, "save", full)
    done = penjing(*VERB, *QUICK, "--out", "curves")
    assert done.code == 2 and "cannot write" in done.err and not (desk / "curves").exists()
