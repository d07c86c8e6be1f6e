"""A trained system: both tokenizers and the model between them, to encode, draw and judge with.

    system = System.load("runs/mine")
    pictures = system.draw("a fox above a tree")

Captions are a string or a list of strings, pictures uint8 [N, 3, H, W] or PIL images of any size, codes int64
[N, h, w]. N captions, S tokens of a sequence, V ids.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview.config import require
from cogview.device import available
from cogview.generate import Update, describe, generate_batches
from cogview.inputs import Bad, BadCaption, Captions, Pictures, images, listed, texts
from cogview.loss import check_finite, row_means
from cogview.magnify import magnify_batches
from cogview.models import check_tokenizers, load_model
from cogview.parts.quantized import int8_weights
from cogview.parts.transformer import Transformer, evaluating
from cogview.recipes import RECIPES
from cogview.recipes.caption import caploss
from cogview.recipes.recipe import Recipe
from cogview.runs import Source, last_of, sources
from cogview.sampling import Sampling, check_seed, check_seeds
from cogview.sequence import Batch, pad_text
from cogview.tokenizers.image_tokenizer import ImageTokenizer
from cogview.tokenizers.load import load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from cogview.train import checkpoint

_AT_ONCE = 32  # rows
_PIXELS = 8 * 256**2  # that go through an image tokenizer together


class Likelihood(NamedTuple):
    """Mean log-probabilities a token, float32 [N], in nats: at most 0, and the larger the likelier; NaN of what the
    model does not predict."""

    picture: Tensor
    """Of the image's codes, given what stands before them in the model's sequence: the caption."""
    caption: Tensor
    """Of the caption's own tokens, likewise; in a sequence of text and then image they are predicted without it. Of a
    model that captions in a sequence of its own, as CogLM does, given the picture."""


class Described(NamedTuple):
    """A caption of a picture, and its CapLoss."""

    text: str
    caploss: float


class Ranked(NamedTuple):
    """Candidates in an order."""

    order: Tensor
    """int64 [N]: their numbers from 0 on, the best first."""
    caploss: Tensor
    """float32 [N] of each, by its number: the lowest is the best."""


@dataclass(frozen=True)
class System:
    """Both tokenizers and the model between them; where they come from, if they were loaded."""

    text: TextTokenizer
    image: ImageTokenizer
    recipe: Recipe
    model: Transformer
    source: Source | None = None

    def __post_init__(self):
        c = self.recipe.config
        codes, ids = self.image.config.codebook_size, self.text.vocab_size
        require(codes == c.image_vocab, "image tokenizer", f"{c.image_vocab} codes, as the model has", codes)
        require(ids <= c.text_vocab, "text tokenizer", f"at most {c.text_vocab} ids, as the model has", ids)
        for name, values in self.image.state_dict().items():
            if not bool(values.isfinite().all()):
                raise ValueError(f"image tokenizer: expected finite weights, got others in {name}")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        *,
        name: str | None = None,
        step: int | None = None,
        draws: str | None = None,
        recipe: str | None = None,
        dtype: torch.dtype | None = torch.float32,
        int8: bool = False,
        compile: bool = False,
    ) -> "System":
        """Reads a run's folder. name: of its model, default the one trained last of those that draw what is asked for.
        step: of its checkpoint, default the best by held-out loss, or the newest; where that one is damaged the next is
        taken, and `source.why` says so. draws: what the model is to draw: pictures, captions or larger pictures;
        default pictures, where a model does. recipe: that the model is to be of, whatever it draws. dtype: of the
        model, None: as its weights are stored. int8: its linear layers' weights in 8 bits, by torchao. compile: see
        `Transformer.compile_step`.

        ValueError in one sentence where a part is missing or does not fit the others, or torch cannot use the device.
        """
        folder, device = Path(folder), available(device)
        recipes = [name for name, kind in RECIPES.items() if (draws or "pictures") in kind.draws]
        if recipe is not None:
            recipes = [recipe]
        elif draws is None:
            name = last_of(folder, recipes) if name is None else name
        any_recipe = draws is None and recipe is None
        tried = sources(folder, name, step, recipes=None if any_recipe else recipes)
        text, image = TextTokenizer.load(folder / "text.model"), load_image_tokenizer(folder / "vqvae.safetensors")
        model: dict[str, Any] = {"device": device, "dtype": dtype, "int8": int8, "compile": compile}
        found = cls._of_first(text, image.to(device).eval(), folder, tried, **model)
        return found if draws is None else found.which_draws(draws)

    def beside(self, recipe: str, *, name: str | None = None, **how: Any) -> "System":
        """Another model of the same run, with the tokenizers that are there. recipe, name, how: as in `load`."""
        assert self.source is not None
        folder = self.source.path.parent.parent
        tried = sources(folder, name, recipes=[recipe])
        how = {"dtype": torch.float32} | how | {"device": available(how.get("device", self.model.device))}
        return self._of_first(self.text, self.image, folder, tried, **how)

    @classmethod
    def _of_first(
        cls,
        text: TextTokenizer,
        image: ImageTokenizer,
        folder: Path,
        tried: Iterator[Source],
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        int8: bool = False,
        compile: bool = False,
    ) -> "System":
        """That of the first checkpoint that is whole."""
        damaged = None
        for source in tried:
            try:
                check_tokenizers(folder, source.path, [text.sha256, image.sha256])
                recipe, model = load_model(source.path, device=device, dtype=dtype)
            except checkpoint.Damaged as error:
                damaged = damaged or error
            else:
                if int8:
                    int8_weights(model)
                if compile:
                    model.compile_step()
                return cls(text, image, recipe, model, source)
        raise damaged or ValueError(f"{folder} holds no trained model")

    def which_draws(self, what: str) -> "System":
        """Itself, as it draws this; ValueError where the model draws something else."""
        recipe = self.recipe.drawing(what)
        name = "model" if self.source is None else self.source.path.parent.name
        require(recipe is not None, "name", f"a model that draws {what}", f"{name}, of {self.recipe.name}")
        assert recipe is not None
        return self if recipe is self.recipe else replace(self, recipe=recipe)

    def encode(self, captions: Captions) -> list[list[int]]:
        """Text ids of each caption; ValueError names one that is blank, too long, no valid Unicode, or has characters
        that the tokenizer knows no ids of."""
        longest, found = self.recipe.config.max_text, list[list[int]]()
        for number, caption in enumerate(texts(captions), 1):
            found.append(self.text.encode(caption))
            if unknown := self.text.unknown(caption, found[-1]):
                raise BadCaption(number, caption, "characters that the text tokenizer knows", repr(unknown))
            if self.text.chinese_from is not None and (other := self.text.foreign(caption)):
                raise BadCaption(
                    number, caption, "English or Chinese", f"{other!r}, which its text tokenizer has not seen"
                )
            if (count := len(found[-1])) > longest:
                raise BadCaption(number, caption, f"at most {longest} tokens", f"{count}")
        return found

    @torch.no_grad()
    def tokenize(self, pictures: Pictures, *, bad: Bad | None = None) -> Tensor:
        """Codes int64 [N, h, w] of pictures, which are cropped to a square and resized to what the model draws. bad:
        takes what is wrong with some, see `inputs.images`."""
        parts = images(pictures, self.side, bad).split(_together(self.side**2))
        parts = [self.image.encode(part.to(self.model.device).float() / 255).cpu() for part in parts]
        return torch.cat(parts)

    @torch.no_grad()
    def pictures(self, codes: Tensor) -> Tensor:
        """Pictures uint8 [N, 3, H, W] of codes [N, h, w], or of one picture's [h, w]."""
        codes = codes[None] if isinstance(codes, Tensor) and codes.ndim == 2 else codes
        fits = isinstance(codes, Tensor) and _are_whole(codes) and codes.ndim == 3 and 0 not in codes.shape[1:]
        require(fits, "codes", "a tensor of whole numbers [N, h, w]", codes)
        parts = codes.long().split(_together(codes[0:1].numel() * self.image.config.downsample**2))
        parts = [self.image.decode(part.to(self.model.device)).cpu() for part in parts]
        return (torch.cat(parts).clamp(0, 1) * 255).round().to(torch.uint8)

    def draw(self, captions: Captions, *, seeds: Sequence[int] | None = None, **how: Any) -> Tensor:
        """Pictures uint8 [N, 3, H, W] of captions. seeds: one each, default 0 to N - 1; the same one draws the same
        picture in any batch. how: temperature, top_k, top_p, guidance and batch_size, see `Sampling`."""
        parts = list(self.draw_batches(captions, Sampling(**how), seeds=seeds))
        side = self.side
        return torch.cat(parts) if parts else torch.zeros(0, 3, side, side, dtype=torch.uint8)

    def draw_batches(
        self,
        captions: Captions,
        how: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        update: Update = lambda tokens: None,
    ) -> Iterator[Tensor]:
        """The same a batch after the other. `update` is told how many tokens are drawn of all, N h w."""
        return map(self.pictures, self.code_batches(captions, how, seeds=seeds, update=update))

    def code_batches(
        self,
        captions: Captions,
        how: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        update: Update = lambda tokens: None,
    ) -> Iterator[Tensor]:
        """Their codes int64 [B, h, w]."""
        ids = self.which_draws("pictures").encode(captions)
        return generate_batches(self.recipe, self.model, ids, how, seeds=seeds, update=update)

    def magnify(
        self,
        captions: Captions,
        pictures: Pictures,
        *,
        seeds: Sequence[int] | None = None,
        bad: Bad | None = None,
        **how: Any,
    ) -> Tensor:
        """Pictures uint8 [N, 3, 2 H, 2 W] of pictures (or their codes) and their captions, one each, at twice the side,
        by a model of recipe superresolution. seeds: as in `draw`; how: likewise, but by default the likeliest codes are
        taken, top_k 1, which come nearest to the true picture (published CogView: 200, temperature 1.02).

        bad: takes what is wrong with some of the pictures, see `inputs.images`, which are black then.
        """
        given, codes, bad = texts(captions), self._codes(pictures, bad), bad or {}
        require(len(given) == len(codes), "captions", f"one of each of {len(codes)} pictures", len(given))
        seeds = check_seeds(range(len(codes)) if seeds is None else seeds, len(codes))
        good, side = [n for n in range(len(codes)) if n not in bad], 2 * self.side
        large = torch.zeros(len(codes), 3, side, side, dtype=torch.uint8)
        chosen, own = [given[n] for n in good], [seeds[n] for n in good]
        for part in self.magnify_batches(chosen, codes[good], Sampling(**{"top_k": 1} | how), seeds=own):
            large[good[: len(part)]], good = part, good[len(part) :]
        return large

    def magnify_batches(
        self,
        captions: Captions,
        codes: Tensor,
        how: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        update: Update = lambda tokens: None,
    ) -> Iterator[Tensor]:
        """The same of codes [N, h, w], batch by batch. `update` is told how many tokens are drawn of all, 4 N h w."""
        ids = self.which_draws("larger pictures").encode(captions)
        codes = self._codes(codes)
        return map(self.pictures, magnify_batches(self.recipe, self.model, ids, codes, how, seeds=seeds, update=update))

    def caption(
        self,
        pictures: Pictures,
        *,
        seeds: Sequence[int] | None = None,
        longest: int | None = None,
        language: str | None = None,
        bad: Bad | None = None,
        **how: Any,
    ) -> list[str]:
        """A caption of each picture (or its codes), by a model of recipe caption or coglm; one that it ends at once is
        "".

        seeds: one each, default 0 to N - 1. longest: tokens of a caption. language: "en" (default) or "zh", of recipe
        coglm, which is told; models of recipe caption choose. how: as in `draw`. bad: takes what is wrong
        with some of the pictures, see `inputs.images`, whose captions are "" then; without it one such is a ValueError.
        """
        codes = self._codes(pictures, bad)
        recipe = self._captioning(language)
        found = describe(recipe, self.model, codes, Sampling(**how), seeds=seeds, longest=longest)
        return ["" if number in (bad or ()) else self._words(ids) for number, ids in enumerate(found)]

    def describe(
        self,
        pictures: Pictures,
        count: int = 1,
        *,
        seed: int = 0,
        longest: int | None = None,
        language: str | None = None,
        bad: Bad | None = None,
        **how: Any,
    ) -> list[list[Described]]:
        """Of each picture (or its codes) the captions among `count` drawn ones that are not the same, those of low
        CapLoss first; none where the model ended all of them at once. seed: of the first, the others have the following
        ones. The rest as in `caption`; those of `bad` have none."""
        require(count >= 1, "count", "at least 1", count)
        recipe, sampling, codes = self._captioning(language), Sampling(**how), self._codes(pictures, bad)
        seeds = check_seeds(range(check_seed(seed), seed + count), count)
        rows = codes.repeat_interleave(count, dim=0)
        drawn = describe(recipe, self.model, rows, sampling, seeds=seeds * len(codes), longest=longest)
        there = [n for n, ids in enumerate(drawn) if ids and n // count not in (bad or ())]
        ids = [drawn[n] for n in there]  # and not of their words, of which a tokenizer may make others
        losses = caploss(recipe, self.model, rows[there], ids, batch_size=sampling.batch_size)
        found: list[dict[str, float]] = [{} for _ in codes]
        for n, loss in sorted(zip(there, losses.tolist(), strict=True), key=lambda pair: pair[1]):
            found[n // count].setdefault(self._words(drawn[n]), loss)
        return [[Described(*pair) for pair in some.items()] for some in found]

    def caploss(
        self,
        captions: Captions,
        pictures: Pictures,
        *,
        seed: int = 0,
        batch_size: int = _AT_ONCE,
        bad: Bad | None = None,
    ) -> Tensor:
        """CapLoss, float32 [N] on the CPU, of captions and pictures (or codes); one of either goes with all of the
        other. In nats a text token, by a model of recipe caption: the lower, the better they fit.

        bad: takes what is wrong with some of the pictures, as in `caption`; their scores are NaN then.
        """
        recipe, seed = self._captioning(), check_seed(seed)
        own = self._codes(pictures, bad)
        wrong = torch.zeros(len(own), dtype=torch.bool)
        wrong[list(bad or ())] = True
        ids, codes = self._pairs(captions, own)
        scores = caploss(recipe, self.model, codes, ids, batch_size=batch_size, seed=seed)
        scores[wrong.expand(len(scores))] = torch.nan
        return scores

    def rerank(
        self, caption: str, candidates: Pictures, *, seed: int = 0, batch_size: int = _AT_ONCE, bad: Bad | None = None
    ) -> Ranked:
        """Candidates (or their codes) for a caption, in the order of CapLoss. bad: as in `caploss`; those come last."""
        require(isinstance(caption, str), "caption", "a string", caption)
        codes = self._codes(candidates, bad)
        require(len(codes) > 0, "candidates", "at least one", "none")
        scores = self.caploss(caption, codes, seed=seed, batch_size=batch_size)
        scores[list(bad or ())] = torch.nan
        return Ranked(scores.argsort(stable=True), scores)

    @torch.no_grad()
    def logits(self, captions: Captions, pictures: Pictures, *, seed: int = 0) -> Tensor:
        """float32 [N, S, V] of the sequences of captions and their pictures or codes, one each: at place s those of the
        token after it. `recipe.layout(text, codes)` has the tokens of all places and the ones after them."""
        batches = self._batches(captions, pictures, seed)
        found = [self._run(batch).cpu() for batch in batches]
        logits = torch.cat(found) if found else torch.zeros(0, self.recipe.length, self.recipe.vocab.size)
        check_finite(logits)
        return logits

    @torch.no_grad()
    def likelihood(self, captions: Captions, pictures: Pictures, *, seed: int = 0) -> Likelihood:
        """How likely the model finds pictures (or codes) and their captions; one of either goes with all of the other.

        What attention samples of an image is drawn from `seed` for every row, so that none depends on its batch.
        """
        vocab, codes = self.recipe.vocab, self._codes(pictures)
        picture, caption = self._means(captions, codes, seed, vocab.is_image, vocab.is_caption)
        own = self.recipe.drawing("captions") in (None, self.recipe)
        if len(picture) and not own:  # it captions in other sequences
            caption = -self.caploss(captions, codes, seed=seed)
        return Likelihood(picture, caption)

    def choose(self, pictures: Pictures, captions: Captions | Sequence[Sequence[str]], *, seed: int = 0) -> Tensor:
        """int64 [N]: for each picture (or its codes) the number of the caption that makes it likeliest, of the same
        captions for all pictures or of a list for each."""
        check_seed(seed)
        given = listed(captions)
        same = all(isinstance(caption, str) for caption in given)
        lists = same or not any(isinstance(caption, str) for caption in given)
        require(lists, "captions", "either strings or a list of them for each picture", given)
        own = [] if same else list(map(listed, given))
        self.encode(given if same else [caption for some in own for caption in some])
        codes = self._codes(pictures)
        own = [given] * len(codes) if same else own
        require(len(own) == len(codes), "captions", f"a list for each of {len(codes)} pictures", len(own))
        counts = [len(some) for some in own]
        require(min(counts, default=1) >= 1, "captions", "at least one for each picture", own)
        rows = codes.repeat_interleave(torch.tensor(counts, dtype=torch.int64), dim=0)
        (scores,) = self._means([c for some in own for c in some], rows, seed, self.recipe.vocab.is_image)
        return torch.tensor([int(part.argmax()) for part in scores.split(counts)], dtype=torch.int64)

    def _means(self, captions: Captions, codes: Tensor, seed: int, *kinds: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Mean log-probabilities a token [N] of each kind of targets."""
        batches = self._batches(captions, codes, seed)
        found = [(self._run(b, targets=b.targets).cpu(), b.targets.cpu()) for b in batches]
        if not found:
            return [torch.zeros(0) for _ in kinds]
        nll, targets = map(torch.cat, zip(*found, strict=True))
        return [-row_means(nll, of(targets)) for of in kinds]

    def _run(self, batch: Batch, **what: Any) -> Tensor:
        with evaluating(self.model):
            return self.model(batch.inputs, batch.context, **what)

    def _pairs(self, captions: Captions, pictures: Pictures) -> tuple[list[list[int]], Tensor]:
        """Text ids and codes [N, h, w], as many of either."""
        ids, codes = self.encode(captions), self._codes(pictures)
        count = max(len(ids), len(codes))
        fits = all(len(rows) in (1, count) for rows in (ids, codes))
        require(fits, "pictures", f"as many as captions ({len(ids)}), or one", len(codes))
        return ids if len(ids) == count else ids * count, codes.expand(count, -1, -1)

    def _words(self, ids: list[int]) -> str:
        return self.text.decode([i for i in ids if i < self.text.vocab_size]).strip()  # a model may have room for more

    def _captioning(self, language: str | None = None) -> Recipe:
        recipe = self.which_draws("captions").recipe
        return recipe if language is None else recipe.speaking(language)

    def _batches(self, captions: Captions, pictures: Pictures, seed: int) -> Iterator[Batch]:
        seed = check_seed(seed)
        ids, codes = self._pairs(captions, pictures)
        text, codes = pad_text(ids), codes.flatten(1)
        for start in range(0, len(text), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            streams = [torch.Generator().manual_seed(seed) for _ in text[part]]
            yield self.recipe.batch(text[part], codes[part], draws=streams).to(self.model.device)

    @property
    def side(self) -> int:
        """Of pictures, in pixels."""
        return self.recipe.config.image_grid * self.image.config.downsample

    def _codes(self, pictures: Pictures, bad: Bad | None = None) -> Tensor:
        """Of codes themselves, or of pictures."""
        if not isinstance(pictures, Tensor) or pictures.dtype == torch.uint8:
            return self.tokenize(pictures, bad=bad)
        codes, grid = pictures[None] if pictures.ndim == 2 else pictures, self.recipe.config.image_grid
        fits = _are_whole(codes) and codes.ndim == 3 and codes.shape[1:] == (grid, grid)
        wanted = f"uint8 [N, 3, H, W], or codes of whole numbers [N, {grid}, {grid}]"
        require(fits, "pictures", wanted, codes)
        return codes.long().cpu()


def _together(pixels: int) -> int:
    """Pictures of so many pixels."""
    return max(1, min(_AT_ONCE, _PIXELS // max(1, pixels)))


def _are_whole(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
