"""A folder or an archive of pictures with captions, into shards.

Captions are in a table (CSV, TSV, JSON lines, COCO's JSON), of a folder also in a .txt or .json beside each picture.
The bytes of the pictures are copied; keys are numbers; the name that a picture had is "name" in its JSON. The shards
depend on what is packed alone. They are written apart and appear together at the end.
"""

import filecmp
import json
import os
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogview.config import require
from cogview.data.ahead import ahead
from cogview.data.archive import Archive, Damaged
from cogview.data.files import write_json
from cogview.data.folder import Folder
from cogview.data.images import TooLarge, decode_image, open_image
from cogview.data.inspection import rate
from cogview.data.report import Report, printable
from cogview.data.samples import OTHER_PICTURES
from cogview.data.shards import LANGUAGES, MAX_CAPTION_BYTES, ShardWriter
from cogview.data.sources import TOO_LARGE, Source, TableFile, beside_pictures, called, from_table, table_of, tables_in
from cogview.data.tar_members import BLOCK
from cogview.progress import Update

TABLES = ("metadata.jsonl", "metadata.csv")  # looked for in the folder, as Hugging Face's imagefolder has them
MARK = "pack.json"  # in the folder of shards: what they were made of
_SUFFIX = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}


class OtherShards(ValueError):
    """A folder that shards are to go to has those of something else."""


@dataclass
class Packed:
    report: Report = field(default_factory=Report)
    shards: list[Path] = field(default_factory=list)
    pairs: int = 0
    table: Path | None = None
    """That the captions are from; None: from files beside the pictures."""
    fields: list[str] = field(default_factory=list)
    """Of the JSONs that hold captions."""


