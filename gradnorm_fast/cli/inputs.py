"""Which files a run reads: the images under folders, each once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

EXTENSIONS = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"])


def find_images(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """All images under the folders (or named themselves), each once, sorted by path within each folder.

    ValueError if there are none.
    """
    found: list[str] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            if not folder.exists():
                raise ValueError(f"images: no folder {folder}")
            found.append(str(folder))
            continue
        inside = _images_in(folder)
        if not inside:
            raise ValueError(f"images: no image in {folder} (looked for {' '.join(sorted(EXTENSIONS))})")
        found += inside
    return list(dict.fromkeys(found))


def _images_in(folder: Path) -> list[str]:
    """Sorted; linked folders are followed, each folder visited once, so that links in a circle end."""

    def unreadable(error: OSError) -> None:
        raise error

    found, visited = [], set()
    for root, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        images = (Path(root, file) for file in files if os.path.splitext(file)[1].lower() in EXTENSIONS)
        # no pipes; but links to nothing, which are then reported as unreadable
        found += [str(image) for image in images if image.is_file() or image.is_symlink()]
    return sorted(found)
