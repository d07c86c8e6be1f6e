"""Text (SentencePiece) and image tokenizers: VQ-VAEs that are trained here, and published codecs."""
