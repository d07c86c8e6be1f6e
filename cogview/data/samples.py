"""Which members of a tar make a sample: those that stand together and share their name up to its first dot."""

import re
from dataclasses import dataclass, field

from cogview.data.images import EXTENSIONS
from cogview.data.report import printable
from cogview.data.tar_members import Problem

IMAGE, JSON, TEXT = range(3)  # columns of a sample's offsets
_COLUMN = dict.fromkeys(EXTENSIONS, IMAGE) | {"json": JSON, "txt": TEXT}
OTHER_PICTURES = {"tif", "tiff", "heic", "heif", "avif", "jfif", "jpe", "jp2", "jxl", "svg", "ico", "tga", "psd"}
OTHER_PICTURES |= {"raw", "dng", "cr2", "nef", "arw", "ppm", "pgm", "exr", "hdr"}
_EXTRA = re.compile(r"([a-z_][\w-]*\.)+\w+")  # as in 0001.seg.png beside 0001.png
_MACOS = "files of macOS"
_MAX_KINDS = 100  # of members that are not read: names may end in anything


@dataclass
class Sample:
    key: bytes
    offsets: list[int] = field(default_factory=lambda: [-1] * 3)
    sizes: list[int] = field(default_factory=lambda: [0] * 3)
    other: str = ""  # extension of a picture that is not read
    dotted: list[tuple[str, int]] = field(default_factory=list)  # names with more than one dot, and their columns


class Samples:
    """Samples as they come, member by member; `problems` and `unread` are those of TarIndex."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.problems: list[Problem] = []
        self.unread: dict[str, tuple[int, str]] = {}
        self.members = 0

    def add(self, name: str, offset: int, size: int) -> None:
        self.members += 1
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        extension = extension.lower()
        column = _COLUMN.get(extension)
        last = extension.rpartition(".")[2]
        if base.startswith("._") or base == ".DS_Store" or "__MACOSX" in folder.split("/"):
            return self._leave(_MACOS, name)
        if not stem:
            if last in _COLUMN or last in OTHER_PICTURES:
                self.problems.append(("name that begins with a dot", printable(name), ""))
                return None
            return self._leave(extension, name)
        if column is None and last not in _COLUMN and extension not in OTHER_PICTURES:
            return self._leave(extension, name)  # features, metadata: not ours to judge
        sample = self._sample((f"{folder}/{stem}" if folder else stem).encode("utf-8", "surrogateescape"))
        if column is None:
            if extension in OTHER_PICTURES:
                sample.other = sample.other or extension
                return self._leave(extension, name)
            sample.dotted.append((name, _COLUMN[last]))
        elif sample.offsets[column] >= 0:
            self.problems.append(("duplicate member", printable(name), ""))
        else:
            sample.offsets[column], sample.sizes[column] = offset, size
        return None

    def finish(self) -> list[Sample]:
        """The samples that have a picture and a caption; what the others lack becomes a problem."""
        whole, halves = list[Sample](), list[tuple[Sample, bool]]()
        for sample in self.samples:
            picture, caption = sample.offsets[IMAGE] >= 0, max(sample.offsets[1:]) >= 0
            for name, column in sample.dotted:
                extension = name.rpartition("/")[2].partition(".")[2].lower()
                if (picture if column == IMAGE else caption) and _EXTRA.fullmatch(extension):
                    self._leave(extension, name)
                else:
                    detail = "a sample's name ends at its first dot; rename it"
                    self.problems.append(("name with dots before its extension", printable(name), detail))
            if picture and caption:
                whole.append(sample)
            elif picture or caption or sample.other:
                halves.append((sample, picture))
        there = {(sample.key, picture) for sample, picture in halves}
        for sample, picture in halves:
            kind, detail = f"sample without {'caption' if picture else 'picture'}", ""
            if (sample.key, not picture) in there:
                detail = "the rest of it is elsewhere in the tar; members of a sample stand together (tar --sort=name)"
            elif sample.other and not picture:
                kind = f"picture in a format that is not read (.{sample.other})"
            self.problems.append((kind, printable(sample.key.decode("utf-8", "replace")), detail))
        return whole

    def _sample(self, key: bytes) -> Sample:
        if not self.samples or self.samples[-1].key != key:
            self.samples.append(Sample(key))
        return self.samples[-1]

    def _leave(self, kind: str, name: str) -> None:
        kind = printable(kind, 20)
        if len(self.unread) >= _MAX_KINDS and kind not in self.unread:
            kind = "others"
        count, first = self.unread.get(kind, (0, printable(name)))
        self.unread[kind] = count + 1, first
