"""Training of the image tokenizer: Adam, warm-up and cosine, exact resume, a log and reconstruction pictures.

The n-th batch is a function of (seed, n) alone and the codebook draws no random numbers, so a run that was
stopped and resumed gives the weights of one that was not (with `steps`; with `seconds` the clock decides).
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cogview.data.files import save_tensors, written_beside
from cogview.data.shuffle import permutation

from .image import VQVAE, VQConfig

FORMAT = "cogview-vqvae-training-1"


@dataclass(frozen=True)
class VQReport:
    """What a training came to; psnr, used_codes and perplexity are of the evaluation pictures."""

    model: Path  # safetensors, for VQVAE.load
    reconstructions: Path  # PNG: originals above their reconstructions
    steps: int
    seconds: float  # spent in training, over all resumed runs
    images_per_second: float  # over all of them
    psnr: float  # dB
    used_codes: int
    perplexity: float  # exp of the entropy of the codes' use
    finished: bool  # False if Ctrl-C ended it; the checkpoint is there


def train_vqvae(
    images: Tensor,
    config: VQConfig,
    *,
    out_dir: str | Path,
    steps: int | None = None,
    seconds: float | None = None,
    eval_images: Tensor | None = None,
    batch_size: int = 32,
    lr: float = 1.5e-3,
    seed: int = 0,
    resume: bool = True,
    checkpoint_seconds: float = 60.0,
    progress: bool = True,
) -> VQReport:
    """Trains a VQ-VAE and leaves vqvae.safetensors, reconstructions.png and vqvae.jsonl in `out_dir`.

    images: uint8 [N, 3, H, W]. Give steps or seconds. eval_images: uint8 pictures to report on, else the
    first 256 of images. resume goes on from out_dir's checkpoint, which must have the same config, seed and
    batch size. bfloat16 is used where the processor computes it natively. Ctrl-C saves and returns.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images: expected uint8 [N, 3, H, W], got {images.dtype} {tuple(images.shape)}")
    if (steps is None) == (seconds is None):
        raise ValueError(f"steps, seconds: expected exactly one, got {steps} and {seconds}")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)  # the initial weights
    model = VQVAE(config).train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    settings = {"config": asdict(config), "seed": seed, "batch_size": batch_size, "images": len(images)}
    checkpoint = out / "vqvae.training.safetensors"
    step, spent = _restore(checkpoint, model, optimizer, settings) if resume and checkpoint.exists() else (0, 0.0)
    log_path = out / "vqvae.jsonl"
    _cut_log(log_path, step)

    fast = _native_bfloat16(images.device)
    saved_at = time.monotonic()
    started = saved_at - spent
    finished = True
    columns = (
        TextColumn("image tokenizer"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with open(log_path, "a", encoding="utf-8") as log, Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("", total=1.0, state="")
        try:
            while (done := _done(step, spent, steps, seconds)) < 1:
                for group in optimizer.param_groups:
                    group["lr"] = lr * _schedule(done)
                batch = images[_batch(step, len(images), batch_size, seed)].float() / 255
                with torch.autocast(images.device.type, torch.bfloat16, enabled=fast):
                    _, losses, codes = model(batch.contiguous(memory_format=torch.channels_last))
                optimizer.zero_grad()
                losses["total"].backward()
                optimizer.step()
                step, spent = step + 1, time.monotonic() - started
                if step % 20 == 0:
                    record = {
                        "step": step,
                        "seconds": round(spent, 1),
                        "images_per_second": step * batch_size / spent,
                    }
                    record |= {name: float(loss.detach()) for name, loss in losses.items()} | _code_use(codes, config)
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    state = f"loss {record['total']:.3f}, {record['images_per_second']:.0f} images/s"
                    bar.update(task, completed=done, state=state)
                if time.monotonic() - saved_at > checkpoint_seconds:
                    _save(checkpoint, model, optimizer, settings, step, spent)
                    saved_at = time.monotonic()
        except KeyboardInterrupt:
            finished = False
    _save(checkpoint, model, optimizer, settings, step, spent)
    model.save(out / "vqvae.safetensors")
    held = images[:256] if eval_images is None else eval_images
    rebuilt, codes = reconstruct(model.eval(), held)
    save_comparison(out / "reconstructions.png", held[:16], rebuilt[:16])
    squared = (rebuilt.float() - held.float()).square().mean() / 255**2
    use = _code_use(codes, config)
    return VQReport(
        out / "vqvae.safetensors",
        out / "reconstructions.png",
        step,
        spent,
        step * batch_size / max(spent, 1e-9),
        -10 * math.log10(max(float(squared), 1e-12)),
        int(use["used_codes"]),
        use["perplexity"],
        finished,
    )


@torch.no_grad()
def reconstruct(model: VQVAE, images: Tensor, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """images: uint8 [N, 3, H, W]. Their reconstructions, alike, and codes int64 [N, h, w]."""
    codes = torch.cat([model.encode(part.float() / 255) for part in images.split(batch_size)])
    pictures = [(model.decode(part) * 255).round().to(torch.uint8) for part in codes.split(batch_size)]
    return torch.cat(pictures), codes


def save_comparison(path: str | Path, originals: Tensor, rebuilt: Tensor) -> None:
    """Writes a PNG with the originals (uint8 [N, 3, H, W]) in the upper row, at twice their size."""
    rows = [torch.cat(list(images), dim=2) for images in (originals, rebuilt)]
    sheet = Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).contiguous().cpu().numpy())
    with written_beside(path) as beside:
        sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(beside, "PNG")


def _native_bfloat16(device: torch.device) -> bool:
    """Whether convolutions are faster in bfloat16 here: 2.5 times with AMX, slower where emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


_epoch_order = lru_cache(maxsize=2)(permutation)


def _batch(step: int, n: int, batch_size: int, seed: int) -> Tensor:
    """The picture numbers of a step: epochs are permutations, their ends shorter than a batch are dropped."""
    size = min(batch_size, n)
    epoch, place = divmod(step, n // size)
    return torch.from_numpy(_epoch_order(n, seed, epoch)[place * size : (place + 1) * size])


def _done(step: int, spent: float, steps: int | None, seconds: float | None) -> float:
    return step / max(steps, 1) if steps is not None else spent / max(seconds or 0, 1e-9)


def _schedule(done: float) -> float:
    """Share of the learning rate: 3 % warm-up, then cosine to 2 %."""
    return min(1.0, 0.01 + done / 0.03) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))


def _code_use(codes: Tensor, config: VQConfig) -> dict[str, float]:
    share = torch.bincount(codes.flatten(), minlength=config.codebook_size).float() / codes.numel()
    perplexity = torch.exp(-(share * torch.log(share.clamp_min(1e-12))).sum())
    return {"used_codes": int((share > 0).sum()), "perplexity": float(perplexity)}


def _save(path: Path, model: VQVAE, optimizer: torch.optim.Adam, settings: dict, step: int, spent: float) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": value for name, value in state.items()}
    position = json.dumps({"step": step, "seconds": spent})
    metadata = {"format": FORMAT, "settings": json.dumps(settings), "position": position}
    save_tensors(path, tensors, metadata)


def _restore(path: Path, model: VQVAE, optimizer: torch.optim.Adam, settings: dict) -> tuple[int, float]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"out_dir: {str(path)!r} is not a safetensors file ({error})") from error
    if metadata.get("format") != FORMAT or json.loads(metadata["settings"]) != settings:
        raise ValueError(f"out_dir: {str(path)!r} is of a training with other settings; remove it or name another")
    try:
        model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        state: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(model.parameters()):
            state[number] = {"step": tensors[f"adam.{number}.step"]}
            for moment in (
                "exp_avg",
                "exp_avg_sq",
            ):  # in the parameter's strides: fused Adam takes them for granted
                state[number][moment] = torch.empty_like(parameter).copy_(tensors[f"adam.{number}.{moment}"])
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"out_dir: {str(path)!r} is damaged ({error})") from error
    position = json.loads(metadata["position"])
    return position["step"], position["seconds"]


def _cut_log(path: Path, step: int) -> None:
    """Drops what was logged after the checkpoint: those steps come again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    with written_beside(path) as beside:
        beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
