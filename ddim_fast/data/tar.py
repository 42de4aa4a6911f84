"""Tar files of images, as WebDataset makes them: files that follow each other and share a name are one sample."""

from __future__ import annotations

import functools
import itertools
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..io.decoding import image_suffixes
from ..io.files import is_hidden, one_line

__all__ = ["Sample", "expand_braces", "read_tar"]

_REMEDY = "copy or download it again, or unpack it and name the folder"

# Bytes of a label's file, .cls or .json; captions and other metadata may be in the latter.
_LARGEST_LABEL = 2**20


class Sample(NamedTuple):
    """A sample, not read yet. What its functions raise, ValueError or OSError, is about this sample alone.

    Attributes:
        place: the tar file, the sample's number and its name.
        image: returns the encoded image.
        label: returns its class, a number or a name, from a ``.cls`` file or as "label" of a ``.json`` file; None if there is
            none.
    """

    place: str
    image: Callable[[], bytes]
    label: Callable[[], Any]


class _Member(NamedTuple):
    """A file in a tar file: its extension, and its bytes' place."""

    name: str
    extension: str
    offset: int
    size: int


def expand_braces(pattern: str) -> Iterator[str]:
    """The names that a pattern stands for: "a-{08..10}.tar" -> "a-08.tar", "a-09.tar", "a-10.tar". A pattern without such a
    range stands for itself."""
    found = re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}", pattern)
    if found is None or int(found[1]) > int(found[2]):
        yield pattern
        return
    for number in range(int(found[1]), int(found[2]) + 1):
        for rest in expand_braces(pattern[found.end() :]):
            yield f"{pattern[: found.start()]}{number:0{len(found[1])}d}{rest}"


def read_tar(paths: list[Path]) -> Iterator[Sample]:
    """The samples of tar files that have an image, or a ``.cls`` file without one, which is an error of that sample. The name
    of a sample is that of its files up to the first dot in their last part, as in WebDataset. Of several images one must have
    no other dot in its name, as ``7.png`` beside ``7.mask.png``.

    Raises:
        ValueError: a file is damaged, truncated or compressed.
    """
    suffixes = tuple(image_suffixes())
    for path in paths:
        number = 0
        for key, group in itertools.groupby(_members(path), lambda member: _split(member.name)[0]):
            members = list(group)
            images = [member for member in members if f".{member.extension}".endswith(suffixes)]
            if images or any(member.extension == "cls" for member in members):
                yield _sample(path, f"{path}, row {number}: {key!r}", images, members)
                number += 1


def _split(name: str) -> tuple[str, str]:
    """The sample and the extension of a file: "a/b.seg.PNG" -> "a/b", "seg.png"."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _members(path: Path) -> Iterator[_Member]:
    """The files in a tar file, without hidden ones."""
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            before = -1
            while (member := archive.next()) is not None:
                if archive.offset <= before:  # tarfile would read damaged headers again and again
                    raise ValueError("its headers point backwards")
                before = archive.offset
                archive.members.clear()  # type: ignore[attr-defined]  # they would fill the memory
                if member.isreg() and not any(is_hidden(part) for part in member.name.split("/") if part != "."):
                    if member.issparse() or not 0 <= member.size <= size - member.offset_data:
                        raise ValueError(f"{member.name!r} is not stored whole")
                    yield _Member(member.name, _split(member.name)[1], member.offset_data, member.size)
        # tarfile takes a damaged header for the end, which has blocks of zeros.
        if _read(path, _Member("", "", before if before >= 0 else 0, tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
            raise ValueError("it breaks off, or a header is damaged")
    except Exception as error:  # tarfile raises many kinds
        raise ValueError(f"{path}: not a whole tar file ({one_line(error)}); {_REMEDY}") from None


def _sample(path: Path, place: str, images: list[_Member], members: list[_Member]) -> Sample:
    plain = [member for member in images if "." not in member.extension]
    labels = {member.extension: member for member in members if member.extension in ("cls", "json")}

    def image() -> bytes:
        if not images:
            raise ValueError(f"{place}: a .cls file without an image; files of one sample must follow each other")
        chosen = plain or images
        if len(chosen) > 1:
            raise ValueError(
                f"{place}: it has {len(chosen)} images, {chosen[0].name!r} and {chosen[1].name!r}; give each another name up "
                "to its first dot"
            )
        return _read(path, chosen[0])

    return Sample(place, image, functools.partial(_label, path, place, labels))


def _label(path: Path, place: str, files: dict[str, _Member]) -> Any:
    """The class of a sample, from its ``.cls`` and ``.json`` files, whichever there is."""
    for kind, member in sorted(files.items()):
        if member.size > _LARGEST_LABEL:
            raise ValueError(f"{place}: {member.name!r} has {member.size:,} bytes, and a label at most {_LARGEST_LABEL:,}")
        text = _read(path, member).decode("utf-8", errors="replace").strip()
        if kind == "cls":
            return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else text
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {member.name!r} is not whole JSON ({one_line(error)}); {_REMEDY}") from None
        if isinstance(values, dict) and "label" in values:
            return values["label"]
    return None


def _read(path: Path, member: _Member) -> bytes:
    with path.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)
