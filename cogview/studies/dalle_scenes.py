"""What the study of DALL-E's choices trains on and judges by: scenes with English captions in lower case, as tokens of
three grids, and the same captions in other forms."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogview.config import TrainConfig
from cogview.data import decoded
from cogview.data.images import pixels
from cogview.data.shards import PairDataset
from cogview.data.tokens import TokenDataset
from cogview.demo.measure import score
from cogview.demo.scenes import BACKGROUNDS, NOUNS, PLACES, RELATIONS, SIZE, Scene, build_scene_shards, caption, render
from cogview.demo.scenes import sample_scenes as scenes_of
from cogview.models import load_model
from cogview.pipeline import decode, image_tokenizer, text_tokenizer, tokenize_pairs
from cogview.progress import track
from cogview.system import System
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.train_image import TRAINING, entropy

GRIDS = {8: 8, 16: 4, 32: 2}
"""Codes of a side, and pixels of a code's."""
_IMAGE = VQConfig(codebook_size=512, dim=32, hidden=48)
_HELD_OUT = 300  # scenes
CHOICES = 8  # captions of which a picture's own is to be found


class Scenes:
    """In a folder; what is not there yet is made."""

    def __init__(self, out: Path, count: int, image_steps: int):
        composing: Any = {"progress": lambda work: track(work, "composing scenes")}
        shards = build_scene_shards(out / "scenes", count, _HELD_OUT, **composing)
        data = {split: PairDataset(paths, languages=("en",)) for split, paths in shards.items()}
        self.text = text_tokenizer(data["train"], out, lowercase=True)
        self.images: dict[int, VQVAE] = {}
        self.tokens: dict[int, list[TokenDataset]] = {}
        pictures = decode(data["train"], out, SIZE)
        for grid, side in GRIDS.items():
            folder, config = out / f"grid-{grid}", replace(_IMAGE, downsample=side)
            training = TrainConfig(steps=image_steps, **TRAINING)
            self.images[grid], _ = image_tokenizer(data["train"], pictures, folder, config, training)
            for split, pairs in data.items():
                known = pictures if split == "train" else None
                tokenize_pairs(pairs, self.text, self.images[grid], folder / split, decoded=known)
            self.tokens[grid] = [TokenDataset(folder / split) for split in data]
        decoded.remove(out / "pixels")


def unigram(tokens: TokenDataset) -> float:
    """Entropy of how often the image codes occur, in nats: the loss of who knows that alone."""
    _, codes = tokens.batch(np.arange(len(tokens)))
    return float(entropy(codes))


def forms(scene: Scene) -> dict[str, str]:
    """A scene's caption as training has it, and in two other forms of the same words."""
    usual = caption(scene, "en")
    article, colour = NOUNS[scene.first][1], f"{BACKGROUNDS[scene.background][1]} {scene.background} background"
    if scene.second is None:
        where = PLACES[scene.place][1].removesuffix(" of")
        named, terse = f"{article} {scene.first} {where}", f"{scene.first} {where}"
    else:
        relation = RELATIONS[scene.place][2]
        named = f"{article} {scene.first} {relation} {NOUNS[scene.second][1]} {scene.second}"
        terse = f"{scene.first} {relation} {scene.second}"
    return {"usual": usual, "turned": f"on {colour} {named}", "terse": f"{terse} {scene.background}"}


def judged(checkpoint: Path, text: TextTokenizer, image: VQVAE, count: int) -> dict[str, Any]:
    """Of held-out scenes the share that is drawn right for each form of their captions, and the share of pictures whose
    own caption the model finds the likeliest of eight, of each form."""
    scenes = scenes_of("test", count)
    recipe, model = load_model(checkpoint)
    system = System(text, image, recipe, model)
    codes = system.tokenize(torch.stack([pixels(render(scene), SIZE) for scene in scenes]))
    found: dict[str, dict[str, float]] = {"drawn": {}, "chosen": {}}
    for form in forms(scenes[0]):
        captions = [forms(scene)[form] for scene in scenes]
        drawn = score(system.draw(captions, batch_size=64), scenes)
        found["drawn"][form] = drawn["all"]
        found["chosen"][form] = _chosen(system, codes, captions)
    return found


def _chosen(system: System, codes: torch.Tensor, captions: Sequence[str]) -> float:
    """Each picture among its own caption and those of the next seven scenes."""
    count = len(captions)
    lists = [[captions[(n + k) % count] for k in range(CHOICES)] for n in range(count)]
    return float((system.choose(codes, lists) == 0).float().mean())
