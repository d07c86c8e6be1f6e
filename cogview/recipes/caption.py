"""CapLoss (CogView paper, section 3.2): how well a captioning model explains a text by an image.

Mean of -log p(t_i | image, t_<i) over the text of `[BASE] [BOI1] image [EOI1] [ROI1] text`: the lowest wins.
It means something only for a model finetuned on that layout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cogview.loss import row_means
from cogview.parts.transformer import Transformer, evaluating
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.recipes.recipe import Draws
from cogview.sequence import Batch, Vocabulary, pad_text


def caption_batch(config: CogViewConfig, text: Tensor, codes: Tensor, draws: Draws = None) -> Batch:
    """What a captioning CogView predicts a text by, of text [B, T] (-1 padded) and codes [B, N]."""
    recipe = CogView(config)
    tokens = recipe.vocab.caption(text, codes, config.max_positions)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    return Batch(inputs, targets, recipe.vocab.loss_weights(targets), recipe.context(inputs, draws))


@torch.no_grad()
def caploss(
    config: CogViewConfig, model: Transformer, codes: Tensor, captions: Sequence[Sequence[int]], *, seed: int = 0
) -> Tensor:
    """float32 [B], nats per text token, of codes int64 [B, h, w] and as many captions of raw text ids.

    Every pair draws its pivots from the same seed, so that a score does not depend on its batch. ValueError where the
    logits are not finite.
    """
    text = pad_text(captions)
    if codes.ndim != 3 or codes[0:1].numel() != config.image_tokens or len(codes) != len(captions):
        wanted = f"[{len(captions)}, {config.image_grid}, {config.image_grid}], one image a caption"
        raise ValueError(f"codes: expected {wanted}, got {list(codes.shape)}")
    if not all(map(len, captions)):
        raise ValueError("captions: expected none that is empty, got one of 0 tokens")
    streams = [torch.Generator().manual_seed(seed) for _ in captions]
    batch = caption_batch(config, text, codes.flatten(1).cpu(), streams).to(model.device)
    with evaluating(model):
        nll = model(batch.inputs, batch.context, targets=batch.targets)
    # Targets stand one place before their token: text begins after [BASE] [BOI1] image [EOI1] [ROI1].
    first = config.image_tokens + 3
    is_text = Vocabulary(config.image_vocab, config.text_vocab).is_text(batch.targets[:, first:])
    return row_means(nll[:, first:], is_text)
