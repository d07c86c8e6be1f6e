"""`python -m benchmarks.coco`: what photographs in COCO's layout take, from the archives to a picture.

Two archives like val2017.zip and annotations_trainval2017.zip, of JPEGs of 640 x 480 that look like photographs, five
captions each; then each command of the README as a user types it: its time by the clock and of all cores, its memory,
and what it leaves on disk. The image tokenizer sees each picture once, and the GPT is trained for some steps:
benchmarks.own_pictures has what comes of more. What a table of train2017's size takes is measured by itself, with as
many pictures of a few pixels. Writes results/coco/<device>.json, in a few minutes.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cogview.data.files import write_json
from cogview.data.tokens import TokenDataset
from cogview_ops.bench import machine

from .own_pictures import timed
from .report import RESULTS

CAPTIONS = 5
TRAIN2017 = 118_287  # pictures
_URL = "http://images.cocodataset.org/val2017/"
_WORDS = (
    ("A man", "Two dogs", "A woman in a red coat", "A group of people", "The old train", "A brown horse", "A child"),
    ("is standing", "sits", "is running", "waits", "looks around", "is resting", "walks slowly"),
    ("on the beach", "next to a parked bus", "in a small kitchen", "under a big tree", "near the river", "on a bench"),
    ("in the sun.", "with a frisbee.", "while it rains.", "beside a bowl of fruit.", "at night.", "behind a fence."),
)


def photograph(draw: np.random.Generator, width: int, height: int, mode: str = "RGB") -> bytes:
    """A JPEG that takes as many bytes as one of a camera, about: smooth colours and noise."""
    rough = Image.fromarray(draw.integers(256, size=(15, 20, 3), dtype=np.uint8))
    smooth = np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = np.clip(smooth + draw.integers(-40, 41, size=smooth.shape, dtype=np.int16), 0, 255).astype(np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(noisy).convert(mode).save(jpeg, "JPEG", quality=90)
    return jpeg.getvalue()


def layout(
    folder: Path, pictures: int, width: int = 640, height: int = 480, *, alike: bool = False
) -> tuple[Path, Path]:
    """val2017.zip and annotations_trainval2017.zip, as COCO has them: each tenth picture is grey, each third caption
    ends in a new line, and the captions are in any order. alike: all pictures are the same one."""
    draw = np.random.default_rng(0)
    whole, annotations = folder / "val2017.zip", folder / "annotations_trainval2017.zip"
    images, captions = list[dict[str, Any]](), list[dict[str, Any]]()
    jpeg = b""
    with zipfile.ZipFile(whole, "w") as file:
        for number in range(pictures):
            name = f"{number * 7:012d}.jpg"
            if not (alike and jpeg):
                jpeg = photograph(draw, width, height, "RGB" if number % 10 else "L")
            file.writestr(f"val2017/{name}", jpeg)
            about = {"license": 1, "file_name": name, "height": height, "width": width, "id": number * 7}
            images.append(about | {"coco_url": _URL + name, "flickr_url": _URL + name, "date_captured": "2013-11-14"})
            for k in range(CAPTIONS):
                text = " ".join(some[draw.integers(len(some))] for some in _WORDS) + "\n" * (k % 3 == 0)
                captions.append({"image_id": number * 7, "id": len(captions), "caption": text})
    shuffled = [captions[n] for n in draw.permutation(len(captions))]
    rest: dict[str, Any] = {"info": {"year": 2017}, "licenses": [{"id": 1}], "images": images}
    with zipfile.ZipFile(annotations, "w", zipfile.ZIP_DEFLATED) as file:
        for name, kept in (("captions_train2017", []), ("captions_val2017", shuffled)):
            file.writestr(f"annotations/{name}.json", json.dumps(rest | {"annotations": kept}))
        boxes = [{"id": 1, "image_id": 0, "bbox": [0, 0, 9, 9], "category_id": 1}]
        file.writestr("annotations/instances_val2017.json", json.dumps(rest | {"annotations": boxes}))
    return whole, annotations


def large_table(folder: Path, pictures: int) -> dict[str, Any]:
    """What `pack` takes of a table of so many pictures, each of a few pixels: little but the table counts."""
    whole, annotations = layout(folder, pictures, 8, 8, alike=True)
    captions = f"{annotations}:annotations/captions_val2017.json"
    with zipfile.ZipFile(annotations) as file:
        size = file.getinfo("annotations/captions_val2017.json").file_size
    found = timed("data", "pack", str(whole), "--captions", captions, "--out", str(folder / "shards"))
    return {"pictures": pictures, "captions": CAPTIONS * pictures, "table_bytes": size} | found


def measure(folder: Path, pictures: int, steps: int) -> dict[str, Any]:
    whole, annotations = layout(folder, pictures)
    table, shards, run = f"{annotations}:annotations/captions_val2017.json", folder / "shards", folder / "run"
    found: dict[str, Any] = {"pictures": pictures, "archive_bytes": whole.stat().st_size}
    found["pack"] = timed("data", "pack", str(whole), "--captions", table, "--out", str(shards))
    tars = sorted(map(str, shards.glob("*.tar")))
    found["tokenize"] = timed("tokenize", *tars, "--run", str(run), "--image-passes", "1")
    found["tokenize again"] = timed("tokenize", *tars, "--run", str(run), "--split", "again")
    found["train"] = timed("train", "--run", str(run), "--steps", str(steps))
    drawn = ("--captions", "A man sits on a bench.", "--count", "8", "--out", str(folder / "drawn.png"))
    found["generate"] = timed("generate", "--run", str(run), *drawn)
    tokens = run / "tokens" / "train"
    found |= {"shard_bytes": _bytes(shards), "token_bytes": _bytes(tokens), "rows": len(TokenDataset(tokens))}
    return found


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--table", type=int, default=TRAIN2017, help="pictures of the table (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="of the training (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "coco", help="folder (default: %(default)s)")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.pictures, options.steps)
    with tempfile.TemporaryDirectory() as other:
        found["table"] = large_table(Path(other), options.table)
    found = json.loads(json.dumps(found).replace(f"{folder}/", "").replace(f"{other}/", ""))
    facts = machine.facts()
    path = options.out / f"{machine.slug(facts['device'])}.json"
    write_json(path, {"facts": facts, "load_before": before, **found})
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
