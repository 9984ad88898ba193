"""Some of the files of tests/package/corrupt, met from the command line: two lines and exit code 2, nothing written."""

from pathlib import Path

import pytest

PACKAGES = Path(__file__).resolve().parents[1] / "package"


@pytest.mark.parametrize(
    "command",
    [
        ("unpack", "bomb.penjing", "out.safetensors"),
        ("inspect", "depth-100000.penjing"),
        ("inspect", "name-for-terminals.penjing"),
        ("unpack", "directory-part-a-link", "out.safetensors"),
        ("patch", "sound.penjing", "delta-of-another.penjing", "out.penjing"),
        ("decrypt", "sealed-swapped.penjing", "out.penjing", "--identity", "sealed.key"),
        ("split", "huge-topology.penjing", "--out", "out"),
        ("join", "volumes-two-manifests/net-1of2.pjv", "volumes-two-manifests/net-2of2.pjv", "--out", "out.penjing"),
    ],
    ids=lambda command: f"{command[0]}-{command[1].split('/')[0]}",
)
def test_the_command_line_says_it_in_two_lines(command, desk, penjing):
    before = sorted(desk.iterdir())
    places = {"sealed.key": PACKAGES / "golden" / "sealed.key"}
    arguments = [PACKAGES / "corrupt" / a if (PACKAGES / "corrupt" / a).exists() else places.get(a, a) for a in command]
    done = penjing(*map(str, arguments))
    lines = done.err.splitlines()
    assert done.code == 2 and [line.split(": ")[0] for line in lines] == ["error", "hint"]
    assert done.err.replace("\n", "").isprintable() and not done.out and sorted(desk.iterdir()) == before
