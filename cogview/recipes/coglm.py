"""CogLM, the base of CogView2 (arXiv 2204.14217): one model that draws, captions and completes pictures.

Three objectives, for each sample one of them (pretrain_coglm.py):

    text to image (70 %)    the text is context; all cells are predicted, one after the other
    image to text (30 %)    cells but for patches are context; each patch predicts its columns 2 to 4, each from the one
                            on its left, and text, which sees all of the picture, is predicted as well
    text alone              spans of Poisson(3) pieces are predicted, others are context; the picture is left out

Published, samples without a picture are text alone. Here all have one, and `spans_share` of them lose it: none in
preset coglm-6b.

`cogview.bilingual` has the sequences. In the released code texts of both languages stand in one sample; here a row has
one caption, and a picture with two gives two rows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from cogview.bilingual import LANGUAGES, BilingualVocabulary, Layout, Rows, sampled_patches, sampled_spans
from cogview.config import ModelConfig, TrainConfig, require
from cogview.parts.attend import Attention, Leading
from cogview.recipes.coglm_sizes import PUBLISHED, SIX_BILLION, TINY, TINY_TRAINING, CogLMConfig, check_bilingual
from cogview.recipes.recipe import Draws, Prompt, Recipe, first_alike, without
from cogview.sequence import Batch, Context, Emphasis
from cogview_ops import pairs as pairs_of


class CogLM(Recipe):
    name = "coglm"
    draws: ClassVar[tuple[str, ...]] = ("pictures", "captions")
    Config = CogLMConfig
    presets: ClassVar[dict[str, tuple[ModelConfig, TrainConfig]]] = {
        "tiny": (TINY, TINY_TRAINING),
        "coglm-6b": (SIX_BILLION, PUBLISHED),
    }
    config: CogLMConfig
    vocab: BilingualVocabulary

    def __init__(self, config: CogLMConfig):
        super().__init__(config)
        c = config
        self.vocab = BilingualVocabulary(c.image_vocab, c.text_vocab, c.chinese_from)
        self.sequences = Layout(self.vocab, c.image_grid, c.max_caption, c.text_rows)

    def attention(self, index: int) -> Attention:
        return CogLMAttention(self.config, index)

    @property
    def length(self) -> int:
        return self.sequences.length

    def drawing(self, what: str) -> "Recipe | None":
        return CogLMCaption(self.config) if what == "captions" else super().drawing(what)

    def layout(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets, _ = self.laid_out(text, codes)
        return inputs, targets

    def laid_out(self, text: Tensor, codes: Tensor, draws: Draws = None) -> tuple[Tensor, Tensor, Context]:
        """From text to image."""
        return of_rows(self.sequences.picture(text, codes)[0])

    def prompt(self, text: Tensor, draws: Draws = None) -> Prompt:
        codes = text.new_zeros(len(text), self.config.image_tokens)
        return dataclasses.replace(self.completion(text, codes, None), same=first_alike(text))

    def completion(self, text: Tensor, codes: Tensor, drawn: Tensor | None) -> Prompt:
        """To draw the cells of a mask bool [B, N], None: all, of pictures of codes [B, N]. The others are context, in
        both directions; see `Layout.picture`."""
        rows, places = self.sequences.picture(text, codes, drawn)
        return Prompt(rows.inputs, seen(rows), places, self.vocab.is_image(torch.arange(self.vocab.size)))

    def emphasis(self, inputs: Tensor, value: float) -> Emphasis:
        """Text sees nothing else, so that every row is published to have it."""
        return Emphasis.of(value, self.vocab.is_caption(inputs), torch.ones_like(inputs, dtype=torch.bool))

    def training_batch(
        self, text: Tensor, *codes: Tensor, draws: Draws = None, dropped: Tensor | None = None, **weights: Any
    ) -> Batch:
        """Each row by its own stream one of the three objectives. Text is dropped where it is context, from text to
        image; where it is predicted it stays."""
        self.check_codes(codes)
        c, streams = self.config, draws if isinstance(draws, Sequence) else [draws] * len(text)
        chances = torch.cat([torch.rand(1, generator=stream) for stream in streams])
        kind = (chances < c.caption_share).int() + 2 * (chances >= 1 - c.spans_share).int()
        text = without(text, None if dropped is None else dropped & (kind == 0))
        ways: list[Callable[..., Rows]] = [self._pictures, self._captions, self._spans]
        chosen = [(kind == number).nonzero()[:, 0] for number in range(len(ways))]
        made = [
            way(text[some], codes[0][some], [streams[n] for n in some.tolist()])
            for way, some in zip(ways, chosen, strict=True)
            if len(some)
        ]
        order = torch.cat(chosen).argsort()
        rows = Rows(*(torch.cat(parts)[order] for parts in zip(*made, strict=True)))
        return self.weighed(*of_rows(rows), **weights)

    def _pictures(self, text: Tensor, codes: Tensor, streams: Sequence[Any]) -> Rows:
        return self.sequences.picture(text, codes)[0]

    def _captions(self, text: Tensor, codes: Tensor, streams: Sequence[Any]) -> Rows:
        c = self.config
        patches = [sampled_patches(c.image_grid, c.patch_side, c.patches, stream) for stream in streams]
        inside, predicted = (torch.stack(some) for some in zip(*patches, strict=True))
        return self.sequences.caption(text, codes, inside, predicted, stop=c.stop)

    def _spans(self, text: Tensor, codes: Tensor, streams: Sequence[Any]) -> Rows:
        inside, predicted = torch.zeros(2, *text.shape, dtype=torch.bool)
        for row, stream in enumerate(streams):
            length = int((text[row] >= 0).sum())
            inside[row, :length], predicted[row, :length] = sampled_spans(length, stream)
        return self.sequences.spans(text, inside, predicted)

    def hideable(self, inputs: Tensor) -> Tensor:
        """Of what is drawn behind text."""
        return self.vocab.is_image(inputs) & (inputs == self.vocab["SOI"]).any(dim=1, keepdim=True)

    def kinds(self, targets: Tensor) -> dict[str, Tensor]:
        """Rows with text among their targets are from image to text, or text alone."""
        text, image = self.vocab.is_text(targets), self.vocab.is_image(targets)
        described = text.any(dim=1, keepdim=True)
        return {"text": text, "image": image & ~described, "patches": image & described}

    def input_kinds(self, inputs: Tensor) -> dict[str, Tensor]:
        """[SOI] begins a picture; any behind it hides a cell."""
        begins = inputs == self.vocab["SOI"]
        hidden = begins & (begins.cumsum(dim=1) > 1)
        return {"text": self.vocab.is_text(inputs) & ~hidden, "image": self.vocab.is_image(inputs)}

    def reach(self, context: Context) -> Tensor:
        return context.attention["sees"]

    @classmethod
    def fit(cls, config: Any, **sizes: int) -> Any:
        check_bilingual(sizes)
        longest = sizes.pop("max_text")
        rows = max(config.text_rows, longest + 1)
        own = {"max_caption": longest, "text_rows": rows, "max_positions": rows + 1 + sizes["image_grid"] ** 2}
        return dataclasses.replace(config, **own, **sizes)


class CogLMAttention(Leading):
    def __init__(self, config: CogLMConfig, index: int):
        super().__init__(config, index)
        self.text = config.max_caption

    def pairs(self, tokens):
        """Of text to image, with the longest text."""
        return pairs_of.prefix(tokens, self.text)

    def also_saved(self, tokens):
        return self.num_heads * tokens * tokens  # on a CPU, the weights


class CogLMCaption(CogLM):
    """The same model as it captions: behind a picture and the start of a language."""

    draws = ("captions",)
    start = "SOE"
    """Of what is drawn: [SOE] English, [SOC] Chinese."""

    def speaking(self, language: str) -> "CogLMCaption":
        require(language in LANGUAGES, "language", " or ".join(LANGUAGES), language)
        told = CogLMCaption(self.config)
        told.start = LANGUAGES[language]
        return told

    @property
    def stops(self) -> bool:
        return self.config.stop

    @property
    def drawn_shape(self) -> tuple[int, ...]:
        return (self.config.max_caption,)

    def drawing(self, what: str) -> "Recipe | None":
        return self if what == "captions" else None

    def laid_out(self, text: Tensor, codes: Tensor, draws: Draws = None) -> tuple[Tensor, Tensor, Context]:
        return of_rows(self._described(text, codes))

    def _described(self, text: Tensor, codes: Tensor) -> Rows:
        nothing = torch.zeros_like(codes, dtype=torch.bool)
        return self.sequences.caption(text, codes, nothing, nothing, stop=self.config.stop)

    def prompt(self, codes: Tensor, draws: Draws = None) -> Prompt:
        """To draw a text behind each picture of codes [B, N]."""
        c, vocab = self.config, self.vocab
        fits = codes.ndim == 2 and codes.shape[1] == c.image_tokens
        require(fits, "codes", f"{c.image_tokens} of each picture", list(codes.shape))
        rows = self._described(codes.new_zeros(len(codes), c.max_caption), codes)
        inputs = rows.inputs.clone()
        inputs[:, c.image_tokens] = vocab[self.start]
        drawn = (torch.arange(inputs.shape[1]) > c.image_tokens).expand(inputs.shape)
        stop = vocab["EOS"] if c.stop else None
        return Prompt(inputs, seen(rows), drawn, vocab.drawn_text(c.stop), stop, first_alike(codes))


def seen(rows: Rows) -> Context:
    return Context(rows.positions, {"sees": rows.sees})


def of_rows(rows: Rows) -> tuple[Tensor, Tensor, Context]:
    """Inputs, targets and context."""
    return rows.inputs, rows.targets, seen(rows)
