"""Progress of long work: tqdm on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Of `total` units of work; nothing is shown, but `say` still speaks, without `show`."""

    def __init__(self, total: int, unit: str, show: bool) -> None:
        self.total, self.done, self.unit, self.show = total, 0, unit, show
        self.said = self.start = time.monotonic()
        self.bar: Any = None
        if show and sys.stderr.isatty():
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, unit=f" {unit}")

    def advance(self, n: int) -> None:
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif self.show and (time.monotonic() - self.said > 30 or self.done == self.total):
            self.said = time.monotonic()
            rate = self.done / max(1e-9, self.said - self.start)
            print(f"{self.done}/{self.total} {self.unit}, {rate:.0f}/s", file=sys.stderr)

    def say(self, message: str) -> None:
        self.bar.write(message, file=sys.stderr) if self.bar is not None else print(message, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