def pack(
    folder: Path,
    out: Path,
    update: Update,
    packed: Packed,
    *,
    captions: Path | None = None,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    every: str | None = None,
    least: int = 1,
    shard_pairs: int = 1000,
    max_shard_bytes: int = 1 << 30,
) -> None:
    """Writes the pairs of `folder` to `out`, as 00000.tar and so on; what is left out goes to packed.report.

    folder: or a .zip, .tar or .tar.gz. captions: the table, see `table_of`; default: of an archive the one in it, of a
    folder metadata.jsonl or metadata.csv, else the only other table there with such columns, else files beside the
    pictures. every: the caption of all pictures, whatever others there are. least: pairs that there are to be.
    shard_pairs, max_shard_bytes: a shard ends before it has more, unless one pair alone is larger. update: is told the
    share that is done. ValueError if too little can be packed, OtherShards if `out` holds those of something else; then
    nothing is written.
    """
    if not folder.exists():
        raise ValueError(f"folder: expected a folder of pictures or an archive, got {str(folder)!r}")
    if shard_pairs < 1 or max_shard_bytes < 1:
        raise ValueError("shard-pairs, max-shard-mb: expected at least 1")
    made_of = {"folder": str(folder.resolve()), "captions": str(captions.resolve()) if captions else None}
    made_of |= {} if every is None else {"caption": every}
    before = _own_shards(out, made_of)
    if captions is None and every is None:
        captions = folder if folder.is_file() else _table_in(folder, image_column, caption_columns)
    named = None if captions is None else table_of(captions)
    packed.table = None if named is None else named.path
    with _opened(folder, named, packed.report) as files, ExitStack() as apart, ExitStack() as stack:
        if every is not None:
            sources = called(files, every, packed.report)
        elif named is not None:
            sources = from_table(files, named, image_column, caption_columns, packed.report)
        else:
            sources = beside_pictures(files, caption_columns or LANGUAGES, packed.report)
        beside = apart.enter_context(_folder_beside(out))
        pairs, size, writer, begun = 0, 0, None, time.monotonic()
        given = ((source, files.contents(source.name)) for source in sources)
        loaded = ahead(lambda one: (one[0], _load(*one, packed.report)), given)
        for done, (source, picture) in enumerate(loaded, 1):
            update(done / len(sources), rate(done, time.monotonic() - begun, "pictures"))
            if picture is None:
                continue
            suffix, contents = picture
            text = json.dumps({"name": _unicode(source.name)} | source.captions, ensure_ascii=False).encode()
            if len(text) > MAX_CAPTION_BYTES:
                packed.report.add(TOO_LARGE, printable(source.name), f"all of them: {len(text):,} bytes")
                continue
            more = sum(BLOCK - len(part) // -BLOCK * BLOCK for part in (contents, text))  # with headers
            if writer is None or pairs == shard_pairs or _whole_tar(size + more) > max_shard_bytes:
                stack.close()
                packed.shards.append(out / f"{len(packed.shards):05d}.tar")
                writer = stack.enter_context(ShardWriter(beside / packed.shards[-1].name))
                pairs = size = 0
            writer.write(f"{packed.pairs:08d}", {suffix: contents, "json": text})
            packed.pairs, pairs, size = packed.pairs + 1, pairs + 1, size + more
            packed.fields += [name for name in source.captions if name not in packed.fields]
        stack.close()
        if not packed.pairs and every is None:
            first = next((problem for problem in packed.report.problems if "is not UTF-8" in problem.detail), "")
            hint = f"; {first}" if first else ""
            raise ValueError(f"folder: no picture with a caption in {str(folder)!r} ({packed.report}{hint})")
        kept = f"at least {least:,} pictures that can be read in {str(folder)!r}"
        require(packed.pairs >= least, "folder", kept, packed.pairs)
        _move(beside, out, before, made_of, packed.shards)


def _opened(folder: Path, table: TableFile | None, report: Report) -> AbstractContextManager[Any]:
    """Where the names of a table are looked for in its own folder, too."""
    if folder.is_file():
        if table is None or table.archive is None or not table.archive.samefile(folder):
            return Archive(folder, report, "folder")
        return Archive(folder, report, "folder", os.path.dirname(table.member))
    return nullcontext(Folder(folder, report, *() if table is None else [table.path.resolve().parent]))


def _table_in(folder: Path, image_column: str | None, caption_columns: Sequence[str]) -> Path | None:
    for name in TABLES:
        if (folder / name).is_file():
            return folder / name
    found = tables_in(folder, image_column, caption_columns)
    if len(found) > 1:
        names = ", ".join(printable(path.name, 60) for path in found[:10])
        raise ValueError(f"captions: expected one table in {str(folder)!r}, got {names}; --captions says which")
    return found[0] if found else None


def _whole_tar(size: int) -> int:
    """Bytes of a tar with so many of members: two empty blocks end it, and it is padded."""
    return -(size + 2 * BLOCK) // tarfile.RECORDSIZE * -tarfile.RECORDSIZE


def _load(source: Source, contents: Callable[[], bytes], report: Report) -> tuple[str, bytes] | None:
    """Suffix and bytes of a picture; None, and an entry in the report, if it cannot be read."""
    try:
        data = contents()
        decode_image(data, side=64)  # whether it can be
        return _SUFFIX[str(open_image(data).format)], data
    except (ValueError, OSError) as error:
        extension = os.path.splitext(source.name)[1][1:].lower()
        other = f"picture in a format that is not read (.{extension})" if extension in OTHER_PICTURES else ""
        wrong = "damaged member" if isinstance(error, Damaged) else other or "picture not readable"
        kind = "picture too large" if isinstance(error, TooLarge) else wrong
        report.add(kind, printable(source.name), str(error), sample=source.number)
    return None


def _unicode(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _own_shards(out: Path, made_of: dict) -> list[str]:
    """Names of the shards that an earlier packing of the same folder wrote; ValueError if there are others."""
    if not out.exists():
        return []
    if not out.is_dir():
        raise ValueError(f"out: expected a folder, got {str(out)!r}")
    try:
        mark = json.loads((out / MARK).read_text(encoding="utf-8"))
        named = mark["shards"] if mark["made_of"] == made_of else []
        own = [name for name in named if re.fullmatch(r"[0-9]{5,}\.tar", name)]
    except (OSError, ValueError, KeyError, TypeError):
        own = []
    if others := sorted(path.name for path in out.glob("*.tar") if path.name not in own):
        raise OtherShards(f"out: {str(out)!r} holds shards of something else ({others[0]}); name another folder")
    return own


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(beside: Path, out: Path, before: list[str], made_of: dict, shards: list[Path]) -> None:
    """Puts the new shards into their places and removes those that are no more."""
    names = [path.name for path in shards]
    surplus = [name for name in before if name not in names]
    write_json(out / MARK, {"made_of": made_of, "shards": names + surplus})  # all ours, if this is cut short
    for path in shards:
        if not (path.exists() and filecmp.cmp(beside / path.name, path, shallow=False)):
            os.replace(beside / path.name, path)
    for name in surplus:
        (out / name).unlink(missing_ok=True)
        (out / f"{name}.index.npz").unlink(missing_ok=True)
    write_json(out / MARK, {"made_of": made_of, "shards": names})
