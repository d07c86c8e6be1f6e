"""CapLoss (CogView paper, section 3.2): how well a captioning model explains a text by an image.

Mean of -log p(t_i | image, t_<i) over the text of `[BASE] [BOI1] image [EOI1] [ROI1] text`: the lowest wins.
It means something only for a model finetuned on that layout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cogview.generate import draw_pivots_per_row
from cogview.loss import sequence_nll
from cogview.model import GPT
from cogview.sequence import pad_text


@torch.no_grad()
def caploss(model: GPT, codes: Tensor, captions: Sequence[Sequence[int]], *, seed: int = 0) -> Tensor:
    """float32 [B], nats per text token, of codes int64 [B, h, w] and as many captions of raw text ids.

    Every pair draws its pivots from the same seed, so that a score does not depend on its batch.
    """
    if codes.ndim != 3 or codes[0:1].numel() != model.config.image_tokens or len(codes) != len(captions):
        side = model.config.image_grid
        raise ValueError(
            f"codes must be [{len(captions)}, {side}, {side}], one image a caption, got {list(codes.shape)}"
        )
    if not all(map(len, captions)):
        raise ValueError("captions must not be empty, got one of 0 tokens")
    training = model.training
    model.eval()
    try:
        text = pad_text(captions)
        tokens = model.vocab.caption(text, codes.flatten(1).cpu(), model.config.max_positions)
        streams = [torch.Generator().manual_seed(seed) for _ in captions]
        pivots = draw_pivots_per_row(model, tokens[:, :-1], streams)
        nll = sequence_nll(model, tokens.to(model.word_embeddings.weight.device), pivots=pivots)
    finally:
        model.train(training)
    # Labels stand one place before their token: text begins after [BASE] [BOI1] image [EOI1] [ROI1].
    scores = nll[:, model.config.image_tokens + 3 :]
    is_text = model.vocab.is_text(tokens[:, model.config.image_tokens + 4 :]).to(scores)
    return (scores * is_text).sum(dim=1) / is_text.sum(dim=1)
