"""Files that are never half written, and digests that tell inputs apart."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: str | os.PathLike[str], mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Open a file that takes the place of `path` when the block ends; an error leaves `path` as it was.

    Where `path` is a symbolic link, the file that it points to is replaced. The permissions stay. OSError where `path`
    is a folder, a device or a pipe.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    _remove_abandoned(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with open(partial, mode, **options) as file:
            if target.exists():
                shutil.copymode(target, partial)
            yield file
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _remove_abandoned(target: Path) -> None:
    """Remove what killed processes left half written beside `target`: files untouched for an hour."""
    name = re.compile(re.escape(f".{target.name}.") + r"\d+-\d+\.partial")
    with suppress(OSError):  # whatever is wrong with the folder, opening the file says better
        for entry in os.scandir(target.parent):
            if name.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - 3600:
                os.unlink(entry.path)


def digest_of(data: str | bytes) -> str:
    """Digest of a text or of bytes."""
    data = data.encode(errors="surrogateescape") if isinstance(data, str) else data
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest(tensors: Iterable[Tensor | None]) -> str:
    """Digest of the values of all tensors, in their order and dtype."""
    import torch

    hashed = hashlib.blake2b(digest_size=16)
    for t in tensors:
        if t is not None:
            hashed.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
