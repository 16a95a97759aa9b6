"""Whatever happens while a file or a directory is written, there is the old one or the new one."""

import os
import sys
from pathlib import Path

import pytest

from nmgraph import files
from nmgraph.errors import FileError
from nmgraph.files import directory_written_atomically, require_writable, written_atomically


@pytest.fixture
def path(tmp_path):
    return tmp_path / "output"


def names(directory):
    return sorted(p.name for p in directory.iterdir())


@pytest.fixture
def old_directory(path):
    path.mkdir()
    (path / "old.txt").write_text("old")
    return path


def test_file_appears(path):
    with written_atomically(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(path.parent) == ["output"]


def test_file_is_replaced(path):
    path.write_text("old")
    with written_atomically(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_who_reads_the_old_file_meanwhile_reads_it_to_its_end(path):
    path.write_text("old")
    with path.open() as reader:
        with written_atomically(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_interrupted_file_leaves_the_old_one(error, path):
    path.write_text("old")

    def write():
        with written_atomically(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(path.parent) == ["output"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 is Linux's")
def test_at_no_moment_there_is_no_directory(old_directory, monkeypatch):
    """What a kill at any system call would leave: looked at between all of them that rename."""
    seen, rename = [], Path.rename

    def looking(self, target):
        seen.append(names(old_directory))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", looking)
    with directory_written_atomically(old_directory) as temporary:
        (temporary / "new.txt").write_text("new")
    assert seen == [["new.txt"]]
    assert names(old_directory.parent) == ["output"]


def test_directory_is_replaced_where_two_cannot_change_places(old_directory, without_exchange):
    with directory_written_atomically(old_directory) as temporary:
        (temporary / "new.txt").write_text("new")
    assert names(old_directory) == ["new.txt"]
    assert names(old_directory.parent) == ["output"]


def test_leftovers_of_a_killed_run_do_not_disturb_the_next(old_directory):
    leftover = old_directory.with_name(f".{old_directory.name}.0123abcd.tmp")
    leftover.mkdir()
    with directory_written_atomically(old_directory) as temporary:
        (temporary / "new.txt").write_text("new")
    assert names(old_directory) == ["new.txt"]
    assert leftover.is_dir()  # it may as well be that of another run that is at work


def test_interrupted_file_leaves_nothing_where_nothing_was(path):
    def write():
        with written_atomically(path) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert names(path.parent) == []


def test_full_disk_is_named_and_leaves_the_old_file(path):
    path.write_text("old")
    with pytest.raises(FileError) as caught, written_atomically(path):
        raise OSError(28, os.strerror(28))
    assert str(caught.value) == f"{path} could not be written: No space left on device."
    assert path.read_text() == "old"


def test_file_does_not_take_the_place_of_a_directory(old_directory):
    with pytest.raises(FileError) as caught, written_atomically(old_directory) as temporary:
        temporary.write_text("new")
    assert str(caught.value) == f"{old_directory} is a directory. Give the name of a file in it."
    assert names(old_directory) == ["old.txt"]
    assert names(old_directory.parent) == ["output"]


def test_relative_path_is_written_where_it_was_meant(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    with written_atomically(Path("output")) as temporary:
        temporary.write_text("new")
    with directory_written_atomically(Path("folder")) as temporary:
        (temporary / "a.txt").write_text("a")
    assert path.read_text() == "new"
    assert names(path.parent) == ["folder", "output"]


def test_directory_appears_whole(path):
    with directory_written_atomically(path) as temporary:
        (temporary / "a.txt").write_text("a")
        (temporary / "deep").mkdir()
        (temporary / "deep" / "b.txt").write_text("b")
        assert not path.exists()
    assert names(path) == ["a.txt", "deep"]
    assert names(path.parent) == ["output"]


def test_directory_is_replaced_whole(old_directory):
    with directory_written_atomically(old_directory) as temporary:
        (temporary / "new.txt").write_text("new")
        assert names(old_directory) == ["old.txt"]
    assert names(old_directory) == ["new.txt"]
    assert names(old_directory.parent) == ["output"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_interrupted_directory_leaves_the_old_one(error, old_directory):
    def write():
        with directory_written_atomically(old_directory) as temporary:
            (temporary / "new.txt").write_text("half of the n")
            raise error

    with pytest.raises(error):
        write()
    assert names(old_directory) == ["old.txt"]
    assert names(old_directory.parent) == ["output"]


@pytest.fixture
def without_exchange(monkeypatch):
    """A system on which two directories can't change places."""
    monkeypatch.setattr(files, "_exchanged", lambda *_: False)


def test_directory_that_cannot_take_its_place_leaves_the_old_one(old_directory, monkeypatch, without_exchange):
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".tmp"):
            raise OSError(5, os.strerror(5))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(FileError) as caught, directory_written_atomically(old_directory) as temporary:
        (temporary / "new.txt").write_text("new")
    assert str(caught.value) == f"{old_directory} could not be written: Input/output error."
    assert names(old_directory) == ["old.txt"]
    assert names(old_directory.parent) == ["output"]


@pytest.mark.parametrize("write", [written_atomically, directory_written_atomically])
def test_parent_that_does_not_exist_is_named(write, tmp_path):
    path = tmp_path / "none" / "output"
    with pytest.raises(FileError) as caught, write(path) as temporary:
        temporary.write_text("new")
    assert str(caught.value) == f"{path} could not be written: No such file or directory."


def test_existing_output_is_kept_unless_it_may_be_overwritten(path):
    path.write_text("old")
    with pytest.raises(FileError) as caught:
        require_writable(path, overwrite=False)
    assert str(caught.value) == (
        f"{path} exists and is kept. Choose another place with -o, or replace it with --overwrite (overwrite=True)."
    )
    require_writable(path, overwrite=True)
    assert path.read_text() == "old"


def test_output_in_a_missing_directory_is_refused(tmp_path):
    path = tmp_path / "none" / "output"
    with pytest.raises(FileError) as caught:
        require_writable(path, overwrite=True)
    assert str(caught.value) == f"{path} can't be written: there is no directory {path.parent}. Make it first."


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc takes no files")
def test_output_where_nothing_can_be_written_is_refused():
    path = Path("/proc/output")
    with pytest.raises(FileError) as caught:
        require_writable(path, overwrite=False)
    assert str(caught.value) == f"{path} can't be written: No such file or directory. Choose another place with -o."


def test_asking_leaves_nothing_behind(path):
    require_writable(path, overwrite=False)
    assert names(path.parent) == []
