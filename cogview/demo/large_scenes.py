"""Scenes of emoji of 128 pixels as tokens, at one size or two, by one image tokenizer that knows both."""

from pathlib import Path
from typing import Any

from cogview.config import TrainConfig
from cogview.data import decoded
from cogview.data.shards import PairDataset
from cogview.data.tokens import TokenDataset
from cogview.demo.demo import LANGUAGES, TEXT_PIECES
from cogview.demo.scenes import SIZE, build_scene_shards
from cogview.pipeline import decode, image_tokenizer, text_tokenizer, tokenize_pairs
from cogview.progress import track
from cogview.tokenizers.image import VQConfig
from cogview.tokenizers.train_image import TRAINING


class LargeScenes:
    """Scenes and tokenizers in a folder, what is not there yet is made; a context that ends without the pixels."""

    def __init__(
        self,
        out: Path,
        count: int,
        held_out: int,
        config: VQConfig,
        steps: int,
        times: int = 2,
        bilingual: bool = False,
    ):
        """times: larger than the demo's. config, steps: of the image tokenizer. bilingual: the text tokenizer."""
        self.out, self.times = out, times
        composing: Any = {"progress": lambda work: track(work, "composing scenes"), "scale": times}
        scenes = build_scene_shards(out / "scenes", count, held_out, **composing)
        self.data = {split: PairDataset(paths, languages=LANGUAGES) for split, paths in scenes.items()}
        train = self.data["train"]
        self.text = text_tokenizer(train, out, TEXT_PIECES, bilingual=bilingual)
        self.pictures = decode(train, out, times * SIZE)
        training = TrainConfig(steps=steps, **TRAINING)
        self.image, _ = image_tokenizer(train, self.pictures, out, config, training, times=times)

    def __enter__(self) -> "LargeScenes":
        return self

    def __exit__(self, *error) -> None:
        decoded.remove(self.out / "pixels")

    def tokenize(self, name: str, **how: Any) -> None:
        """The tokens of both splits, as `tokenize_pairs` makes them, which `splits` then finds."""
        large = "crops" in how or how.get("image_size") == self.times * SIZE
        for split, pairs in self.data.items():
            known = self.pictures if split == "train" and large else None
            tokenize_pairs(pairs, self.text, self.image, self.out / "tokens" / f"{name}-{split}", decoded=known, **how)


def splits(out: Path, name: str) -> list[TokenDataset]:
    """To train on, and held out."""
    return [TokenDataset(out / "tokens" / f"{name}-{split}") for split in ("train", "test")]
