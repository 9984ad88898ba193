"""Places that cannot be written are refused before the work; nothing of anybody's is overwritten."""

import pytest

from penjing.cli.outputs import output_file, output_folder
from penjing.errors import OutputError


def test_a_new_file_is_fine_and_nothing_is_left_by_the_probe(tmp_path):
    assert output_file(str(tmp_path / "a.penjing")) == tmp_path / "a.penjing"
    assert output_file(str(tmp_path / "deep" / "er" / "a.penjing")).name == "a.penjing"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", ["folder", "device", "under_a_file", "suffix", "proc"])
def test_files_that_cannot_be(tmp_path, make):
    (tmp_path / "file").write_text("x")
    text = {
        "folder": str(tmp_path),
        "device": "/dev/null",
        "under_a_file": str(tmp_path / "file" / "a.penjing"),
        "suffix": str(tmp_path / "a.txt"),
        "proc": "/proc/a.penjing",
    }[make]
    with pytest.raises(OutputError) as caught:
        output_file(text, suffixes=(".penjing",) if make in ("suffix", "proc") else ())
    assert caught.value.hint


def test_folders(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "provenance.json").write_text("{}")
    assert output_folder(str(tmp_path / "new")).name == "new"
    assert output_folder(str(tmp_path / "empty")).name == "empty"
    assert output_folder(str(tmp_path / "bundle")).name == "bundle"
    with pytest.raises(OutputError, match="holds other files"):
        output_folder(str(tmp_path / "mine"))
    with pytest.raises(OutputError, match="not a folder"):
        output_folder(str(tmp_path / "mine" / "thesis.tex"))
