"""CogView2's super-resolution of codes (arXiv 2204.14217): all fine cells at once from the coarse ones, then most of
them anew in a few parallel rounds (LoPAR), each from those that stand.

A round is one forward of all cells. Its last layer and the head compute only the cells that it leaves: what else it
would draw is hidden again in the next.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cogview.config import require
from cogview.generate import Update
from cogview.parts.transformer import Transformer, evaluating
from cogview.recipes.direct import Direct
from cogview.recipes.fine import Fine
from cogview.recipes.iterative import Iterative
from cogview.recipes.recipe import Recipe
from cogview.sampling import Sampling, check_seeds, sample_token
from cogview.sequence import Context, pad_text

_LOGITS = 2**24  # alive at once, 64 MB in float32 and as much again for what is made of them


@torch.no_grad()
def direct(recipe: Direct, model: Transformer, text: Tensor, coarse: Tensor, how: Sampling, chances: Tensor) -> Tensor:
    """Fine codes int64 [B, m, m] of text [B, T], -1 padded, and coarse codes [B, n, n]. chances: float [B, m m] in
    [0, 1), of each cell."""
    c = recipe.config
    fine = text.new_zeros(len(text), c.fine_grid**2)
    inputs, _ = recipe.layout(text, torch.cat([coarse.flatten(1), fine], dim=1))
    places = torch.arange(recipe.before, recipe.length).expand(len(text), -1)
    return _drawn(recipe, model, inputs, places, how, chances).view(-1, c.fine_grid, c.fine_grid)


@torch.no_grad()
def refine(
    recipe: Iterative,
    model: Transformer,
    text: Tensor,
    fine: Tensor,
    how: Sampling,
    chances: Tensor,
    *,
    top_k: Sequence[int] | None = None,
    within: Tensor | None = None,
    update: Update = lambda rounds: None,
) -> Tensor:
    """Codes int64 [B, m, m] like `fine`, of which those that the order leaves stay. top_k: of each round, instead of
    how's; published `lopar.PUBLISHED_TOP_K`. within: bool [B, m, m], the cells that may change. `update` is told the
    rounds done."""
    order, grid, rounds = recipe.order, recipe.config.fine_grid, int(recipe.order.max())
    require(top_k is None or len(top_k) == rounds, "top_k", f"one of each of {rounds} rounds", top_k)
    free = torch.ones_like(fine, dtype=torch.bool).flatten(1) if within is None else within.flatten(1)
    codes = fine.flatten(1)
    for number in range(1, rounds + 1):
        cells = (order == number).nonzero()[:, 0]
        if len(cells) and bool(free[:, cells].any()):
            inputs, _ = recipe.hidden(text, codes, free & (order >= number))
            places = (recipe.before + cells).expand(len(codes), -1)
            own = how if top_k is None else dataclasses.replace(how, top_k=top_k[number - 1])
            drawn = _drawn(recipe, model, inputs, places, own, chances[:, cells])
            codes = codes.clone()
            codes[:, cells] = torch.where(free[:, cells], drawn, codes[:, cells])
        update(number)
    return codes.view(-1, grid, grid)


def _drawn(recipe: Fine, model: Transformer, inputs: Tensor, places: Tensor, how: Sampling, chances: Tensor) -> Tensor:
    """int64 [B, n] on the CPU: codes drawn at some places, the same of all rows; ValueError where logits are not
    finite."""
    context: Context = recipe.context(inputs)
    if how.text_attention:
        context = dataclasses.replace(context, emphasis=recipe.emphasis(inputs, how.text_attention))
    context = dataclasses.replace(context, only=places).to(model.device)
    codes = recipe.config.image_vocab
    allowed = torch.ones(codes, dtype=torch.bool, device=model.device)
    with evaluating(model):
        states = model.states(inputs.to(model.device), context).flatten(0, 1)
        chances, found = chances.to(model.device).flatten(), list[Tensor]()
        for some, own in zip(*(x.split(max(1, _LOGITS // codes)) for x in (states, chances)), strict=True):
            logits = model.embedding.logits(some, slice(codes))
            if not bool(logits.isfinite().all()):
                raise ValueError("the model's logits are not finite")
            found.append(sample_token(logits, allowed, own, how))
    return torch.cat(found).view(places.shape).cpu()


def fine_batches(
    recipe: Recipe,
    model: Transformer,
    captions: Sequence[Sequence[int]],
    codes: Tensor,
    how: Sampling,
    *,
    seeds: Sequence[int] | None = None,
    update: Update = lambda tokens: None,
    **of_rounds: object,
) -> Iterator[Tensor]:
    """Fine codes int64 [B, m, m], a batch after the other, of captions as raw text ids and one picture each: its coarse
    codes for recipe direct, fine ones for iterative, whose options are those of `refine`.

    seeds: one each, default 0..N-1; a picture depends on its own alone, not on its batch. `update` is told how many of
    all N m^2 cells are done. Everything is checked before the first is drawn."""
    if not isinstance(recipe, Direct | Iterative):
        raise ValueError(f"model: expected one of recipe direct or iterative, got {recipe.name}")
    grids = dict(zip((Direct, Iterative), recipe.grids, strict=True))
    grid, cells = grids[type(recipe)], recipe.config.fine_grid**2
    text, seeds = pad_text(captions), check_seeds(range(len(captions)) if seeds is None else seeds, len(captions))
    fits = codes.ndim == 3 and list(codes.shape) == [len(text), grid, grid]
    require(fits, "codes", f"[{len(text)}, {grid}, {grid}], one picture a caption", list(codes.shape))
    recipe.vocab.check(text, [codes.flatten(1)], recipe.config.max_caption + grid**2, commands=0)
    return _batches(recipe, model, text, codes.cpu(), how, seeds, update, cells, of_rounds)


def _batches(recipe, model, text, codes, how, seeds, update, cells, of_rounds) -> Iterator[Tensor]:
    for start in range(0, len(text), how.batch_size):
        part = slice(start, start + how.batch_size)
        chances = torch.stack([torch.rand(cells, generator=torch.Generator().manual_seed(s)) for s in seeds[part]])
        rows, total = len(chances), cells * start
        if isinstance(recipe, Direct):
            found = direct(recipe, model, text[part], codes[part], how, chances)
        else:
            within = of_rounds.get("within")
            own = of_rounds | ({} if within is None else {"within": within[part]})
            rounds = int(recipe.order.max())

            def told(number: int, rows: int = rows, total: int = total, rounds: int = rounds) -> None:
                update(total + rows * cells * number // rounds)

            found = refine(recipe, model, text[part], codes[part], how, chances, **own, update=told)
        update(total + rows * cells)
        yield found
