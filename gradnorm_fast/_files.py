"""Files that are never half written, and digests that tell inputs apart."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: str | os.PathLike[str], mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Open a file that takes the place of `path` when the block ends; an error leaves `path` as it was.

    Where `path` is a symbolic link, the file that it points to is replaced.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with open(partial, mode, **options) as file:
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


def digest_of(data: str | bytes) -> str:
    """Of a text or of bytes."""
    data = data.encode(errors="surrogateescape") if isinstance(data, str) else data
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest(tensors: Iterable[Tensor | None]) -> str:
    """Of the values of all tensors, in their order and dtype."""
    import torch

    hashed = hashlib.blake2b(digest_size=16)
    for t in tensors:
        if t is not None:
            hashed.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
