"""Whole files or none: write beside the target, then rename, so that nobody ever meets half a file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=path.suffix.lower(), prefix=f".{path.stem}-", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise ValueError(unwritable(path, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; it takes ``path``'s place when the block ends without an error.

    After an error nothing is left behind and an older ``path`` is untouched.

    Raises:
        ValueError: the disk says no.
    """
    path, aside = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        new = aside / "new"
        new.mkdir()
        yield new
        if path.exists():
            path.rename(aside / "old")
        new.rename(path)
    except OSError as error:
        raise ValueError(unwritable(path, error)) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


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


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
