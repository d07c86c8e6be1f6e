"""VQGAN: a VQ-VAE that a discriminator trains too (Esser et al., arXiv 2012.09841), as CogView's fashion model has
(arXiv 2105.13290, section 3.4). What comes out is an ordinary VQ-VAE.

The published perceptual loss compares features of a network trained on ImageNet. Here they are the discriminator's own
(feature matching of Salimans et al., arXiv 1606.03498), so that nothing is downloaded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cogview.tokenizers.image import VQVAE


class Discriminator(nn.Module):
    """Says of each patch how real it is (PatchGAN of Isola et al., arXiv 1611.07004): 4 x 4 convolutions, of which the
    first two halve the sides; a patch is 22 pixels wide. Norms are by group, so that every picture is judged alone."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)),
                nn.Sequential(nn.Conv2d(width, 2 * width, 4, 2, 1), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2)),
                nn.Conv2d(2 * width, 1, 4, 1, 1),
            ]
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: normalised [B, 3, H, W]. What each layer gives; the last: [B, 1, h, w], large where it looks real."""
        found = [images]
        for layer in self.layers:
            found.append(layer(found[-1]))
        return found[1:]


class VQGAN(nn.Module):
    """A `VQVAE` and its discriminator, trained by one optimizer: each loss reaches the weights of its own part alone.

    The discriminator has the hinge loss and learns from the first step. The VQ-VAE has its own losses, the distance of
    the discriminator's features, and from a share BEGIN of the training on its verdict, whose weight is WEIGHT times
    |gradient of the other losses| / |gradient of the verdict|, both in the decoder's last layer (Esser et al., eq. 7).
    """

    BEGIN, WEIGHT, FEATURES = 0.25, 0.8, 1.0

    def __init__(self, vqvae: VQVAE):
        super().__init__()
        self.vqvae, self.discriminator, self.config = vqvae, Discriminator(), vqvae.config

    def forward(self, images: Tensor, share: float = 1.0) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """As VQVAE.forward; in training mode "total" has further losses: "features", "verdict" and "discriminator"."""
        rebuilt, losses, codes = self.vqvae(images, share)
        if not self.training:
            return rebuilt, losses, codes
        true, drawn = ((pictures - self.vqvae.mean) / self.vqvae.std for pictures in (images, rebuilt))
        on_true, on_drawn = zip(
            *(layer.chunk(2) for layer in self.discriminator(torch.cat([true, drawn.detach()]))), strict=True
        )
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        *features, judged = functional_call(self.discriminator, frozen, drawn)
        wanted = [
            F.l1_loss(found.float(), real.detach().float()) for found, real in zip(features, on_true[:-1], strict=True)
        ]
        matching = self.FEATURES * torch.stack(wanted).mean()
        verdict, others = -judged.float().mean(), losses["total"] + matching
        weight = self._weight(others, verdict) if share >= self.BEGIN else 0.0
        hinge = 0.5 * (F.relu(1 - on_true[-1].float()).mean() + F.relu(1 + on_drawn[-1].float()).mean())
        losses |= {"features": matching, "verdict": weight * verdict, "discriminator": hinge}
        return rebuilt, losses | {"total": others + losses["verdict"] + hinge}, codes

    def _weight(self, others: Tensor, verdict: Tensor) -> Tensor:
        last = self.vqvae.dec.blocks[-1].get_parameter("weight")
        ours, its = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (others, verdict))
        return self.WEIGHT * (ours / (its + 1e-4)).clamp(max=1e4).detach()
