"""Which images a run reads: under folders, named by lists, or inside tar shards; each once, in a fixed order."""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

EXTENSIONS = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"])
LISTS = frozenset([".txt", ".lst", ".list"])


class Input(NamedTuple):
    """One image."""

    name: str  #: as the table shows it
    path: str  #: the file to read
    offset: int = 0  #: where the image begins in the file
    size: int | None = None  #: of the image in bytes; None: to the end of the file
    label: int | None = None  #: its class, where a list or a shard tells


def find_inputs(sources: Sequence[str | os.PathLike[str]], root: str | os.PathLike[str] = "") -> list[Input]:
    """The images of all sources in their order, each once.

    Args:
        sources: folders, searched through for images or, where there is none, for shards, sorted by path; image files;
            lists of paths (.txt, one path a line, or an OpenOOD image list with "path label"); "-" for such a list on
            the standard input; .tar shards in the layout of webdataset, with the label in KEY.cls.
        root: what relative paths in lists are relative to; by default the current folder.

    Raises:
        ValueError: a source that is not there, holds no image, or is neither file nor folder.
    """
    found: list[Input] = []
    for source in (os.fspath(s) for s in sources):
        if source == "-":
            if os.environ.get("WORLD_SIZE", "1") != "1":  # each process would get a part of it
                raise ValueError("images: expected files or folders where several processes read them, got -")
            found += _listed(sys.stdin.buffer.read(), "the standard input", root)
        elif os.path.isdir(source):
            found += _in_folder(source)
        elif not os.path.exists(source):
            raise ValueError(f"images: no file or folder {source}")
        elif not os.path.isfile(source):
            raise ValueError(f"images: expected a file or a folder, {source} is neither")
        elif source.endswith(".tar"):
            found += _in_shard(source)
        elif os.path.splitext(source)[1] in LISTS:
            found += _listed(Path(source).read_bytes(), source, root)
        else:
            found.append(_image(source))
    unique: dict[tuple[str, int], Input] = {}
    for item in found:
        unique.setdefault((item.path, item.offset), item)
    return list(unique.values())


def _in_folder(folder: str) -> list[Input]:
    """Sorted; linked folders are followed, each folder visited once, so that links in a circle end."""

    def unreadable(error: OSError) -> None:
        raise error

    found: list[str] = []
    shards: list[str] = []
    visited = set()
    for root, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        paths = [os.path.join(root, file) for file in files]
        found += [p for p in paths if os.path.splitext(p)[1].lower() in EXTENSIONS and _is_file_or_nothing(p)]
        shards += [p for p in paths if p.endswith(".tar") and os.path.isfile(p)]
    if not found and shards:
        return [image for shard in sorted(shards) for image in _in_shard(shard)]
    if not found:
        raise ValueError(f"images: no image in {folder} (looked for {' '.join(sorted(EXTENSIONS))})")
    return [_image(path) for path in sorted(found)]


def _image(path: str, label: int | None = None) -> Input:
    path = str(Path(path))
    return Input(path, path, label=label)


