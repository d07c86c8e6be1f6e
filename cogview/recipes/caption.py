"""CapLoss (CogView paper, section 3.2): how well a captioning model explains a text by an image.

Mean of -log p(t_i | image, t_<i) over the text of `[BASE] [BOI1] image [EOI1] [ROI1] text`: the lowest wins.
It means something only for a model finetuned on that layout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cogview.parts.transformer import Transformer
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.sequence import pad_text


class Caption(CogView):
    """CogView with the image before its text."""

    name = "caption"

    def layout(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vocab.caption(text, codes, self.config.max_positions)
        return tokens[:, :-1], tokens[:, 1:]


@torch.no_grad()
def caploss(
    config: CogViewConfig, model: Transformer, codes: Tensor, captions: Sequence[Sequence[int]], *, seed: int = 0
) -> Tensor:
    """float32 [B], nats per text token, of codes int64 [B, h, w] and as many captions of raw text ids.

    Every pair draws its pivots from the same seed, so that a score does not depend on its batch.
    """
    if codes.ndim != 3 or codes[0:1].numel() != config.image_tokens or len(codes) != len(captions):
        wanted = f"[{len(captions)}, {config.image_grid}, {config.image_grid}], one image a caption"
        raise ValueError(f"codes: expected {wanted}, got {list(codes.shape)}")
    if not all(map(len, captions)):
        raise ValueError("captions: expected none that is empty, got one of 0 tokens")
    recipe, streams = Caption(config), [torch.Generator().manual_seed(seed) for _ in captions]
    batch = recipe.batch(pad_text(captions), codes.flatten(1).cpu(), streams)
    training = model.training
    model.eval()
    try:
        moved = batch.inputs.to(model.device), batch.context.to(model.device), batch.targets.to(model.device)
        nll = model(moved[0], moved[1], targets=moved[2])
    finally:
        model.train(training)
    # Targets stand one place before their token: text begins after [BASE] [BOI1] image [EOI1] [ROI1].
    first = config.image_tokens + 3
    is_text = recipe.vocab.is_text(batch.targets[:, first:]).to(nll)
    return (nll[:, first:] * is_text).sum(dim=1) / is_text.sum(dim=1)
