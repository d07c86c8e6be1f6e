"""The tokenizers in a run folder: begun, taken from another run, set aside, and whether they made its tokens."""

import json
import shutil
from pathlib import Path
from typing import Any

from cogview.commands.console import console
from cogview.config import require
from cogview.data.files import write_json, written_beside
from cogview.data.tokens import read_meta
from cogview.tokenizers.load import load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer

TOKENIZERS = ("text.model", "vqvae.safetensors")
TRAINED_WITH = (
    "vqvae",
    "reconstructions.png",
    "vqvae.training.safetensors",
    "vqvae.jsonl",
)  # the last two: version 0.1
UNFINISHED = "tokenizing.json"  # there while tokenizers are trained and have no tokens yet


def begin(folder: Path, of: dict[str, Any], retrain: bool) -> None:
    """Makes room for tokenizers that are trained now, and notes of what: until they and their tokens are done the same
    command goes on with them, and another one begins anew."""
    record = folder / UNFINISHED
    there = all((folder / name).exists() for name in TOKENIZERS)
    mine = {**of, "retrain": retrain}
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before == mine or (there and not retrain):
        return
    if retrain:
        set_aside(folder)
    elif before is not None:
        (folder / TOKENIZERS[0]).unlink(missing_ok=True)  # of captions that are not these
    write_json(record, mine)


def check_made_by(folder: Path, tokenizers: list[str]) -> None:
    """ValueError where the run has tokens and none of them were made by the tokenizers that it has: one of these is not
    what it was."""
    if (folder / UNFINISHED).exists():
        return
    metas = [meta for split in (folder / "tokens").glob("*/") if (meta := read_meta(split)) is not None]
    made_by = [[meta.get("text_sha256"), meta.get("image_sha256")] for meta in metas]
    if made_by and tokenizers not in made_by:
        wrong = [name for k, name in enumerate(TOKENIZERS) if tokenizers[k] not in [pair[k] for pair in made_by]]
        raise ValueError(
            f"run: {folder} has tokens that were made by another {' and '.join(wrong) or 'pair of tokenizers'} than it "
            f"has now: is that damaged? If it is meant, remove {folder / 'tokens'}"
        )


def adopt(source: Path, folder: Path) -> None:
    """Copies the tokenizers of a run; ValueError where the folder has others, or those are not whole."""
    for name, load in zip(TOKENIZERS, (TextTokenizer.load, load_image_tokenizer), strict=True):
        ours, theirs = folder / name, source / name
        require(theirs.exists(), "from", f"{name} in it", str(source))
        load(theirs)
        if ours.exists() and ours.read_bytes() != theirs.read_bytes():
            raise ValueError(f"from: {folder} has another {name} than {source}: name another run, or the same")
    for name in TOKENIZERS:
        with written_beside(folder / name) as beside:
            shutil.copyfile(source / name, beside)


def set_aside(folder: Path) -> None:
    """Moves a run's tokenizers away."""
    number = 1
    while (aside := folder / f"tokenizers-{number}").exists():
        number += 1
    for name in (*TRAINED_WITH, *TOKENIZERS):
        if (folder / name).exists():
            aside.mkdir(exist_ok=True)
            (folder / name).rename(aside / name)
    if aside.exists():
        console.print(f"the tokenizers that were there are in {aside} now")
