"""Executes the launches of a call on the emulator, and collects what it finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import triton

from . import driver
from .machine import Machine, Options
from .memory import Region
from .ptx import Array, Program
from .translation import translate

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
Edit = Callable[[str, str], str]  # (kernel, PTX) -> PTX


@lru_cache(64)
def program(ptx: str, cut: int) -> Program:
    return translate(Program(ptx, cut))


class Emulator:
    """Compiles and executes kernels for sm_<arch> while it is the last one made.

    `inputs` may be read, element by element, and not written; other tensors that a kernel is given may be both. `edit`
    spoils a kernel on purpose.
    """

    def __init__(
        self, arch: int, options: Options, inputs: dict[str, torch.Tensor], processors: int, edit: Edit | None
    ) -> None:
        self.options, self.edit = options, edit
        options.copies_unfenced = TRITON < (3, 8)  # as these compile them
        self.inputs = {t.untyped_storage().data_ptr(): (name, t) for name, t in inputs.items()}
        self.findings: Counter[str] = Counter()
        torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
        driver.install(arch, self.execute, processors)

    def execute(self, launch: driver.Launch) -> None:
        ptx = self.edit(launch.metadata.name, launch.ptx) if self.edit else launch.ptx
        cut = 60 if self.options.schedule == "random" else 0
        machine = Machine(program(ptx, cut), launch, self._regions(launch.tensors), self.options)
        try:
            machine.run()
        finally:
            self.findings.update(machine.findings)

    def _regions(self, tensors: list[torch.Tensor]) -> list[Region]:
        found = {}
        for i, t in enumerate(tensors):
            start, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
            name, declared = self.inputs.get(start, (f"argument {i} {t.dtype} {list(t.shape)}", None))
            if size:
                found[start] = Region(start, size, name, declared is not None, _elements(declared))
        return list(found.values())


def _elements(t: torch.Tensor | None) -> Array | None:
    """Which bytes of its storage are elements of a tensor; None if all are."""
    if t is None:
        return None
    used = torch.zeros(t.untyped_storage().nbytes() // t.element_size(), dtype=torch.bool)
    used.as_strided(t.shape, t.stride(), t.storage_offset())[...] = True
    return None if used.all() else np.repeat(used.numpy(), t.element_size())
