"""Pictures that are composed here, as shards."""

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from cogview.data.shards import ShardWriter


def write_pngs(path: Path, rows: Iterable[tuple[Image.Image, Mapping[str, Any]]], first: int = 0) -> Path:
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
