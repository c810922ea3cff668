"""The features of a run, kept on disk beside its scores."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._files import replacing
from ..detector import GradNorm
from .run_log import features_part, parts_of, rank_and_world, resumable
from .tables import Table


class FeatureFile:
    """Features (N, D), row i of input i, kept while a run that writes `out` goes on.

    All processes of torchrun write to the same file. `finish` writes the .npy file, a row per row of the table.
    """

    def __init__(self, path: Path, out: Path, detector: GradNorm, n: int, resume: bool) -> None:
        assert detector.head_name is not None
        self.path, self.part = path, features_part(out)
        self.head = detector.model.get_submodule(detector.head_name)
        weight: torch.Tensor = self.head.weight  # type: ignore[assignment]
        self.dtype = np.float64 if weight.dtype == torch.float64 else np.float32
        self.shape = (n, weight.shape[1])
        self._rows: Any = None
        rows_kept = parts_of(out)
        if resume and rows_kept:
            self._check_kept()
        elif rank_and_world()[0] == 0:
            for part in rows_kept:  # first: a later run must not take their rows for those of the new, empty file
                part.unlink()
            self.part.unlink(missing_ok=True)
            self._create()

    def _check_kept(self) -> None:
        """Refuse to go on without the features of the rows that are kept; ValueError."""
        try:
            self._map("r")
        except (OSError, ValueError, EOFError):  # missing, no header, or shorter than that says
            state = "damaged" if self.part.exists() else "gone"
            message = f"save-features: {self.part} is {state}, with the features of the run; --restart starts over"
            raise ValueError(message) from None

    def _create(self) -> None:
        """Make the file, whole or not at all, with all its room: writing to a mapped file on a full disk kills."""
        size = math.prod(self.shape) * np.dtype(self.dtype).itemsize
        try:
            with replacing(self.part, "w+b") as file:
                header = {"descr": np.dtype(self.dtype).str, "fortran_order": False, "shape": self.shape}
                np.lib.format.write_array_header_1_0(file, header)
                file.flush()
                file.truncate(file.tell() + size)
                if size and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), file.tell(), size)
        except OSError as error:
            raise OSError(error.errno, f"{size} bytes of features: {error.strerror}", str(self.part)) from error

    def _map(self, mode: Any) -> Any:
        return np.lib.format.open_memmap(self.part, mode=mode)

    @contextmanager
    def recording(self, indices: list[int]) -> Iterator[None]:
        """Keep what the head is given in this block as the features of these inputs."""
        if self._rows is None:
            self._rows = self._map("r+")
        seen: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0].detach()), with_kwargs=True
        )
        try:
            yield
        finally:
            hook.remove()
        (features,) = seen
        self._rows[indices] = features.flatten(1).cpu().double().numpy()

    def finish(self, table: Table) -> None:
        """Write the features of the table's rows."""
        rows = np.load(self.part, mmap_mode="r")
        with resumable(self.path), replacing(self.path, "wb") as file:
            shape = (len(table.indices), rows.shape[1])
            np.lib.format.write_array_header_1_0(
                file, {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False, "shape": shape}
            )
            for start in range(0, len(table.indices), 4096):
                file.write(rows[table.indices[start : start + 4096]].tobytes())
