"""The image tokenizer that a run has, whichever it is."""

from pathlib import Path

from cogview.tokenizers import published_codec, stored
from cogview.tokenizers.image import VQVAE
from cogview.tokenizers.image_tokenizer import ImageTokenizer
from cogview.tokenizers.published_codec import PublishedCodec


def load_image_tokenizer(path: str | Path) -> ImageTokenizer:
    """Reads what its `save` wrote; ValueError in one sentence if it is anything else."""
    kind: type[VQVAE] | type[PublishedCodec] = VQVAE
    if stored.kind_of(path) == published_codec.FORMAT:
        kind = PublishedCodec
    return kind.load(path)
