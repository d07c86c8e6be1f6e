"""Pictures that are composed here, as shards."""

import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from cogview.data.files import write_json
from cogview.data.shards import ShardWriter

Rows = Iterable[tuple[Image.Image, Mapping[str, Any]]]


def write_pngs(path: Path, rows: Rows, first: int = 0) -> Path:
    """Writes pictures and what is told of each, captions among it, with numbers from `first` on, unless the shard is
    there."""
    if not path.exists():
        with ShardWriter(path) as shard:
            for number, (picture, about) in enumerate(rows, first):
                png = io.BytesIO()
                picture.save(png, "PNG", compress_level=3)
                contents = json.dumps(about, ensure_ascii=False).encode()
                shard.write(f"{number:07d}", {"png": png.getvalue(), "json": contents})
    return path


def write_splits(
    record: Path,
    settings: Mapping[str, Any],
    others: str,
    counts: Mapping[str, int],
    each: int,
    rows: Callable[[str, int, int], Rows],
    progress=iter,
) -> dict[str, list[Path]]:
    """Writes `{split}-00000.tar`, … of so many rows beside a record of their settings. Shards that are there stay, so
    the same call goes on. ValueError of `others` where the record has other settings. rows: of a split, from one number
    up to another."""
    if record.exists() and json.loads(record.read_text(encoding="utf-8")) != settings:
        raise ValueError(others)
    write_json(record, settings)
    work = [
        (record.with_name(f"{split}-{start // each:05d}.tar"), split, start, min(count, start + each))
        for split, count in counts.items()
        for start in range(0, count, each)
    ]
    for path, split, start, end in progress(work):
        write_pngs(path, rows(split, start, end), start)
    return {split: [path for path, of, _, _ in work if of == split] for split in counts}
