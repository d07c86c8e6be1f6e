"""Published networks that see pictures, from files on disk: vision encoders of transformers, and the Inception v3 that
FID and the Inception Score are defined by. Nothing comes from the network, and nothing pickled is executed."""

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.config import require
from cogview.data.images import resized
from cogview.data.pretrained import check_index, read_config, short
from cogview.evaluation.classifier import Seen

Look = Callable[[Tensor], Seen]

VISION = {
    "clip": ("CLIPVisionModelWithProjection", "image_embeds"),
    "clip_vision_model": ("CLIPVisionModelWithProjection", "image_embeds"),
    "dinov2": ("Dinov2Model", "pooler_output"),
    "siglip": ("SiglipVisionModel", "pooler_output"),
    "siglip_vision_model": ("SiglipVisionModel", "pooler_output"),
}
"""What a config.json says it is of: the model that is or has, and which of its outputs are the features."""


def files_of(folder: Path) -> list[Path]:
    """Those that say what the encoder of a folder is."""
    return [folder / "config.json", folder / "preprocessor_config.json", *sorted(folder.glob("*.safetensors"))]


def vision(folder: Path, device: torch.device) -> Look:
    """Features of CLIP, as of CMMD, or of DINOv2 or SigLIP; it has no classes. The whole picture is resized to the size
    that the network takes, bicubically, where their processors may cut edges off."""
    config, processor = (read_config(folder / name, "features") for name in ("config.json", "preprocessor_config.json"))
    kind = str(config.get("model_type"))
    require(kind in VISION, "features", f"an encoder of {', '.join(VISION)}", f"{kind} in {folder}")
    require(any(folder.glob("*.safetensors")), "features", "weights as *.safetensors", f"none in {folder}")
    check_index(folder, "features")
    name, output = VISION[kind]
    model = _from_disk(name, folder).to(device).eval()
    side = _side(processor.get("crop_size", processor.get("size")), folder)
    mean, std = (_three(processor.get(f"image_{of}"), of, folder).to(device) for of in ("mean", "std"))

    @torch.no_grad()
    def look(pictures: Tensor) -> Seen:
        pixels = resized(pictures.to(device), side).float() / 255
        return Seen(getattr(model(pixel_values=(pixels - mean) / std), output), None)

    return look


def _from_disk(name: str, folder: Path) -> Any:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(f"features: {folder} needs transformers: pip install '.[integrations]' ({error})") from error
    how = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True, "dtype": torch.float32}
    how["attn_implementation"] = "sdpa"  # a config may name a kernel that transformers would get from its hub
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)  # what it has to say is raised here
    try:
        model, found = getattr(transformers, name).from_pretrained(str(folder), **how)
    except Exception as error:  # whatever a library makes of wrong files
        raise ValueError(f"features: cannot read {name} from {folder} ({short(error)})") from error
    finally:
        transformers.logging.set_verbosity(level)
    for what in ("missing", "mismatched"):  # of a whole CLIP text is unexpected
        if names := sorted(map(str, found[f"{what}_keys"])):
            raise ValueError(f"features: {folder} is no whole {name}: {len(names)} {what} tensors, as {names[0]}")
    return model


def _side(size: Any, folder: Path) -> int:
    """Of a processor's size, a number or sides by name."""
    found = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    fits = isinstance(found, int) and 16 <= found <= 4096
    require(fits, "features", f"a size of 16 to 4,096 pixels in {folder / 'preprocessor_config.json'}", size)
    return int(found)  # type: ignore[arg-type]


def _three(values: Any, of: str, folder: Path) -> Tensor:
    fits = isinstance(values, list) and len(values) == 3 and all(isinstance(x, int | float) for x in values)
    require(fits, "features", f"image_{of} of three numbers in {folder / 'preprocessor_config.json'}", values)
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)


def inception(path: Path, device: torch.device) -> Look:
    """The 2,048 features and 1,008 logits of the Inception v3 of 2015-12-05, whose weights torch-fidelity publishes as
    pt_inception-2015-12-05-6726825d.pth, computed by that package as torchmetrics does."""
    try:
        importlib.import_module("torch_fidelity")
        made: Any = importlib.import_module("torchmetrics.image.fid").NoTrainInceptionV3
    except ImportError as error:
        needs = "torchmetrics and torch-fidelity: pip install '.[evaluation]' torch-fidelity"
        raise ValueError(f"features: {path} needs {needs} ({error})") from error
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder) / "tensors.pth"  # the package unpickles whatever it is given
        try:
            torch.save(torch.load(path, map_location="cpu", weights_only=True), clean)
            model = made("inception-v3-compat", ["2048", "logits_unbiased"], str(clean)).to(device)
        except Exception as error:  # no pickle of tensors alone, or those of something else
            raise ValueError(f"features: {path} holds no weights of Inception v3 ({short(error)})") from error

    @torch.no_grad()
    def look(pictures: Tensor) -> Seen:
        features, logits = model._torch_fidelity_forward(pictures.to(device))
        return Seen(features.flatten(1), logits)

    return look
