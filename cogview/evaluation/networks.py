"""The networks that pictures are seen with, each from a path on disk. Nothing is downloaded, and no file executed."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cogview.config import require
from cogview.data.files import sha256_of
from cogview.device import available
from cogview.evaluation import classifier, encoders
from cogview.evaluation.classifier import Seen, Trained

_AT_ONCE = 32 * 256**2  # pixels
_PICTURE = (torch.arange(3 * 32 * 32) % 251).byte().view(1, 3, 32, 32)  # of many colours


@dataclass(frozen=True)
class Network:
    """What scores are by; those by another are not comparable with them."""

    name: str
    sha256: str
    """Of its file, or of the names and sums of its files."""
    look: Callable[[Tensor], Seen]
    """What it sees in pictures uint8 [N, 3, H, W], square ones of any size."""
    features: int
    """Numbers of a picture."""
    classes: int
    """0: it has none, and there is no Inception Score by it."""
    trained: Trained | None
    """On what, where that is known."""
    option: str = "features"
    """That named it, which errors begin with."""

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu", option: str = "features") -> "Network":
        """Of a file of `cogview train-features`, a folder of a vision encoder of transformers, or a file of the weights
        of Inception that the field compares by. ValueError in one sentence of anything else."""
        device = available(device)
        try:
            files, look, trained = _read(path, device)
            one = look(_PICTURE)
        except ValueError as error:
            raise ValueError(f"{option}: {re.sub('^(features|path): ', '', str(error))}") from error
        classes = 0 if one.logits is None else one.logits.shape[1]
        found = cls(path.resolve().name, sha256_of(files), look, one.features.shape[1], classes, trained, option)
        found._joined([one])  # what is not finite in its weights is not in this
        return found

    @torch.no_grad()
    def see(self, batches: Iterable[Tensor], changes: Sequence[Callable[[Tensor], Tensor]]) -> list[Seen]:
        """What it sees in pictures of one size, batch after batch, behind each of some changes;
        ValueError where that is not finite."""
        parts: list[list[Seen]] = [[] for _ in changes]
        for batch in batches:
            for some in batch.split(max(1, _AT_ONCE // batch[0:1, 0].numel())):
                for change, seen in zip(changes, parts, strict=True):
                    seen.append(self.look(change(some)))
        require(bool(parts[0]), "pictures", "at least one", "none")
        return [self._joined(seen) for seen in parts]

    def _joined(self, parts: Sequence[Seen]) -> Seen:
        features = torch.cat([part.features.float().cpu() for part in parts])
        found = [part.logits.float().cpu() for part in parts if part.logits is not None]
        logits = torch.cat(found) if found else None
        finite = all(bool(some.isfinite().all()) for some in (features, logits) if some is not None)
        require(finite, self.option, "a network that sees finite numbers in pictures", f"others of {self.name}")
        return Seen(features, logits)


def _read(path: Path, device: torch.device) -> tuple[Sequence[Path], Callable[[Tensor], Seen], Trained | None]:
    if path.is_dir():
        return encoders.files_of(path), encoders.vision(path, device), None
    if path.suffix == ".pth" and path.is_file():
        return [path], encoders.inception(path, device), None
    fits = path.suffix == ".safetensors" and path.is_file()
    kinds = "a .safetensors file of cogview train-features, a folder of a vision encoder, or Inception's .pth file"
    require(fits, "features", kinds, str(path))
    return [path], _on(classifier.read(path), device), classifier.trained_of(path)


def _on(model: torch.nn.Module, device: torch.device) -> Callable[[Tensor], Seen]:
    model = model.to(device)
    return torch.no_grad()(lambda pictures: model(pictures.to(device)))
