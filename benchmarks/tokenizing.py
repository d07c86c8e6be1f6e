"""`python -m benchmarks.tokenizing`: pairs a second of `cogview tokenize`, and how reading 30 million feeds a training.

Tokenising: shards of JPEGs of 640 x 480 with captions, the whole command (but for the interpreter's start): reading the
shards, their digests, decoding, encoding, writing. With the image tokenizer of the tiny preset (64 x 64) and of
cogview's (256 x 256), whose weights are random: on one core, by one process on all, by a process for each. Median,
least and most of the rounds, in turn, by the clock and by the time of the processors, which other processes disturb
less; from that, what follows for 30 million pairs where cores are added: processes do not wait for each other before
the end.

Reading: a folder of 1,000 parts and 30 million rows of 8 x 8 codes, whose files are sparse: opening it, holding a tenth
out, the order of an epoch and its memory, a batch (median) and a step of the tiny preset (the fastest). Writes
results/tokenizing/<device>.json, in ten minutes or so.
"""

import argparse
import dataclasses
import io
import json
import os
import shutil
import socket
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
from rich.console import Console
from rich.table import Table

from cogview import cli
from cogview.commands import run as command
from cogview.config import TrainConfig
from cogview.data.ahead import cores
from cogview.data.files import write_json
from cogview.data.parts import part_name
from cogview.data.shards import ShardWriter
from cogview.data.tokens import VERSION, TokenDataset
from cogview.recipes import preset
from cogview.recipes.cogview import CogView
from cogview.tokenizers.image import PRESETS, VQVAE
from cogview.tokenizers.text import TextTokenizer
from cogview.train.loop import Trainer
from cogview.train.token_task import TokenTask
from cogview_ops.bench import machine

from .report import RESULTS

PAIRS = {"tiny": 2400, "cogview": 32}
SHARDS = 8
SCALE = 30_000_000
PARTS, TEXT = 1000, 20  # of the folder that is read
WAYS = {"one core": (1, 1), "one process": (1, 0), "a process a core": (0, 1)}
"""Processes, and cores of each; 0: as many as there are cores."""


