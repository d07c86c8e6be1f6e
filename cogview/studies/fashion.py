"""The paper's fashion model in small (CogView, section 3.4): a single domain, a VQGAN whose codes have 16 x 16 pixels,
and a GPT with three-region attention over more of them, 20 x 20. Whether pictures show every part that captions tell,
in its kind and colour, is measured: of outfits that it never saw, each with a pair of piece and colour that is new.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogview.config import TrainConfig, require
from cogview.data import decoded
from cogview.data.files import write_json, written_beside
from cogview.data.shards import PairDataset
from cogview.data.tokens import TokenDataset
from cogview.demo import models
from cogview.demo.demo import LANGUAGES, TEMPERATURE, TEXT_PIECES
from cogview.demo.outfit_judge import score
from cogview.demo.outfits import SIZE, Look, build_outfit_shards, caption, render, sample
from cogview.pictures import contact_sheet
from cogview.pipeline import decode, image_tokenizer, text_tokenizer, tokenize_pairs
from cogview.progress import track
from cogview.recipes.cogview import CogView
from cogview.system import System
from cogview.tokenizers.image import PRESETS
from cogview.tokenizers.train_image import TRAINING, reconstruct

PRESET = "fashion-tiny"
SHOWN = 12  # pictures of the sheet
_HELD_OUT = 300  # outfits
_COLUMNS = ("piece", "colour", "both", "known", "held out", "absent", "all")


@dataclass(frozen=True)
class Sizes:
    """Of the study. Steps: of the image tokenizer, of the GPT."""

    outfits: int
    tested: int
    image_steps: int
    steps: int

    def __post_init__(self):
        for name, value in asdict(self).items():
            require(value >= 1, name, "at least 1", value)
        require(self.tested >= 2, "tested", "at least 2", self.tested)


def run(out: Path, sizes: Sizes) -> str:
    """Does what is not done yet and writes report.md, figures.json and the sheet; returns what they come to."""
    begun = time.monotonic()
    data, held_out = _tokens(out, sizes)
    trained = models.new(out / "gpt", CogView, sizes.steps, data, held_out, preset=PRESET)
    system = System.load(out, name="gpt")
    looks, known = sample("test", sizes.tested, seed=1), sample("train", sizes.tested, seed=1)
    true = pictures_of(looks)
    drawn = {name: _drawn(system, looks, name) for name in LANGUAGES}
    rebuilt, _ = reconstruct(system.image, true)
    first = LANGUAGES[0]
    asked = [look.outfit for look in looks]
    found = {
        **{f"drawn, {name}": score(pictures, asked) for name, pictures in drawn.items()},
        f"drawn, {first}, known pairs": score(_drawn(system, known, first), [look.outfit for look in known]),
        "true, through the image tokenizer": score(rebuilt, asked),
        "drawn for another caption": score(drawn[first], asked[1:] + asked[:1]),
    }
    cells = [
        (caption(look.outfit, first), [a, b])
        for look, a, b in zip(looks[:SHOWN], true[:SHOWN], drawn[first][:SHOWN], strict=False)
    ]
    contact_sheet(cells, out / "sheet.png", columns=4, zoom=1, note="true, drawn; each has a pair never seen")
    facts = {
        "sizes": asdict(sizes),
        "gpt": models.fact(trained),
        "parameters": sum(p.numel() for p in system.model.parameters()),
        "tokens": system.recipe.length,
        "image": asdict(PRESETS[PRESET][1]),
        "psnr": float(-10 * ((rebuilt.float() - true.float()).square().mean(dim=(1, 2, 3)) / 255**2).log10().mean()),
        "threads": torch.get_num_threads(),
        "minutes_this_time": (time.monotonic() - begun) / 60,
    }
    verdict = _verdict(found)
    write_json(out / "figures.json", facts | {"found": found, "verdict": verdict})
    with written_beside(out / "report.md") as beside:
        beside.write_text(_page(found, facts, verdict), encoding="utf-8")
    return verdict


def _tokens(out: Path, sizes: Sizes) -> list[TokenDataset]:
    outfits = build_outfit_shards(
        out / "outfits", sizes.outfits, _HELD_OUT, progress=lambda work: track(work, "composing outfits")
    )
    pairs = {split: PairDataset(paths, languages=LANGUAGES) for split, paths in outfits.items()}
    text, pictures = text_tokenizer(pairs["train"], out, TEXT_PIECES), decode(pairs["train"], out, SIZE)
    training = TrainConfig(steps=sizes.image_steps, **TRAINING | {"batch_size": 8})
    image, _ = image_tokenizer(pairs["train"], pictures, out, PRESETS[PRESET][1], training, adversarial=True)
    known = {"train": pictures, "test": None}
    found = [
        tokenize_pairs(some, text, image, out / "tokens" / split, image_size=SIZE, decoded=known[split])
        for split, some in pairs.items()
    ]
    decoded.remove(out / "pixels")
    return found


def pictures_of(looks: list[Look]) -> Tensor:
    """uint8 [N, 3, SIZE, SIZE]."""
    return torch.stack([torch.from_numpy(np.array(render(look))).permute(2, 0, 1) for look in looks])


def _drawn(system: System, looks: list[Look], language: str) -> Tensor:
    captions = [caption(look.outfit, language) for look in looks]
    return system.draw(captions, temperature=TEMPERATURE, batch_size=64)


def _verdict(found: dict[str, dict[str, float]]) -> str:
    drawn, other = (found[name] for name in (f"drawn, {LANGUAGES[0]}", "drawn for another caption"))
    return (
        f"Of the parts that captions tell {drawn['both']:.0%} are drawn in their kind and colour (by chance "
        f"{other['both']:.0%}): {drawn['known']:.0%} where the pair was known, {drawn['held out']:.0%} where piece and "
        f"colour never came together; {drawn['all']:.0%} of the pictures are right in all."
    )


def _page(found: dict[str, dict[str, float]], facts: dict[str, Any], verdict: str) -> str:
    shares = {name: [f"{of[c]:.0%}" if c in of else "" for c in _COLUMNS] for name, of in found.items()}
    rows = [" | ".join([f"| {name}", *cells]) + " |" for name, cells in shares.items()]
    gpt, image, sizes = facts["gpt"], facts["image"], facts["sizes"]
    return f"""{verdict}

# Fashion: a single domain

{sizes["tested"]} outfits that training never saw; each has one pair of piece and colour that it never saw.

| | piece | colour | both | of known pairs | of held-out pairs | absent | whole picture |
|---|{"---:|" * len(_COLUMNS)}
{chr(10).join(rows)}

Shares of the parts that captions tell, over all pictures; absent: of the parts that they do not tell those that are
not there. Judged by the dyed piece that explains the picture best at the part's place. A picture judged by another's
caption is what chance gives.

![true and drawn](sheet.png)

## How

- Image tokenizer: a VQGAN of {image["codebook_size"]:,} codes of {image["downsample"]} x {image["downsample"]} pixels,
  {sizes["image_steps"]:,} steps on {sizes["outfits"]:,} outfits of {SIZE} pixels; those that are held out come to
  {facts["psnr"]:.1f} dB.
- GPT: preset {PRESET}, {facts["parameters"]:,} parameters, three-region attention over {facts["tokens"]} tokens,
  {gpt["steps"]:,} steps in {gpt["seconds"] / 60:.0f} minutes, held-out image loss
  {gpt["held_out"]["image_loss"]:.3f}; threads: {facts["threads"]}.
"""