def _is_file_or_nothing(path: str) -> bool:
    """A regular file, or a broken link, which is then reported as unreadable; not a pipe or a device."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def _listed(content: bytes, source: str, root: str | os.PathLike[str]) -> list[Input]:
    if b"\0" in content:
        raise ValueError(f"images: expected a list of paths, one a line, in {source}, got binary data")
    found = []
    content = content.removeprefix(codecs.BOM_UTF8)
    for line in (os.fsdecode(line.rstrip(b"\r")) for line in content.split(b"\n")):
        if not line.strip():
            continue
        path, label = line, None
        before, _, last = line.rpartition(" ")
        if before and last.removeprefix("-").isdecimal() and not os.path.exists(os.path.join(root, line)):
            path, label = before.rstrip(), int(last)
        found.append(
            _image(os.path.join(root, path), None if label is None or label < 0 else label)
        )  # -1: OpenOOD's OOD
    if not found:
        raise ValueError(f"images: no path in {source}")
    return found


def _in_shard(path: str) -> list[Input]:
    found: list[tuple[str, Input]] = []
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                folder, _, base = member.name.rpartition("/")
                key = f"{folder}/{base.split('.')[0]}"  # webdataset: up to the first dot
                suffix = os.path.splitext(base)[1].lower()
                if not member.isreg() or member.issparse():
                    continue
                if suffix == ".cls":
                    text = shard.extractfile(member).read(64).decode("ascii", "replace").strip()  # type: ignore[union-attr]
                    if not text.isdecimal():
                        raise ValueError(f"images: expected a class number in {path}:{member.name}, got {text!r}")
                    labels[key] = int(text)
                elif suffix in EXTENSIONS:
                    found.append((key, Input(f"{path}:{member.name}", path, member.offset_data, member.size)))
            end = shard.offset
        _check_end(path, end, len(found))
    except tarfile.TarError as error:
        raise ValueError(f"images: cannot read {path} as an uncompressed tar file: {error}") from None
    if not found:
        raise ValueError(f"images: no image in {path} (looked for {' '.join(sorted(EXTENSIONS))})")
    return [item._replace(label=labels.get(key)) for key, item in found]


def _check_end(path: str, end: int, images: int) -> None:
    """Refuse a shard without the blocks of zeros that end it, or with more than those; ValueError.

    tarfile takes a damaged header, a cut between two files, and the end of the first of several shards in one file all
    for the end, and would lose what follows.
    """
    with open(path, "rb") as file:
        file.seek(end)
        first = rest = file.read(tarfile.BLOCKSIZE)
        while rest and not rest.strip(b"\0"):
            rest = file.read(1 << 20)
    if rest or len(first) < tarfile.BLOCKSIZE:
        what = "damaged, cut off, or continued" if rest else "cut off: it has no end mark"
        raise ValueError(f"images: {path} is {what} at byte {end}, after {images} images")


def with_folder_labels(inputs: list[Input], folder: str) -> list[Input]:
    """Labels by the sorted names of the folders in `folder`, as torchvision's ImageFolder numbers them.

    ValueError where an image lies in none.
    """
    number = {name: i for i, name in enumerate(class_folders(folder))}
    labelled = []
    for item in inputs:
        first = os.path.relpath(item.path, folder).split(os.sep)[0]
        if first not in number:
            raise ValueError(f"id: expected every image in a folder of its class, {item.name} is in none")
        labelled.append(item._replace(label=number[first]))
    return labelled


def labelled_if_in_folders(inputs: list[Input], source: str) -> list[Input]:
    """`with_folder_labels` where the source is a folder and every image lies in a folder of it; else as they are."""
    try:
        return with_folder_labels(inputs, source) if os.path.isdir(source) else inputs
    except ValueError:
        return inputs


def evenly_spaced(inputs: list[Input], limit: int) -> list[Input]:
    """At most `limit` of them, so that all parts of a sorted folder are there."""
    if len(inputs) <= limit:
        return inputs
    return [inputs[i * len(inputs) // limit] for i in range(limit)]


def class_folders(folder: str) -> list[str]:
    """The names of the folders in `folder`, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def identities(inputs: Sequence[Input], content: bool = False) -> Iterator[int]:
    """64 bits of each input's name and its file's size and time of change, or with `content` of its bytes."""
    known: dict[str, bytes] = {}
    for item in inputs:
        if content:
            state = _content(item)
        else:
            if item.path not in known:
                known = {item.path: _size_and_time(item.path)}  # the images of a shard follow one another
            state = known[item.path]
        hashed = hashlib.blake2b(os.fsencode(item.name) + b"\0" + state, digest_size=8)
        yield int.from_bytes(hashed.digest(), "little")


def _size_and_time(path: str) -> bytes:
    try:
        status = os.stat(path)
    except OSError:
        return b"nothing"
    return f"{status.st_size} {status.st_mtime_ns}".encode()


def _content(item: Input) -> bytes:
    try:
        return hashlib.blake2b(read_bytes(item)).digest()
    except OSError:
        return b"nothing"


def read_bytes(item: Input) -> bytes:
    """The bytes of the image. OSError if it is no regular file, or is truncated."""
    with open(item.path, "rb", opener=_open_file) as file:
        file.seek(item.offset)
        data = file.read(-1 if item.size is None else item.size)
    if item.size is not None and len(data) < item.size:
        raise OSError(f"cut off after {len(data)} of {item.size} bytes")
    return data


def _open_file(path: str, flags: int) -> int:
    """Open a regular file; a pipe would wait for a writer without end."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a file")
    return descriptor


def check_output(option: str, out: str | os.PathLike[str], read: Iterable[str | os.PathLike[str] | None]) -> None:
    """Refuse an output that is one of the files a run reads, or lies in a folder it reads; ValueError.

    A run would destroy the first; a second run would take what the first one wrote for an input of the other.
    """
    target = os.path.realpath(out)
    if os.path.exists(target) and not os.path.isfile(target) and not os.path.isdir(target):
        raise ValueError(f"{option}: expected a regular file, got a device or a pipe: {os.fspath(out)}")
    for source in (os.fspath(path) for path in read if path is not None):
        if os.path.isdir(source):
            if Path(target).is_relative_to(os.path.realpath(source)):
                raise ValueError(f"{option}: {os.fspath(out)} lies in {source}, which is read; choose another place")
        elif os.path.realpath(source) == target or (
            os.path.exists(source) and os.path.exists(target) and os.path.samefile(source, target)
        ):
            raise ValueError(f"{option}: {os.fspath(out)} is read by this run; writing would destroy it")


def check_apart(option: str, pictures: Iterable[str | os.PathLike[str]], inputs: Iterable[Input]) -> None:
    """Refuse an input that is a picture the run draws, which a list or a linked folder may lead to; ValueError."""
    drawn = {os.path.realpath(picture) for picture in pictures}
    names = {os.path.basename(picture) for picture in drawn}
    for item in inputs:
        if os.path.basename(item.path) in names and os.path.realpath(item.path) in drawn:
            raise ValueError(
                f"{option}: {item.name}, which would be scored, is drawn by this run; choose another place"
            )
