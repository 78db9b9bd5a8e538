"""Whole files or none, and no other files than one's own.

A file is written beside its target, brought to the disk and renamed, so that nobody ever meets half a file, not even
after the power failed. What came from elsewhere (a run folder that somebody sent) may be damaged or may hold links:
`from_json` refuses with a ValueError, `is_own` finds links that lead out of a folder.
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
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    pass

try:
    import fcntl
except ImportError:  # not on Windows, where nobody is kept out
    fcntl = None

DEEPEST = 100  # levels of a JSON file; what goes over its values calls itself, a thousand times at most
LARGEST = 2**28  # bytes of a text that a user names: some million captions or prompts


@contextmanager
def replacing(path: str | Path, accepted: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes ``path``'s place when the block ends without an error.

    Makes the folder where it is missing. After an error nothing is left behind and an older ``path`` is untouched.

    Args:
        path: the target.
        accepted: suffixes the target may have, such as (".glb", ".obj"); any if empty.

    Raises:
        ValueError: the suffix is not accepted, or the disk says no.
    """
    path = Path(path)
    if accepted and path.suffix.lower() not in accepted:
        raise ValueError(f"cannot write '{path}': the name must end in {' or '.join(accepted)}")
    temporary = handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=path.suffix.lower(), prefix=f".{path.stem}-", dir=path.parent)
        temporary = Path(name)
        _hold(handle)  # while it is open, `sweep` leaves it alone
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
    """Yield a temporary folder beside ``path``; it takes ``path``'s place when the block ends without an error.

    After an error nothing is left behind and an older ``path`` is untouched.

    Raises:
        ValueError: the disk says no.
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
            shutil.rmtree(aside, ignore_errors=True)  # which does not follow links
        if handle is not None:
            os.close(handle)


def to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. Raises OSError where it gets none."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some file systems have it for no folder
            raise
    finally:
        os.close(handle)


def sweep(folder: Path, stems: str) -> None:
    """Remove the temporary files and folders that processes left in ``folder`` when they died in `replacing`.

    Those of living processes stay, and so does what is a link, or whose name is none that `replacing` gives.

    Args:
        stems: a regular expression of the targets' names without suffix.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = re.fullmatch(rf"\.({stems})-[a-z0-9_]{{8}}(\.\w+)?", path.name)
        if name is None or path.is_symlink() or _is_held(path):
            continue
        if not path.is_dir():
            path.unlink(missing_ok=True)
            continue
        target = folder / name[1]
        if (path / "old").is_dir() and not os.path.lexists(target):  # it died between the two renames
            (path / "old").rename(target)
        shutil.rmtree(path, ignore_errors=True)


def lock(path: Path, busy: str) -> TextIO:
    """Keep other processes out until the file that this returns is closed, or this process ends, however it ends.

    Where the file system has no locks nobody is kept out, and a warning says so.

    Args:
        path: the lock's file, made where it is missing; it stays.
        busy: what to say where another process holds it.

    Raises:
        ValueError: another process holds it, it is no file of this folder, or it cannot be written.
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
            f"{path.parent} has no locks ({error.strerror}): see to it that no other process works there", stacklevel=2
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def is_own(path: Path, folder: Path) -> bool:
    """Whether ``path`` is inside ``folder`` wherever links on the way to it lead."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def user_path(text: str | Path) -> Path:
    """A path as a user wrote it, with ~ opened. Raises ValueError where it can be none."""
    try:
        if "\0" in str(text):
            raise ValueError("it has a NUL character")
        path = Path(text).expanduser()
        path.exists()  # which raises where no file can have the name
    except RuntimeError as error:
        raise ValueError(f"{str(text)!r:.80} names a user who is not here; give a path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{str(text)!r:.80} is no path here: {reason}") from error
    return path


def read_text(path: Path, largest: int = LARGEST) -> str:
    """The text of a regular file of at most ``largest`` bytes, in UTF-8.

    Raises:
        ValueError: there is no such file; it is a pipe, a device or a folder; it is larger, or not in UTF-8.
    """

    def at_once(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # else a pipe is opened when somebody writes to it

    try:
        with open(path, "rb", opener=at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # which may never end
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
    """What JSON says. Raises ValueError for anything that is none, or that is nested more than DEEPEST deep."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    layer, depth = [value], 0
    while layer:
        layer = [
            inner
            for one in layer
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        depth += 1
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
    return value


def require_folder(path: Path) -> None:
    """Make a folder where it is missing. Raises ValueError where nothing can be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(unwritable(path, error)) from error


def unwritable(path: Path, error: OSError) -> str:
    """One sentence for a user whose disk said no."""
    return (
        f"cannot write {path}: {error.strerror or error}; make room, or name another place "
        "(for runs out=FOLDER; an existing run can be moved whole)"
    )


def _lock(handle: int) -> None:
    """Lock an open file or folder for this process. Raises BlockingIOError where it is locked, or another OSError."""
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "this system has none")
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _hold(handle: int) -> None:
    """Lock a temporary file of one's own, where there are locks."""
    try:
        _lock(handle)
    except OSError:
        pass  # then `sweep` cannot lock it either, and leaves it


def _is_held(path: Path) -> bool:
    """Whether a living process has a temporary file, or nobody can say."""
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
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
