"""The image tokenizer that a run has, whichever it is."""

from pathlib import Path

from cogview.tokenizers import icetk, published_codec, stored
from cogview.tokenizers.icetk import IcetkTokenizer
from cogview.tokenizers.image import VQVAE
from cogview.tokenizers.image_tokenizer import ImageTokenizer
from cogview.tokenizers.published_codec import PublishedCodec


def load_image_tokenizer(path: str | Path) -> ImageTokenizer:
    """Reads what its `save` wrote; ValueError in one sentence if it is anything else."""
    match stored.kind_of(path):
        case published_codec.FORMAT:
            return PublishedCodec.load(path)
        case icetk.FORMAT:
            return IcetkTokenizer.load(path)
        case _:
            return VQVAE.load(path)  # which says what else it is