def make_shards(folder: Path, pairs: int) -> int:
    """Writes pairs whose pictures look like photographs, and returns the mean size of a picture in bytes."""
    draw, jpegs = np.random.default_rng(0), list[bytes]()
    for _ in range(min(pairs, 200)):
        rough = Image.fromarray(draw.integers(256, size=(15, 20, 3), dtype=np.uint8))
        smooth = np.asarray(rough.resize((640, 480), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + draw.integers(-8, 9, size=smooth.shape, dtype=np.int16), 0, 255).astype(np.uint8)
        jpeg = io.BytesIO()
        Image.fromarray(noisy).save(jpeg, "JPEG", quality=90)
        jpegs.append(jpeg.getvalue())
    for number in range(SHARDS):
        with ShardWriter(folder / f"{number}.tar") as shard:
            for k in range(number, pairs, SHARDS):
                shard.write(f"{k:06d}", {"jpg": jpegs[k % len(jpegs)], "txt": f"photograph number {k}".encode()})
    return round(statistics.mean(map(len, jpegs)))


def child(folder: Path, processors: list[int]) -> None:
    """Tokenises in this process, on these cores, and writes how long that took, by the clock and of processors."""
    os.sched_setaffinity(0, processors)
    torch.set_num_threads(len(processors))
    begun, spent = time.monotonic(), time.process_time()
    shards = sorted(map(str, folder.glob("*.tar")))
    command(["tokenize", *shards, "--run", str(folder / "run"), "--image-size", (folder / "size").read_text()], "")
    taken = [time.monotonic() - begun, time.process_time() - spent]
    write_json(folder / f"seconds-{os.environ.get('RANK', '0')}.json", taken)


def tokenise(folder: Path, processes: int, each: int) -> tuple[float, float]:
    """Seconds of the whole command by so many processes on so many cores each, and of all its processors together;
    nothing is there already."""
    shutil.rmtree(folder / "run" / "tokens", ignore_errors=True)
    for path in folder.glob("*.index.npz"):
        path.unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here, started = sorted(os.sched_getaffinity(0)), []
    for rank in range(processes):
        mine = here[rank * each : (rank + 1) * each]
        job = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {name: str(value) for name, value in job.items()} if processes > 1 else {}
        command = [sys.executable, "-m", "benchmarks.tokenizing", "--child", str(folder), *map(str, mine)]
        started.append(subprocess.Popen(command, env=_environment() | variables, stdout=subprocess.DEVNULL))
    if any(list(map(subprocess.Popen.wait, started))):
        raise SystemExit("a tokenize failed")
    taken = [json.loads((folder / f"seconds-{rank}.json").read_text()) for rank in range(processes)]
    return max(clock for clock, _ in taken), sum(spent for _, spent in taken)


def _environment() -> dict[str, str]:
    """That threads wait in as the command line lets them."""
    return ({} if any(name in os.environ for name in cli.WAITING) else {"GOMP_SPINCOUNT": str(cli.SPINS)}) | os.environ


def speeds(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """By the image tokenizer and the way."""
    rows = []
    for name, pairs in PAIRS.items():
        here = folder / name
        here.mkdir()
        size, config = PRESETS[name]
        (here / "size").write_text(str(size))
        bytes_each = make_shards(here, pairs)
        TextTokenizer.train([f"photograph number {k}" for k in range(1000)]).save(here / "run" / "text.model")
        torch.manual_seed(0)
        VQVAE(config).save(here / "run" / "vqvae.safetensors")
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, (processes, each) in WAYS.items():
                taken[way].append(tokenise(here, processes or cores(), each or cores()))
        for way, (processes, each) in WAYS.items():
            clock, spent = ([pairs / seconds for seconds in kind] for kind in zip(*taken[way], strict=True))
            core_hours = SCALE / statistics.median(spent) / 3600
            rows.append(
                {
                    "image_tokenizer": name,
                    "image_size": size,
                    "jpeg_bytes": bytes_each,
                    "pairs": pairs,
                    "way": way,
                    "processes": processes or cores(),
                    "cores": (processes or cores()) * (each or cores()),
                    "pairs_per_second": _spread(clock),
                    "pairs_per_second_of_a_core": _spread(spent),
                    "core_hours_of_30_million": round(core_hours, 1),
                    "hours_of_30_million_by_cores": {str(n): round(core_hours / n, 2) for n in (1, 64, 1024)},
                }
            )
        shutil.rmtree(here)
    return rows


def sparse_tokens(folder: Path) -> TokenDataset:
    """A folder of SCALE rows, of which only the hashes of the captions are written."""
    folder.mkdir()
    names, rows, draw = [part_name(number=n) for n in range(PARTS)], SCALE // PARTS, np.random.default_rng(0)
    for name in names:
        for key, width in (("text", TEXT), ("codes", 64)):
            with open(folder / f"part-{name}.{key}.npy", "wb") as file:
                header = {"descr": "<i4", "fortran_order": False, "shape": (rows, width)}
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + 4 * rows * width)
        np.save(folder / f"part-{name}.groups.npy", draw.integers(2**64, size=rows, dtype=np.uint64))
    sizes = {"grid": [8, 8], "image_size": 64, "codebook_size": 1024, "text_vocab_size": 1000, "text_length": TEXT}
    made_by = {"text_sha256": "0" * 64, "image_sha256": "0" * 64}
    write_json(folder / "meta.json", {"version": VERSION, "parts": names, "rows": SCALE, **sizes, **made_by})
    return TokenDataset(folder)


def reading(folder: Path, rounds: int) -> dict[str, Any]:
    sparse_tokens(folder / "tokens")
    begun = time.monotonic()
    tokens = TokenDataset(folder / "tokens")
    opened = time.monotonic()
    rows, held_out = tokens.hold_out(0.1)
    found: dict[str, Any] = {"rows": SCALE, "parts": PARTS, "held_out": len(held_out)}
    found |= {"open_seconds": opened - begun, "hold_out_seconds": time.monotonic() - opened}
    order = rows.order(0, 0)
    seconds = [_seconds(lambda: rows.order(0, 1)) for _ in range(rounds)]
    found["order_seconds"] = _spread(seconds)
    extra = machine.peak_extra_bytes(lambda: rows.order(0, 1))
    found["order_peak_MiB"] = None if extra is None else extra / 2**20
    config, training = preset("tiny")
    recipe = CogView(dataclasses.replace(config, dropout=0.1))
    torch.manual_seed(0)
    training = TrainConfig(**dataclasses.asdict(training) | {"seconds": None, "steps": 10**6})
    trainer = Trainer(TokenTask(recipe, recipe.model(), rows, training), training, folder / "unused")
    size = training.batch_size
    batches = [order[n * size : (n + 1) * size] for n in range(1400)]
    seconds = [_seconds(lambda some=some: rows.batch(some)) for some in batches]  # type: ignore[misc]
    steps = [_seconds(trainer.step) for _ in range(22)][2:]
    first, later, step = statistics.median(seconds[:400]), seconds[400:], min(steps)
    found |= {"batch_size": size, "batch_ms": 1e3 * statistics.median(later), "step_ms": 1e3 * step}
    found |= {"batch_ms_90_percent": 1e3 * float(np.quantile(later, 0.9)), "batch_ms_of_unread_files": 1e3 * first}
    return found | {"share_of_step": statistics.median(later) / step}


def _spread(values: list[float]) -> list[float]:
    """Median, least and most."""
    return [round(value, 2) for value in (statistics.median(values), min(values), max(values))]


def _seconds(call: Any) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS / "tokenizing", help="folder (default: %(default)s)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--reading", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(Path(options.child[0]), list(map(int, options.child[1:])))
        return 0
    if options.reading:
        write_json(options.reading / "reading.json", reading(options.reading, options.rounds))
        return 0
    with tempfile.TemporaryDirectory() as folder, Console().status("measuring"):
        before = os.getloadavg()[0]
        rows = speeds(Path(folder), options.rounds)
        command = [sys.executable, "-m", "benchmarks.tokenizing", "--rounds", str(options.rounds), "--reading", folder]
        subprocess.run(command, env=_environment(), check=True)
        read = json.loads((Path(folder) / "reading.json").read_text())
    facts = machine.facts()
    path = options.out / f"{machine.slug(facts['device'])}.json"
    write_json(path, {"facts": facts, "load_before": before, "rounds": options.rounds, "rows": rows, "reading": read})
    table = Table("image tokenizer", "way", "pairs/s", "a core", "core-hours of 30 million")
    for row in rows:
        rates = "{} ({} to {})".format(*row["pairs_per_second"])
        table.add_row(
            f"{row['image_tokenizer']}, {row['image_size']}",
            row["way"],
            rates,
            "{} ({} to {})".format(*row["pairs_per_second_of_a_core"]),
            f"{row['core_hours_of_30_million']:,}",
        )
    Console().print(table)
    print(json.dumps(read, indent=1))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
