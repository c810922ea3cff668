"""Progress of long work: tqdm on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")


def with_bar(items: Iterable[Item], description: str = "GradNorm", unit: str = "batch") -> Iterable[Item]:
    """The same items, with a bar where tqdm is installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    bar: Iterable[Item] = tqdm(items, desc=description, unit=unit, leave=False)
    return bar


class Progress:
    """The progress of `total` units of work. Without `show` only `say` prints."""

    def __init__(self, total: int, unit: str, show: bool) -> None:
        self.unit, self.show = unit, show
        self.bar: Any = None
        self._begin(total)

    def _begin(self, total: int) -> None:
        self.total, self.done, self.waited = total, 0, 0.0
        self.said = self.started = time.monotonic()

    def start(self, total: int) -> None:
        """Begin to count, now that the total is known."""
        self._begin(total)
        if self.show and sys.stderr.isatty():
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, unit=f" {self.unit}")

    def advance(self, n: int, waited: float = 0.0) -> None:
        """n more are done, for which the work waited so many seconds."""
        self.done += n
        self.waited += waited
        if self.bar is not None:
            self.bar.set_postfix_str(self.bottleneck(), refresh=False)
            self.bar.update(n)
        elif self.show and (time.monotonic() - self.said > 30 or self.done == self.total):
            self.said = time.monotonic()
            rate = self.done / max(1e-9, self.said - self.started)
            note = self.bottleneck()
            print(
                f"{self.done}/{self.total} {self.unit}, {rate:.0f}/s" + (f", {note}" if note else ""), file=sys.stderr
            )

    def bottleneck(self) -> str:
        """The bottleneck, reading the input or the model; empty in the first seconds."""
        elapsed = time.monotonic() - self.started
        if elapsed < 5:
            return ""
        share = self.waited / elapsed
        slow = "reading is slow, try more --workers" if share > 0.5 else "the model is slow"
        return f"{slow} ({100 * max(share, 1 - share):.0f}% of the time)"

    def say(self, message: str) -> None:
        self.bar.write(message, file=sys.stderr) if self.bar is not None else print(message, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
