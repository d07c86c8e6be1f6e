"""The paper's fashion model in small (CogView, section 3.4): a single domain, a VQGAN whose codes have 16 x 16 pixels,
and a GPT with three-region attention over more of them, 20 x 20. Whether pictures show every part that captions tell,
in its kind and colour, is measured: of outfits that it never saw, each with a pair of piece and colour that is new.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.config import TrainConfig, require
from cogview.data import decoded
from cogview.data.files import write_json, write_text
from cogview.data.images import pixels
from cogview.data.shards import PairDataset
from cogview.data.tokens import TokenDataset
from cogview.demo import models
from cogview.demo.demo import LANGUAGES, TEMPERATURE, TEXT_PIECES
from cogview.demo.measure import decibels
from cogview.demo.outfit_judge import score
from cogview.demo.outfits import SIZE, Look, build_outfit_shards, caption, render, sample
from cogview.pictures import contact_sheet
from cogview.pipeline import decode, image_tokenizer, text_tokenizer, tokenize_pairs
from cogview.progress import track
from cogview.recipes.cogview import CogView
from cogview.studies.counts import Counts
from cogview.system import System
from cogview.tokenizers.image import PRESETS
from cogview.tokenizers.train_image import TRAINING, reconstruct

PRESET = "fashion-tiny"
TRUE, OTHER = "true, through the image tokenizer", "drawn for another caption"
NEW, NEW_TRUE, NEW_OTHER = (f"each with a new pair: {what}" for what in ("drawn, en", TRUE, OTHER))
_HELD_OUT = 300  # outfits
_COLUMNS = ("piece", "colour", "both", "known", "held out", "absent", "all")


@dataclass(frozen=True)
class Sizes(Counts):
    """Of the study. Steps: of the image tokenizer, of the GPT."""

    outfits: int
    tested: int
    image_steps: int
    steps: int

    def __post_init__(self):
        super().__post_init__()
        require(self.tested >= 2, "tested", "at least 2", self.tested)


def run(out: Path, sizes: Sizes) -> str:
    """Does what is not done yet and writes report.md, figures.json and the sheet; returns what they come to."""
    begun = time.monotonic()
    data, held_out = _tokens(out, sizes)
    trained = models.new(out / "gpt", CogView, sizes.steps, data, held_out, preset=PRESET)
    system = System.load(out, name="gpt")
    known, new = (sample(split, sizes.tested, seed=1) for split in ("test", "new"))
    asked, of_new = ([look.outfit for look in looks] for looks in (known, new))
    drawn = {name: _drawn(system, known, name) for name in LANGUAGES}
    drawn_new = _drawn(system, new, LANGUAGES[0])
    true = pictures_of(known)
    rebuilt, _ = reconstruct(system.image, true)
    rebuilt_new, _ = reconstruct(system.image, pictures_of(new))
    found = {
        **{f"drawn, {name}": score(pictures, asked) for name, pictures in drawn.items()},
        TRUE: score(rebuilt, asked),
        OTHER: score(drawn[LANGUAGES[0]], asked[1:] + asked[:1]),
        NEW: score(drawn_new, of_new),
        NEW_TRUE: score(rebuilt_new, of_new),
        NEW_OTHER: score(drawn_new, of_new[1:] + of_new[:1]),
    }
    _sheet(out / "sheet.png", known, drawn[LANGUAGES[0]], 8, "true, drawn; outfits never seen")
    _sheet(out / "new.png", new, drawn_new, 4, "true, drawn; each has a piece in a colour in which it was never seen")
    facts = {
        "sizes": asdict(sizes),
        "gpt": models.fact(trained),
        "parameters": sum(p.numel() for p in system.model.parameters()),
        "tokens": system.recipe.length,
        "image": asdict(PRESETS[PRESET][1]),
        "psnr": float(decibels(rebuilt, true).mean()),
        "threads": torch.get_num_threads(),
        "minutes_this_time": (time.monotonic() - begun) / 60,
    }
    verdict = _verdict(found)
    write_json(out / "figures.json", facts | {"found": found, "verdict": verdict})
    write_text(out / "report.md", _page(found, facts, verdict))
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
    return torch.stack([pixels(render(look), SIZE) for look in looks])


def _sheet(path: Path, looks: list[Look], drawn: Tensor, count: int, note: str) -> None:
    true = pictures_of(looks[:count])
    rows = [(caption(look.outfit, LANGUAGES[0]), [a, b]) for look, a, b in zip(looks, true, drawn, strict=False)]
    contact_sheet(rows, path, columns=4, zoom=1, note=note)


def _drawn(system: System, looks: list[Look], language: str) -> Tensor:
    captions = [caption(look.outfit, language) for look in looks]
    return system.draw(captions, temperature=TEMPERATURE, batch_size=64)


def _verdict(found: dict[str, dict[str, float]]) -> str:
    drawn, other, new, new_true, new_other = (
        found[name] for name in (f"drawn, {LANGUAGES[0]}", OTHER, NEW, NEW_TRUE, NEW_OTHER)
    )
    return (
        f"Of the parts of outfits never seen {drawn['both']:.0%} are drawn in their kind and colour (by chance "
        f"{other['both']:.0%}), and {drawn['all']:.0%} of the outfits are right in all. Of pieces in a colour in which "
        f"training never had them {new['held out']:.0%} are (by chance {new_other['held out']:.0%}); the image "
        f"tokenizer, which never had them either, recovers {new_true['held out']:.0%}."
    )


def _page(found: dict[str, dict[str, float]], facts: dict[str, Any], verdict: str) -> str:
    shares = {name: [f"{of[c]:.0%}" if c in of else "" for c in _COLUMNS] for name, of in found.items()}
    rows = [" | ".join([f"| {name}", *cells]) + " |" for name, cells in shares.items()]
    gpt, image, sizes = facts["gpt"], facts["image"], facts["sizes"]
    return f"""{verdict}

# Fashion: a single domain

{sizes["tested"]} outfits that training never saw, of pieces in colours in which it had them; and as many that each have
one pair of piece and colour which it never had.

| | piece | colour | both | of known pairs | of held-out pairs | absent | whole picture |
|---|{"---:|" * len(_COLUMNS)}
{chr(10).join(rows)}

Shares of the parts that captions tell, over all pictures; absent: of the parts that they do not tell those that are
not there. Judged by the dyed piece that explains the picture best at the part's place. A picture judged by another's
caption is what chance gives.

![true and drawn](sheet.png)

Of outfits with a new pair what the image tokenizer recovers is the bound of any model above it:

![true and drawn, each with a new pair](new.png)

## How

- Image tokenizer: a VQGAN of {image["codebook_size"]:,} codes of {image["downsample"]} x {image["downsample"]} pixels,
  {sizes["image_steps"]:,} steps on {sizes["outfits"]:,} outfits of {SIZE} pixels; those that are held out come to
  {facts["psnr"]:.1f} dB.
- GPT: preset {PRESET}, {facts["parameters"]:,} parameters, three-region attention over {facts["tokens"]} tokens,
  {gpt["steps"]:,} steps in {gpt["seconds"] / 60:.0f} minutes, held-out image loss
  {gpt["held_out"]["image_loss"]:.3f}; threads: {facts["threads"]}.
"""
