"""Released models into runs, and runs into the released layout.

    import_model(Path("cogview-base"), Path("runs/cogview"), name="gpt", vqvae=..., text=...)
    export_run(Path("runs/cogview"), Path("released"))

CogView's and CogView2's, see `families`. A run's checkpoint has the released float16 values themselves: half the bytes
of float32, in which they are computed with and trained. The way back gives the same values.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.config import require
from cogview.data.files import write_text
from cogview.parts.transformer import Transformer
from cogview.progress import progress, track
from cogview.published import cuts, families
from cogview.published.families import FAMILIES, Family, Tokens
from cogview.published.image import read_image_tokenizer
from cogview.published.layout import Layout
from cogview.published.torch_file import all_finite, save
from cogview.published.transformer import CONFIG, Published, part_path
from cogview.recipes.fine import Fine
from cogview.recipes.recipe import Recipe
from cogview.recipes.superresolution import Restart, SuperResolution
from cogview.runs import folder_of
from cogview.system import System
from cogview.tokenizers.image import VQVAE
from cogview.tokenizers.image_tokenizer import ImageTokenizer
from cogview.tokenizers.load import load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from cogview.train import checkpoint, record
from cogview.train.state import State

TEXT, IMAGE = "text.model", "vqvae.safetensors"

Tell = Callable[[str], None]


def import_model(
    source: Path,
    run: Path,
    *,
    name: str,
    recipe: str = "cogview",
    vqvae: Path | None = None,
    text: Path | None = None,
    heads: int | None = None,
    image_grid: int | None = None,
    restart: Restart | None = None,
    tell: Tell = print,
) -> Path:
    """Makes a released model the model `name` of a run, and writes its tokenizers there if they are not yet; its
    checkpoint. All is read and checked before anything is written; `tell` is told what was found.

    source: a folder with latest_checkpointed_iteration.txt or latest, or one with mp_rank_*_model_states.pt. vqvae,
    text: its tokenizers; None: those of the run. restart: of recipe superresolution, see its config; default "on", as
    it was trained. ValueError in one sentence where something is missing or does not fit, as weights of another recipe.
    """
    family = families.of(recipe)
    fits = restart is None or recipe == SuperResolution.name
    require(fits, "restart", f"none but with recipe {SuperResolution.name}", restart)
    folder = folder_of(run, name)
    there = checkpoint.latest(folder)
    require(there is None, "name", "a new one", f"{name}, which has {there}")
    published = Published.read(source)
    published.check_stage(recipe)
    text_tokenizer = _tokenizer(run / TEXT, text, "text", TextTokenizer.load, TextTokenizer.load)
    image_tokenizer = _tokenizer(run / IMAGE, vqvae, "vqvae", read_image_tokenizer, load_image_tokenizer)
    tokens = Tokens(image_tokenizer.config.codebook_size, text_tokenizer.vocab_size, text_tokenizer.chinese_from)
    own = family.release(recipe).own | ({} if restart is None else {"restart": restart})
    made = published.recipe(recipe, tokens, heads=heads, image_grid=image_grid, **own)
    c, count = made.config, len(published.files)
    grids = made.grids if isinstance(made, Fine) else (c.image_grid,)
    tell(
        f"{recipe}: {c.num_layers} layers of width {c.hidden_size} with {c.num_heads} heads, "
        f"{' and '.join(f'{grid} x {grid}' for grid in grids)} image tokens and up to {c.max_text} of text, "
        f"of {count} part{'s' if count > 1 else ''}"
    )
    if published.others:
        more = len(published.others) - 20
        tell(f"not read: {', '.join(published.others[:20])}{f' and {more:,} more' if more > 0 else ''}")
    if (spare := published.rows - made.vocab.size) > 0:
        tell(f"left out: {spare:,} rows that pad the token table")
    elif spare < 0:
        tell(f"added: {-spare} rows of zeros that pad the token table")
    reading = track(published.tensors(made), "reading", len(published.modules[0]))
    tensors = {f"model.{ours}": tensor for ours, tensor in reading}
    for path, tokenizer in ((run / TEXT, text_tokenizer), (run / IMAGE, image_tokenizer)):
        if not path.exists():
            tokenizer.save(path)
    step = published.iteration
    about = {
        "recipe": recipe,
        "preset": family.preset,
        "published": {"folder": str(source.resolve()), "iteration": step},
    }
    about |= {"config": dataclasses.asdict(c), "tokenizers": [text_tokenizer.sha256, image_tokenizer.sha256]}
    path = checkpoint.path_of(folder, step)
    folder.mkdir(parents=True, exist_ok=True)
    with progress("writing"):
        checkpoint.save(path, tensors, {**about, "run": dataclasses.asdict(State(step=step)), "counts": {}})
    record.write(folder, step, about)
    return path


def _tokenizer(ours: Path, given: Path | None, option: str, read: Callable[..., Any], load: Callable[..., Any]) -> Any:
    """That of the run, or the one given, which is the same where there are both."""
    if given is None:
        require(ours.exists(), option, f"--{option} PATH, since there is no {ours}", None)
        return load(ours)
    new = read(given)
    if ours.exists() and load(ours).sha256 != new.sha256:
        raise ValueError(f"{option}: expected the same tokenizer as {ours}, got another one, {given}")
    return new


def export_run(
    run: Path, out: Path, *, name: str | None = None, step: int | None = None, parts: int = 1, tell: Tell = print
) -> Path:
    """Writes a run's model and tokenizers as released files of its family, the model in so many tensor-parallel parts;
    the folder of the parts.

    ValueError where that family's code would compute something else in any sizes (attention, positions, windows, slots
    of text: `Family.check`), and where float16 does not have the values. `tell` is told which sizes are numbers in that
    code and others here, as codes, grids and the order of rounds (`Family.differing`): it computes the model once they
    are changed there; that norms are of another PB-relax; and what is rounded, added or not written."""
    system = System.load(run, name=name, step=step, dtype=None)
    recipe, source = system.recipe, system.source
    assert source is not None
    family = families.of(recipe.name)
    family.check(recipe)
    require(
        1 <= parts <= 99 and recipe.config.num_heads % parts == 0,
        "parts",
        f"a divisor of {recipe.config.num_heads} heads",
        parts,
    )
    image = _released_image(system.image) if family.image else {}
    folder = out / str(source.step)
    paths = [part_path(folder, rank) for rank in range(parts)]
    taken = [*(other.tracker for other in FAMILIES), family.text, *([family.image] if family.image else [])]
    free = not any((out / name).exists() for name in taken) and not set(folder.glob("mp_rank_*")).difference(paths)
    require(free, "out", "a folder without a released model", str(out))
    if differing := family.differing(recipe):
        tell(differing)
    halves = _halves(recipe, system.model, family, tell)
    words = halves[family.words]
    if (rows := cuts.padded(len(words), parts) - len(words)) > 0:
        tell(f"added: {rows} rows of zeros that pad the token table for {parts} parts")
        halves[family.words] = torch.cat([words, words.new_zeros(rows, words.shape[1])])
    about = family.beside(recipe, len(halves[family.words]), parts)
    whole = {key: cuts.cut(key, value, parts) for key, value in halves.items()}
    for rank, path in enumerate(track(paths, "writing")):
        module = {key: pieces[rank] for key, pieces in whole.items()}
        save({"module": module, "iteration": source.step, "mp_world_size": parts}, path)
    system.text.save(out / family.text)
    if family.image:
        save(image, out / family.image)
    else:
        tell("not written: the image tokenizer, of whose file the run has the networks of one size only")
    if about is not None:
        write_text(out / CONFIG, json.dumps(about, indent=4))
    write_text(out / family.tracker, str(source.step))  # the last: what it is missing beside is not whole
    return folder


def _released_image(image: ImageTokenizer) -> dict[str, Tensor]:
    """An image tokenizer's tensors; the moving averages of one that has none are its codes, each of one vector."""
    if not isinstance(image, VQVAE):
        raise ValueError(f"image tokenizer: expected a VQ-VAE, got {type(image).__name__!r}")
    codebook, decoded = image.config.codebook, image.config.reconstruction
    fits = codebook != "relaxed" and decoded == "pixels"
    require(fits, "image tokenizer", "nearest codes and pixels, as CogView's files have", f"{codebook}, {decoded}")
    tensors = {name: value.detach() for name, value in image.state_dict().items()}
    embed, own = tensors["quantize_t.embed"], ("embed", "cluster_size", "embed_avg")
    averages = {"quantize_t.cluster_size": embed.new_ones(embed.shape[1]), "quantize_t.embed_avg": embed.clone()}
    ours = (name for name in tensors if not name.startswith("quantize_t.") or name.removeprefix("quantize_t.") in own)
    return averages | {name: tensors[name] for name in ours}


def _halves(recipe: Recipe, model: Transformer, family: Family, tell: Tell) -> dict[str, Tensor]:
    """A model's tensors in float16 by published names; what that changes is told."""
    halves, changed, total = dict[str, Tensor](), 0, 0
    layout = Layout(recipe)
    for ours in track(layout.names, "converting"):
        value = model.get_parameter(ours).detach()  # files have tensors, not parameters
        half = value.half()
        require(all_finite(half), ours, "values that float16 has", "others")
        if value.dtype != torch.float16:
            changed += int((half.to(value.dtype) != value).sum())
        total += value.numel()
        halves |= layout.released(ours, half)
    if changed:
        tell(f"rounded to float16: {changed:,} of {total:,} values")
    if (relax := model.config.relax) != family.relax:
        tell(f"its norms are those of relax {relax}; {family.code} {family.relaxes}")
    return halves
