"""The shape of the command line: help, version, usage errors, exit codes, what an error looks like."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penjing import __version__
from penjing.cli import app
from penjing.errors import InputError

VERBS = (
    "compress", "evaluate", "deploy", "sensitivity", "pack", "unpack", "inspect", "split", "join", "pull",
    "diff", "patch", "keygen", "sign", "verify", "encrypt", "decrypt", "demo", "doctor",
)  # fmt: skip


def test_help_names_every_verb(penjing):
    done = penjing("--help")
    assert done.code == 0
    assert all(f" {verb} " in done.out for verb in VERBS)
    assert done.err == ""


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(penjing, verb):
    done = penjing(verb, "--help")
    assert done.code == 0
    assert f"penjing {verb}" in done.out and "--json" in done.out


def test_no_arguments_is_help(penjing):
    done = penjing()
    assert done.code == 0 and "Usage: penjing" in done.out


def test_version(penjing):
    done = penjing("--version")
    assert (done.code, done.out) == (0, f"penjing {__version__}\n")


def test_help_and_its_verbs_load_no_torch():
    """What makes `penjing --help` quick, held without a stopwatch."""
    code = (
        "import sys; from penjing.cli.app import main; main(['--help']); main(['compress', '--help']); "
        "heavy = {'torch', 'onnxruntime', 'openvino', 'sklearn', 'scipy'} & set(sys.modules); sys.exit(len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("comprss",), "did you mean 'compress'?"),
        (("compress", "net.py:build"), "--data"),
        (("compress", "net.py:build", "--daat", "x"), "--data"),
        (("pack", "net.py:build"), "FILE"),
        (("compress", "net.py:build", "--data", "net.py:samples", "--seed", "-1"), "--seed"),
    ],
)
def test_usage_errors(penjing, args, says):
    done = penjing(*args)
    error, hint = done.err.splitlines()
    assert done.code == 2 and done.out == ""
    assert error.startswith("error: ") and says.lower() in error.lower()
    assert hint.startswith("hint: penjing") and "--help" in hint


def test_usage_error_with_json_is_one_object(penjing):
    done = penjing("pack", "net.py:build", "--json")
    assert done.code == 2
    assert "FILE" in done.json["error"] and done.json["hint"]


def test_a_bug_keeps_its_traceback_in_a_file(penjing, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("oops")

    monkeypatch.setattr("penjing.cli.unpack.output_file", broken)
    done = penjing("unpack", "a.penjing", "b.safetensors")
    error, hint = done.err.splitlines()
    assert done.code == 1
    assert error == "error: this is a bug in penjing: KeyError: 'oops'"
    kept = Path(hint.rpartition(" ")[2])
    assert "Traceback" in kept.read_text()
    kept.unlink()


def test_an_error_without_a_hint_still_gets_one(penjing, monkeypatch):
    def refuse(*args, **kwargs):
        raise InputError("no")

    monkeypatch.setattr("penjing.cli.unpack.output_file", refuse)
    done = penjing("unpack", "a.penjing", "b.safetensors")
    assert done.code == 2 and done.err.splitlines()[0] == "error: no" and done.err.splitlines()[1].startswith("hint: ")


def test_a_full_disk_is_no_bug(penjing, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "x.penjing")

    monkeypatch.setattr("penjing.cli.unpack.output_file", full)
    done = penjing("unpack", "a.penjing", "b.safetensors")
    assert done.code == 2
    assert done.err.splitlines()[0] == "error: x.penjing: no space left on device"


@pytest.mark.parametrize("kind", ["long", "loop"])
def test_a_name_that_no_file_can_have_is_no_bug(penjing, tmp_path, kind):
    (tmp_path / "loop").symlink_to("loop")
    name = "a" * 260 if kind == "long" else str(tmp_path / "loop" / "net.penjing")
    for verb in (("inspect", name), ("unpack", name, "b.safetensors")):
        done = penjing(*verb)
        error, hint = done.err.splitlines()
        assert done.code == 2 and "this is a bug" not in error and name in error and hint.startswith("hint: ")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_is_one_line_and_leaves_no_debris(desk, number, code):
    """Stopped while the person's own (slow) function runs; the same path clears away after every other one."""
    (desk / "slow.py").write_text(
        "import pathlib, time\ndef build():\n    pathlib.Path('started').touch()\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "penjing", "pack", "slow.py:build", "net.penjing", "--input-shape", "1x4"]
    # A suite started in the background hands down an ignored SIGINT, which Python then leaves ignored.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, cwd=desk, preexec_fn=heard)
    for _ in range(600):
        if (desk / "started").exists():
            break
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert out == "" and len(err.splitlines()) == 1 and "nothing was written" in err
    assert {p.name for p in desk.iterdir()} - {"__pycache__"} == {"net.py", "samples.npz", "slow.py", "started"}


def test_openvino_cannot_phone_home(penjing):
    penjing("--version")
    assert sys.modules["openvino_telemetry"] is None


def test_the_process_is_left_as_it_was(penjing):
    before = signal.getsignal(signal.SIGTERM), sys.stdout, os.fstat(1).st_ino
    penjing("inspect", "nothing.penjing")
    assert (signal.getsignal(signal.SIGTERM), sys.stdout, os.fstat(1).st_ino) == before


def test_entry_point_of_the_package_is_main():
    assert callable(app.main)
