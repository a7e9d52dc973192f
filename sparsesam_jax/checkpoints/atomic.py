"""Files that are written whole or not at all, and whether they can be written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

# Temporary files of this process that are being written. Whoever ends the process at once, as the
# command line does when it is interrupted inside the compiler, removes them first.
unfinished: set[Path] = set()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, mark: str | None = None) -> Iterator[Path]:
    """A temporary path that takes its name once the body has written it whole.

    It lies beside `path`; beside the target, which is then replaced, where `path` is a symbolic
    link. When the body raises, the temporary file goes and what was at `path` stays as it was.

    Args:
        path: The file.
        mark: What tells the temporary file from others' of the same file; None is the process's
            number. Who never writes a file twice at once may say another: then what a killed
            process left behind is overwritten by the next.

    Raises:
        OSError: The file cannot be written; the message names `path`.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary(target, mark)
    unfinished.add(temporary)
    try:
        yield temporary
        # Without it a crash of the machine can leave the new name on an empty file.
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if error.filename is not None and os.fspath(error.filename) == str(temporary):
            raise type(error)(error.errno, error.strerror, os.fspath(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
        unfinished.discard(temporary)


def check_file(path: str | os.PathLike[str], name: str = "output") -> None:
    """Raise ValueError unless a file can be written at `path`, and leave nothing there.

    Args:
        path: The file; one that exists will do.
        name: What the message calls it.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ValueError(f"{name} must lie in a folder that exists, got {os.fspath(path)!r}")
    if target.is_dir():
        raise ValueError(
            f"{name} must be a file that can be written, got {os.fspath(path)!r}, a folder"
        )
    _try(_temporary(target), f"{name} must be a file that can be written, got {os.fspath(path)!r}")


def check_folder(path: str | os.PathLike[str], name: str = "out") -> None:
    """Raise ValueError unless `path` is, or can become, a folder with files; it is not made.

    Args:
        path: A folder, or a new name in one.
        name: What the message calls it.
    """
    folder = Path(os.path.realpath(path))
    message = f"{name} must be a folder, or a new one in a folder, got {os.fspath(path)!r}"
    if not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(message)
    _try(_temporary(folder / "file"), message)


def _temporary(target: Path, mark: str | None = None) -> Path:
    return target.with_name(f".{target.name}.{mark or os.getpid()}.partial")


def _try(path: Path, message: str) -> None:
    # Permissions alone do not say it: a file system may be read-only, full or none of files.
    try:
        with open(path, "xb"):
            pass
    except OSError as error:
        raise ValueError(f"{message}: {error.strerror}") from error
    path.unlink()
