"""Atomic writes, locks, and careful reading of files.

A file is written beside its target, synced to the disk and renamed. So no reader ever sees a partial file, not even
after a power failure. Files from elsewhere (a run folder that somebody sent) may be damaged or contain links:
`from_json` raises ValueError for them, and `is_own` detects links that lead out of a folder.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

try:
    import fcntl
except ImportError:  # Windows has no fcntl; there locks do nothing
    fcntl = None

DEEPEST = 100  # nesting levels of a JSON file; code that walks its values recursively stays below Python's limit
LARGEST = 2**28  # bytes of a text file that a user names: some millions of captions or prompts


@contextmanager
def replacing(path: str | Path, accepted: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which replaces ``path`` when the block ends without an error.

    Creates the folder if it is missing. After an error the temporary file is removed and an older ``path`` stays.

    Args:
        path: the target.
        accepted: suffixes that the target may have, such as (".glb", ".obj"); empty accepts any.

    Raises:
        ValueError: the suffix is not accepted, or the file cannot be written.
    """
    path = Path(path)
    if accepted and path.suffix.lower() not in accepted:
        raise ValueError(f"cannot write '{path}': the name must end in {' or '.join(accepted)}")
    temporary = handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=path.suffix.lower(), prefix=f".{path.stem}-", dir=path.parent)
        temporary = Path(name)
        _hold(handle)  # while the handle is open, `sweep` does not remove the file
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        to_disk(temporary)
        temporary.replace(path)
        to_disk(path.parent)
    except OSError as error:
        raise ValueError(unwritable(path, error)) from error
    finally:
        if temporary is not None and handle is not None:
            temporary.unlink(missing_ok=True)
            os.close(handle)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``, which replaces ``path`` when the block ends without an error.

    After an error the temporary folder is removed and an older ``path`` stays.

    Raises:
        ValueError: the folder cannot be written.
    """
    path, aside, handle = Path(path), None, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        handle = os.open(aside, os.O_RDONLY)
        _hold(handle)
        new = aside / "new"
        new.mkdir()
        yield new
        for written in (*new.rglob("*"), new):
            to_disk(written)
        if os.path.lexists(path):
            path.rename(aside / "old")
        new.rename(path)
        to_disk(path.parent)
    except OSError as error:
        raise ValueError(unwritable(path, error)) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)  # does not follow links
        if handle is not None:
            os.close(handle)


def to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. Raise OSError if that fails."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def sweep(folder: Path, stems: str) -> None:
    """Remove temporary files and folders that processes left in ``folder`` when they died in `replacing`.

    Files of living processes, links, and files whose names `replacing` does not produce stay.

    Args:
        stems: a regular expression that matches the targets' names without suffix.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = re.fullmatch(rf"\.({stems})-[a-z0-9_]{{8}}(\.\w+)?", path.name)
        if name is None or path.is_symlink() or _is_held(path):
            continue
        if not path.is_dir():
            path.unlink(missing_ok=True)
            continue
        target = folder / name[1]
        if (path / "old").is_dir() and not os.path.lexists(target):  # the process died between the two renames
            (path / "old").rename(target)
        shutil.rmtree(path, ignore_errors=True)


def lock(path: Path, busy: str) -> TextIO:
    """Lock a file against other processes until the returned file is closed or this process ends in any way.

    If the file system has no locks, other processes are not kept out, and a warning says so.

    Args:
        path: the lock file, created if it is missing; it is not removed.
        busy: the error message if another process holds the lock.

    Raises:
        ValueError: another process holds the lock, or the path is no regular file or cannot be written.
    """
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"{path} is no lock file but a link, a folder, a pipe or a device: remove it")
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise ValueError(unwritable(path, error)) from error
    file = os.fdopen(handle, "r+", encoding="utf-8", errors="replace")
    try:
        _lock(handle)
    except BlockingIOError as error:
        holder = " ".join(file.read(200).split())
        file.close()
        raise ValueError(f"{busy} (by {holder or 'another process'})") from error
    except OSError as error:
        warnings.warn(
            f"{path.parent} has no locks ({error.strerror}): make sure that no other process works there", stacklevel=2
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def is_own(path: Path, folder: Path) -> bool:
    """Return whether ``path`` is inside ``folder`` after links are resolved."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def user_path(text: str | Path) -> Path:
    """Return a user's path with ~ expanded. Raise ValueError if no file can have this path."""
    try:
        if "\0" in str(text):
            raise ValueError("it has a NUL character")
        path = Path(text).expanduser()
        path.exists()  # raises if no file can have this name
    except RuntimeError as error:
        raise ValueError(f"{str(text)!r:.80} names a user who is not here; give a path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{str(text)!r:.80} is no path here: {reason}") from error
    return path


def read_text(path: Path, largest: int = LARGEST) -> str:
    """Return the text of a regular UTF-8 file of at most ``largest`` bytes.

    Raises:
        ValueError: the file does not exist, is a pipe, a device or a folder, is larger, or is not UTF-8.
    """

    def at_once(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # else opening a pipe waits for a writer

    try:
        with open(path, "rb", opener=at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # reading a device may never end
                raise ValueError(f"cannot read {path}: it is no regular file")
            data = file.read(largest + 1)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > largest:
        raise ValueError(f"cannot read {path}: it is larger than {largest:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}: it is not UTF-8: save it as UTF-8") from error


def from_json(text: str | bytes) -> Any:
    """Parse JSON. Raise ValueError if it is not JSON, or is nested more than DEEPEST levels deep."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    layer, depth = [value], 0
    while layer:
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += 1
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
    return value


def require_folder(path: Path) -> None:
    """Create a folder if it is missing. Raise ValueError if files cannot be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(unwritable(path, error)) from error


def unwritable(path: Path, error: OSError) -> str:
    """Return the error message for a path that cannot be written."""
    return (
        f"cannot write {path}: {error.strerror or error}; make room, or name another place "
        "(for runs out=FOLDER; an existing run can be moved whole)"
    )


def _lock(handle: int) -> None:
    """Lock an open file or folder. Raise BlockingIOError if another process holds it, OSError if there are no locks."""
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "this system has none")
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _hold(handle: int) -> None:
    """Lock this process's temporary file if the file system has locks."""
    try:
        _lock(handle)
    except OSError:
        pass  # `sweep` cannot lock the file either, so it does not remove it


def _is_held(path: Path) -> bool:
    """Return whether a living process holds a temporary file; True if that cannot be determined."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return True
    try:
        _lock(handle)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
