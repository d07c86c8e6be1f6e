"""A published codec from a folder on disk, as transformers' or diffusers' `save_pretrained` writes it, or from one of a
whole Janus or Emu3, which has its codec inside. Nothing comes from the network, and weights only from safetensors: a
folder is data, none of it is executed."""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cogview.config import require
from cogview.data.pretrained import check_index, read_config, short
from cogview.tokenizers.published_codec import (
    KINDS,
    CodecConfig,
    PublishedCodec,
    class_of,
    settings_of,
    without_weights,
)

NAMES = {
    "janus_vqgan": "JanusVQVAE",
    "janus": "JanusVQVAE",
    "emu3_vqgan": "Emu3VQVAE",
    "emu3": "Emu3VQVAE",
    "VQModel": "VQModel",
}
"""What a config.json says it is of, and the codec that is or has."""
_INSIDE = r"^(model\.)?vqmodel\."  # what the names of a codec's tensors begin with in a whole model


def read(folder: str | Path) -> PublishedCodec:
    """The codec of a folder. ValueError in one sentence where there is none, it is another kind of model, parts are
    missing, or a package is."""
    folder = Path(folder)
    raw = read_config(folder / "config.json", "codec")
    says = raw.get("_class_name", raw.get("model_type"))
    if not isinstance(says, str) or says not in NAMES:
        raise ValueError(f"codec: expected a folder of {', '.join(KINDS)}, got one of {says!r}, {folder}")
    kind, whole = NAMES[says], isinstance(raw.get("vq_config"), dict)
    made = class_of(kind)
    given = settings_of(made, raw["vq_config"] if whole else raw)
    meta = without_weights(made, given)
    _check_files(folder, raw, sum(value.numel() for value in meta.state_dict().values()))
    model = _load(made, given, folder, whole)
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    given = json.loads(json.dumps(settings_of(made, config)))
    mean, std = _range(folder, given)
    try:
        with torch.no_grad():
            side = KINDS[kind].decode(model.eval(), torch.zeros(1, 2, 2, dtype=torch.int64)).shape[-1]
        codec = PublishedCodec(model, CodecConfig(kind, given[KINDS[kind].codes], side // 2, mean, std, given))
        codec.decode(codec.encode(torch.zeros(1, 3, side, side)))
    except Exception as error:  # of sizes that do not go together
        raise ValueError(f"codec: the {kind} in {folder} does not give pictures back: {short(error)}") from error
    return codec


def _load(made: Any, given: dict[str, Any], folder: Path, whole: bool) -> Any:
    """The model in float32, whatever the files have."""
    from_disk = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    if hasattr(made, "config_class"):
        how = {"config": made.config_class(**given), "key_mapping": {_INSIDE: ""}, "dtype": torch.float32}
    else:
        how = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    try:
        with _quiet(KINDS[made.__name__].package):
            model, found = made.from_pretrained(str(folder), **from_disk, **how)
    except Exception as error:  # whatever a library makes of wrong files
        raise ValueError(f"codec: cannot read {made.__name__} from {folder} ({short(error)})") from error
    for what in ("missing", "mismatched", "unexpected"):
        names = sorted(map(str, found[f"{what}_keys"]))
        if names and not (whole and what == "unexpected"):
            raise ValueError(f"codec: {folder} is no whole {made.__name__}: {len(names)} {what} tensors, as {names[0]}")
    return model


def _check_files(folder: Path, config: dict[str, Any], numbers: int) -> None:
    """ValueError unless there may be so many numbers in files of this folder, and nothing leads out of it."""
    files = list(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    require(bool(files), "codec", "weights as *.safetensors, which cannot execute code", f"none in {folder}")
    require(
        numbers <= size, "codec", f"weights of {numbers:,} numbers, as config.json says", f"{size:,} bytes in {folder}"
    )
    odd = (folder / "adapter_config.json").exists() or config.get("quantization_config") is not None
    require(not odd, "codec", "plain weights", f"an adapter or quantized ones in {folder}")
    check_index(folder, "codec")


def _range(folder: Path, config: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and deviation of a codec's pictures: of the folder's image processor, or what such codecs are trained with,
    -1 to 1, and aMUSEd's, which alone look up codes in `decode`, 0 to 1."""
    mean, std = (0.0, 1.0) if config.get("lookup_from_codebook") else (0.5, 0.5)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            says = read_config(folder / name, "codec")
            says = says.get("image_processor", says)
            if not isinstance(says, dict):
                raise ValueError(f"codec: expected an image processor in {folder / name}, got {says!r}")
            if says.get("do_normalize") is False:
                mean, std = 0.0, 1.0
            elif says.get("image_mean") is not None and says.get("image_std") is not None:
                mean, std = says["image_mean"], says["image_std"]
    return _three(mean), _three(std)


def _three(value: Any) -> list[float]:
    """Whether they are numbers is the config's to check."""
    return [float(x) if isinstance(x, int) else x for x in (value if isinstance(value, list) else [value] * 3)]


@contextmanager
def _quiet(package: str) -> Iterator[None]:
    """Its warnings and bars: what it has to say is raised here."""
    logging = importlib.import_module(f"{package}.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
