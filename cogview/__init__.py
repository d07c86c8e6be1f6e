"""A thin CogView: a text-to-image GPT over VQ-VAE tokens, its tokenizers, data and trainer."""

__version__ = "0.1.0"
