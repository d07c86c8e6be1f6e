"""`python -m benchmarks.own_pictures SHARDS`: the README's "pictures of your own" on a collection of benchmarks.icons.

Every command as a user types it, its wall time and memory, at 64 and at 128 pixels; then how good it became: held-out
PSNR of the image tokenizer, and how often the model tells which of eight captions is a picture's, of things that it
never saw, in the same style on the same background. Writes results/own_pictures/<device>.json and a sheet of drawings,
in half an hour or so. What is done in the run folders already is not repeated, and then not measured.
"""

import argparse
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cogview.data.files import write_json
from cogview.data.shards import PairDataset, ShardWriter
from cogview.data.shuffle import draws
from cogview.system import System
from cogview.tokenizers.train_image import reconstruct
from cogview.train.log import read_log
from cogview_ops.bench import machine

from .report import RESULTS

CAPTION = re.compile(r"a (?P<style>\w+) (?P<thing>.+) on a (?P<background>\w+) background")
CHOICES = 8


# A small process between: most resident memory begins with that of the process that starts another.
LAUNCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
open(sys.argv[1], "w").write(f"{usage.ru_maxrss} {usage.ru_utime + usage.ru_stime}")
sys.exit(os.waitstatus_to_exitcode(status))
"""


def timed(*arguments: str) -> dict[str, Any]:
    """A command of cogview's: seconds by the clock and of all cores, most resident memory, what it printed last."""
    begun = time.monotonic()
    with tempfile.NamedTemporaryFile("r") as peak:
        command = [sys.executable, "-c", LAUNCH, peak.name, sys.executable, "-m", "cogview.cli", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = [line.rstrip() for line in process.stdout if not print(line, end="", flush=True)]
        if process.wait():
            raise SystemExit(f"cogview {' '.join(arguments)} failed")
        memory, processor = map(float, peak.read().split())
    seconds = time.monotonic() - begun
    words = " ".join(word for word in arguments if not word.endswith(".tar"))
    found = {"command": words, "seconds": seconds, "core_seconds": processor, "peak_MiB": memory / 1024}
    return found | {"said": said[-6:]}


def psnr(system: System, data: PairDataset, size: int) -> float:
    """Mean over the pictures of the test shards, in dB."""
    true = torch.stack([picture for _, picture in data.pictures(size)])
    rebuilt, _ = reconstruct(system.image, true)
    squared = (rebuilt.float() - true.float()).square().mean() / 255**2
    return float(-10 * squared.log10())


def discrimination(system: System, data: PairDataset) -> dict[str, Any]:
    """Of the pictures of some shards, how many the model gives their own caption, of CHOICES."""
    pairs = [(pair, CAPTION.fullmatch(pair.captions["caption"])) for pair in data.readable()]
    known = [(pair, found) for pair, found in pairs if found]
    things = sorted({found["thing"] for _, found in known})
    right = []
    for start in range(0, len(known), 32):
        some, rows = known[start : start + 32], []
        for number, (_, found) in enumerate(some, start):
            others = [thing for thing in things if thing != found["thing"]]
            chosen = [others.pop(int(draws(1, len(others), number, k)[0])) for k in range(CHOICES - 1)]
            rows.append(
                [f"a {found['style']} {t} on a {found['background']} background" for t in [found["thing"], *chosen]]
            )
        right += (system.choose([pair.image for pair, _ in some], rows) == 0).tolist()
    return {"right": sum(right), "of": len(right), "choices": CHOICES, "share": statistics.mean(right)}


def photographs(folder: Path, count: int = 48) -> dict[str, Any]:
    """Of 12-megapixel JPEGs: pairs a second of reading at 64 pixels by one core and by all, and inspect's memory."""
    path = folder / "photographs.tar"
    draw = np.random.default_rng(0)
    with ShardWriter(path) as shard:
        for number in range(count):
            rough = Image.fromarray(draw.integers(256, size=(30, 40, 3), dtype=np.uint8))
            smooth = np.asarray(rough.resize((4000, 3000), Image.Resampling.BICUBIC), np.int16)
            noisy = np.clip(smooth + draw.integers(-8, 9, size=smooth.shape, dtype=np.int16), 0, 255).astype(np.uint8)
            jpeg = io.BytesIO()
            Image.fromarray(noisy).save(jpeg, "JPEG", quality=90)
            shard.write(f"{number:03d}", {"jpg": jpeg.getvalue(), "txt": b"a photograph"})
    found: dict[str, Any] = {"count": count, "MB_each": path.stat().st_size / count / 1e6}
    for name, threads in (("one core", 1), ("all cores", None)):
        begun = time.monotonic()
        assert sum(1 for _ in PairDataset([path]).pictures(64, threads=threads)) == count
        found[f"pairs a second, {name}"] = count / (time.monotonic() - begun)
    found["inspect"] = timed("data", "inspect", str(path))
    path.unlink()
    return found


def measure(shards: Path, out: Path, size: int, minutes: float | None) -> dict[str, Any]:
    train, test = (sorted(map(str, shards.glob(f"{split}-*.tar"))) for split in ("train", "test"))
    run = out / str(size)
    length = [] if minutes is None else ["--minutes", str(minutes)]
    stages = {
        "inspect": timed("data", "inspect", *train),
        "tokenize train": timed("tokenize", *train, "--run", str(run), "--image-size", str(size)),
        "tokenize test": timed("tokenize", *test, "--run", str(run), "--split", "test"),
        "train": timed("train", "--run", str(run), *length),
    }
    held = PairDataset(test)
    captions = [pair.captions["caption"] for pair in held.readable(0, 16)]
    sheet = out / f"{size}-drawn.png"
    stages["generate"] = timed(
        "generate", "--run", str(run), "--count", "4", "--out", str(sheet), "--captions", *captions
    )
    system = System.load(run)
    log = read_log(run / "gpt")
    return {
        "stages": stages,
        "psnr": psnr(system, held, size),
        "image_tokenizer_images_per_second": statistics.median(
            e["images_per_second"] for e in read_log(run / "vqvae") if "images_per_second" in e
        ),
        "gpt_tokens_per_second": statistics.median(e["tokens_per_second"] for e in log if "tokens_per_second" in e),
        "held_out_image_loss": min(e["validation_image_loss"] for e in log if "validation_image_loss" in e),
        "held_out_things": discrimination(system, held),
        "seen_things": discrimination(system, PairDataset(train[:1])),
        "model": str(system.source),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder of benchmarks.icons")
    parser.add_argument("--out", type=Path, default=Path("runs/own_pictures"), help="folder for the runs")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--minutes", type=float, help="of training; default: the preset's")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    photos = photographs(arguments.out)
    found = {str(size): measure(arguments.shards, arguments.out, size, arguments.minutes) for size in arguments.sizes}
    result = {"machine": machine.facts(), "sizes": found, "photographs": photos}
    path = RESULTS / "own_pictures" / machine.slug(machine.facts()["device"])
    write_json(path.with_suffix(".json"), result)
    shutil.copyfile(arguments.out / f"{arguments.sizes[0]}-drawn.png", path.with_suffix(".png"))
    for size, row in found.items():
        print(size, json.dumps({key: value for key, value in row.items() if key != "stages"}, indent=1))


if __name__ == "__main__":
    main()
