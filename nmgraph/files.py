"""Write files so that an interruption at any moment leaves what was there before."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from nmgraph.errors import FileError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def require_writable(path: Path, overwrite: bool, option: str = "-o") -> None:
    """Refuse an output before any work is done for it; ``option`` says where.

    Raises:
        FileError: if it exists and may not be overwritten, or could not be created where it shall be.
    """
    if path.exists() and not overwrite:
        raise FileError(
            f"{path} exists and is kept. Choose another place with {option}, or replace it with --overwrite (overwrite=True)."
        )
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileError(f"{path} is no regular file, and is kept. Choose another place with {option}.")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise FileError(f"{path} can't be written: there is no directory {parent}. Make it first.")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise FileError(f"{path} can't be written: {error.strerror}. Choose another place with {option}.") from error


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Give a temporary file to write to; on success it takes the place of ``path`` in one step.

    Raises:
        FileError: if the system refuses (disk full, no permission); ``path`` is unchanged then.
    """
    path = path.resolve()  # what a link leads to is replaced, not the link
    if path.is_dir():
        raise FileError(f"{path} is a directory. Give the name of a file in it.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.absolute().parent)
        except OSError as error:
            raise FileError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def directory_written_atomically(path: Path, ours: Collection[str] | None = None) -> Iterator[Path]:
    """Give a temporary directory to fill; on success it takes the place of ``path``, and an old one is removed.

    The two change places in one step on Linux, on all usual local file systems. Elsewhere the old one is renamed first, so
    that a process killed between the two renames leaves both beside ``path``, the old one as ``.NAME.*.old``.

    Args:
        path: the directory to make.
        ours: names in an old directory that go with it, by default all; whatever else lies there is taken along.

    Raises:
        FileError: if the system refuses; an old directory is unchanged then.
    """
    path, token = path.resolve(), secrets.token_hex(4)
    temporary, replaced = (path.with_name(f".{path.name}.{token}.{end}") for end in ("tmp", "old"))
    try:
        try:
            temporary.mkdir()
            yield temporary
            if ours is not None and path.is_dir():
                _take_along(path, temporary, ours)
            for file in temporary.rglob("*"):
                _sync(file)
            if _exchanged(temporary, path):
                temporary.rename(replaced)
            else:
                _replace_in_two_steps(temporary, path, replaced)
            _sync(path.absolute().parent)
            _remove(replaced)
        except OSError as error:
            raise FileError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        _remove(temporary)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False if one does not exist, or system or file system can't do that."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, TypeError, AttributeError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _replace_in_two_steps(new: Path, path: Path, replaced: Path) -> None:
    if path.exists():
        path.rename(replaced)
    try:
        new.rename(path)
    except OSError:
        if replaced.exists():
            replaced.rename(path)
        raise


def _take_along(old: Path, new: Path, ours: Collection[str]) -> None:
    for entry in old.iterdir():
        if entry.name not in ours:
            copy = shutil.copytree if entry.is_dir() else shutil.copy2
            copy(entry, new / entry.name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
