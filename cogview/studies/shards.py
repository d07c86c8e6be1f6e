"""Pictures and captions of a study as a shard."""

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from cogview.data.shards import ShardWriter


def png_pairs(path: Path, rows: Iterable[tuple[Image.Image, Mapping[str, str]]]) -> Path:
    """Writes a shard of pictures and their captions by language, unless it is there."""
    if not path.exists():
        with ShardWriter(path) as shard:
            for number, (picture, captions) in enumerate(rows):
                png = io.BytesIO()
                picture.save(png, "PNG", compress_level=1)
                contents = json.dumps(captions, ensure_ascii=False).encode()
                shard.write(f"{number:07d}", {"png": png.getvalue(), "json": contents})
    return path
