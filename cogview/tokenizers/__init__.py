"""Text (SentencePiece) and image (VQ-VAE) tokenizers."""
