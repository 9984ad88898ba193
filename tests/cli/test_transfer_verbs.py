"""pack --layout, split, join, pull: a package on its way, from the command line."""

import pytest

SHAPE = ("--input-shape", "1x1x8x8")


@pytest.fixture
def packed(desk, penjing):
    """net.penjing, and net/ in the directory layout."""
    assert penjing("pack", "net.py:build", "net.penjing", *SHAPE).code == 0
    assert penjing("pack", "net.py:build", "--out", "net", "--layout", "directory", *SHAPE).code == 0
    return desk


@pytest.fixture
def url(packed, hosted):
    return hosted(packed)


def test_both_layouts_are_packed_alike(packed, penjing):
    file = (packed / "net.penjing").read_bytes()
    done = penjing(
        "pack", "net.py:build", "-o", "net", "--layout", "directory", "--json", *SHAPE
    )  # again, in its place
    assert done.json["bytes"] == sum(f.stat().st_size for f in (packed / "net").iterdir())
    assert file.startswith((packed / "net" / "manifest").read_bytes())
    assert penjing("join", "net", "--out", "joined.penjing").code == 0
    assert (packed / "joined.penjing").read_bytes() == file


def test_a_directory_is_a_model(packed, penjing):
    told = penjing("inspect", "net", "--json").json
    assert told["package"] == penjing("inspect", "net.penjing", "--json").json["package"]
    assert penjing("unpack", "net", "a.safetensors").code == penjing("unpack", "net.penjing", "b.safetensors").code == 0
    assert (packed / "a.safetensors").read_bytes() == (packed / "b.safetensors").read_bytes()
    assert (packed / "a.safetensors").stat().st_mode == (packed / "net.py").stat().st_mode  # for others to read, too


def test_split_and_join(packed, penjing):
    done = penjing("split", "net.penjing", "--into", "1", "--out", "volumes", "--json")
    assert done.json["volumes"] == ["volumes/net-1of1.pjv"]
    assert penjing("join", "volumes/net-1of1.pjv", "--out", "again", "--layout", "directory").code == 0
    assert penjing("split", "net", "--out", "other").code == 0
    assert penjing("split", "net.penjing", "--size", "0.1MiB", "--out", "sized").code == 0
    names = [{f.name: f.read_bytes() for f in (packed / folder).iterdir()} for folder in ("again", "other", "net")]
    assert names[0] == names[1] == names[2]


def test_pull(packed, penjing, url, monkeypatch):
    (packed / "here").mkdir()
    monkeypatch.chdir(packed / "here")
    for place in ("net.penjing", "net/", "net/manifest"):
        done = penjing("pull", f"{url}/{place}", "--json")
        assert done.code == 0 and done.json["path"] == "net.penjing" and done.json["complete"]
        assert done.json["fetched_bytes"] > 0
        assert (packed / "here" / "net.penjing").read_bytes() == (packed / "net.penjing").read_bytes()
        (packed / "here" / "net.penjing").unlink()
    assert penjing("pull", f"{url}/net", "--layout", "directory", "--until-bytes", "0").code == 0
    done = penjing("pull", f"{url}/net", "--layout", "directory", "--jobs", "1")
    assert done.code == 0 and "net: " in done.err
    assert {f.name for f in (packed / "here" / "net").iterdir()} == {f.name for f in (packed / "net").iterdir()}


def test_pulled_volumes_are_called_as_what_was_split(packed, penjing, url, monkeypatch):
    assert penjing("split", "net.penjing", "--into", "1", "--out", "volumes").code == 0
    assert penjing("split", "net.penjing", "--into", "1", "--out", "hosts", "--layout", "directory").code == 0
    (packed / "here").mkdir()
    monkeypatch.chdir(packed / "here")
    for place in ("volumes/net-1of1.pjv", "hosts/net-1of1/"):
        assert penjing("pull", f"{url}/{place}", "--json").json["path"] == "net.penjing"


def test_pull_that_ends_early_says_how_to_go_on(packed, penjing, url):
    done = penjing("pull", f"{url}/net.penjing", "-o", "early.penjing", "--until-bytes", "0", "--json")
    assert done.code == 0 and not done.json["complete"] and done.json["missing"] == [0]
    assert done.json["path"] == "early.penjing.pull" and "goes on" in done.err


@pytest.mark.parametrize(
    ("args", "says", "hints"),
    [
        (("pull", "file:///etc/passwd"), "got file://", "penjing join"),
        (("pull", "http://me:hunter2@127.0.0.1/"), "does not say what to call", "--out"),
        (("pull", "{url}/nothing"), "answers 404", "URL right"),
        (("pull", "{url}/net.py"), "not a .penjing package", ""),
        (("pull", "{url}/net", "--out", "net.zip"), "must end in .penjing", ""),
        (("pull", "{url}/net", "--jobs", "0"), "--jobs", ""),
        (("split", "net.penjing", "--into", "9", "--out", "v"), "cannot be split into 9", "from 1 to"),
        (("split", "net.penjing", "--size", "big", "--out", "v"), "'big' is no size", "10MB"),
        (("split", "nothing.penjing", "--out", "v"), "does not exist", ""),
        (("split", "net.penjing", "--into", "1", "--out", "net"), "holds other files", ""),
        (("join", "net.py", "--out", "x.penjing"), "not a .penjing package", ""),
        (("join", "net", "--out", "x.zip"), "must end in .penjing", ""),
        (("join", "net", "--out", "x.penjing", "--layout", "zip"), "layout must be file or directory", ""),
        (("pack", "net.py:build", "net", "--layout", "zip"), "layout must be file or directory", ""),
        (("pack", "net.py:build", "a.penjing", "--out", "b.penjing"), "FILE is given twice", ""),
        (("pack", "net.py:build"), "FILE is missing", ""),
    ],
)
def test_bad_input(packed, penjing, url, args, says, hints):
    before = sorted(f.name for f in packed.iterdir())
    done = penjing(*(a.format(url=url) for a in args))
    assert done.code == 2 and done.err.startswith("error: ") and "hunter2" not in done.err
    assert says in done.err and hints in done.err and "Traceback" not in done.err
    assert sorted(f.name for f in packed.iterdir()) == before
