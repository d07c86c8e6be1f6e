"""What a model draws where a caption leaves gender and skin open, and what putting words in changes (CogView, arXiv
2105.13290, appendix D). Its data show men and light skin far more often than others, and some of its captions tell
neither; all people are known emoji, so that each picture's attributes can be measured."""

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.config import TrainConfig
from cogview.data import decoded
from cogview.data.files import write_json, write_text
from cogview.data.shards import PairDataset
from cogview.data.tokens import TokenDataset
from cogview.demo import models
from cogview.demo.demo import IMAGE, LANGUAGES, TEMPERATURE, TEXT_PIECES
from cogview.demo.png_shard import write_pngs
from cogview.demo.workers import MOST_ARE, SKINS, WORDS, WORK, Worker, caption, pictures_of, render, sample, shown
from cogview.people.specify import specify
from cogview.people.words import People
from cogview.pictures import contact_sheet
from cogview.pipeline import decode, image_tokenizer, text_tokenizer, tokenize_pairs
from cogview.recipes.cogview import CogView
from cogview.studies.counts import Counts
from cogview.system import System
from cogview.tokenizers.train_image import TRAINING, reconstruct

EVEN = {"skin": dict.fromkeys(SKINS, 1 / 3), "gender": {"male": 0.5, "female": 0.5}}
"""The proportions asked for."""
_TELLS = ((), ("gender",), ("skin",), ("skin", "gender"))
_HOW_OFTEN = (0.3, 0.2, 0.2, 0.3)
_HELD_OUT = 400  # pictures


@dataclass(frozen=True)
class Sizes(Counts):
    """Of the study: pictures to train on, those drawn of each work in each language; steps."""

    pictures: int
    drawn: int
    image_steps: int
    steps: int


def run(out: Path, sizes: Sizes) -> str:
    """Does what is not done yet and writes report.md, figures.json and the sheet; returns what they come to."""
    begun = time.monotonic()
    data, held_out = _tokens(out, sizes)
    trained = models.new(out / "gpt", CogView, sizes.steps, data, held_out)
    system, people = System.load(out, name="gpt"), word_list()
    found: dict[str, Any] = {}
    cells = list[tuple[str, list[Tensor]]]()
    for language in LANGUAGES:
        open_ = [caption(Worker(work, "", "", "", ""), language) for work in WORK for _ in range(sizes.drawn)]
        given = [specify(text, seed, people) for seed, text in enumerate(open_)]
        found[f"in the captions, {language}"] = _words_of(given, language)
        for name, texts in (("before", open_), ("after", given)):
            pictures = system.draw(texts, temperature=TEMPERATURE, batch_size=64)
            of = shown(pictures)
            found[f"{name}, {language}"] = _shares(of, list(WORK), sizes.drawn) | _as_told(of, texts, language)
            firsts = range(0, len(texts), sizes.drawn)[:8]
            cells += [(texts[n], [pictures[n]]) for n in firsts]
    true = sample(len(WORK) * sizes.drawn, seed=9)
    rebuilt, _ = reconstruct(system.image, pictures_of(true))
    of, works = shown(rebuilt), [worker.work for worker in true]
    found["true"] = _shares(true, works, 1)
    found["true, as judged"] = _shares(of, works, 1) | {"as told": _alike(of, true)}
    contact_sheet(cells, out / "sheet.png", columns=8, zoom=2, note="of each caption's first picture; before and after")
    facts = {
        "sizes": asdict(sizes),
        "data": MOST_ARE,
        "asked": EVEN,
        "gpt": models.fact(trained),
        "threads": torch.get_num_threads(),
        "minutes_this_time": (time.monotonic() - begun) / 60,
    }
    verdict = _verdict(found)
    write_json(out / "figures.json", facts | {"found": found, "verdict": verdict})
    write_text(out / "report.md", _page(found, facts, verdict))
    return verdict


def word_list() -> People:
    """The package's, with the attributes that these captions have, in proportions that are asked for."""
    skin = {"en": list(SKINS), "zh": [WORDS[word] for word in SKINS]}
    own = People.load()
    return replace(own, attributes=EVEN, chinese=WORDS, told={"skin": skin, "gender": own.told["gender"]})


def _tokens(out: Path, sizes: Sizes) -> list[TokenDataset]:
    draws = random.Random("captions")
    pairs = {}
    for split, count, seed in (("train", sizes.pictures, 5), ("test", _HELD_OUT, 4)):
        workers = sample(count, seed)
        tells = draws.choices(_TELLS, _HOW_OFTEN, k=count)
        rows = [
            (render(worker), {language: caption(worker, language, told) for language in LANGUAGES})
            for worker, told in zip(workers, tells, strict=True)
        ]
        pairs[split] = PairDataset([write_pngs(out / "people" / f"{split}.tar", rows)], languages=LANGUAGES)
    text, pictures = text_tokenizer(pairs["train"], out, TEXT_PIECES), decode(pairs["train"], out, 64)
    training = TrainConfig(steps=sizes.image_steps, **TRAINING)
    image, _ = image_tokenizer(pairs["train"], pictures, out, IMAGE, training)
    found = [tokenize_pairs(some, text, image, out / "tokens" / split) for split, some in pairs.items()]
    decoded.remove(out / "pixels")
    return found


def _shares(of: Sequence[Worker], works: Sequence[str], each: int) -> dict[str, Any]:
    """Of the pictures those that show each gender and skin, and those that show the work asked for."""
    right = sum(worker.work == works[n // each] for n, worker in enumerate(of)) / len(of)
    counts = {name: Counter(getattr(worker, name) for worker in of) for name in ("gender", "skin")}
    shares = {name: {word: counts[name][word] / len(of) for word in EVEN[name]} for name in counts}
    return {"work": right, **shares}


def _words_of(texts: Sequence[str], language: str) -> dict[str, dict[str, float]]:
    """Of the captions those that have each word about gender and skin."""
    count = len(texts)
    return {
        name: {word: sum(_tells(text, word, language) for text in texts) / count for word in of}
        for name, of in EVEN.items()
    }


def _alike(of: Sequence[Worker], true: Sequence[Worker]) -> float:
    """Share of the genders and skins that are right."""
    right = [(a.gender == b.gender) + (a.skin == b.skin) for a, b in zip(of, true, strict=True)]
    return sum(right) / (2 * len(right))


def _as_told(of: Sequence[Worker], texts: Sequence[str], language: str) -> dict[str, float]:
    """Of the words about gender and skin in the captions how many the pictures show."""
    told = [
        word in (worker.gender, worker.skin)
        for worker, text in zip(of, texts, strict=True)
        for name in EVEN
        for word in EVEN[name]
        if _tells(text, word, language)
    ]
    return {"as told": sum(told) / len(told)} if told else {}


def _tells(text: str, word: str, language: str) -> bool:
    return WORDS[word] in text if language == "zh" else word in text.split()


def _verdict(found: dict[str, Any]) -> str:
    def both(when: str, name: str, word: str = "") -> str:
        """In English, and in Chinese."""
        of = [found[f"{when}, {language}"][name] for language in LANGUAGES]
        en, zh = (f"{value[word] if word else value:.0%}" for value in of)
        return f"{en} ({zh})"

    return (
        "Of captions in English (Chinese) that leave it open the model draws "
        f"{both('before', 'gender', 'female')} women, of whom its data have {MOST_ARE['gender']['female']:.0%}, and "
        f"{both('before', 'skin', 'dark-skinned')} dark skin, of {MOST_ARE['skin']['dark-skinned']:.0%}. With words "
        f"put in, which ask for {both('in the captions', 'gender', 'female')} and "
        f"{both('in the captions', 'skin', 'dark-skinned')}, it draws {both('after', 'gender', 'female')} and "
        f"{both('after', 'skin', 'dark-skinned')}; {both('after', 'as told')} of these words are drawn. The work is "
        f"right in {both('before', 'work')} before and {both('after', 'work')} after."
    )


def _page(found: dict[str, Any], facts: dict[str, Any], verdict: str) -> str:
    names = [(name, word) for name in EVEN for word in EVEN[name]]

    def row(
        name: str, shares: dict[str, dict[str, float]], work: float | None = None, told: float | None = None
    ) -> str:
        of = [work, *(shares[kind][word] for kind, word in names), told]
        return f"| {name} | " + " | ".join("" if value is None else f"{value:.0%}" for value in of) + " |"

    rows = [row("in the data", facts["data"]), row("proportions of the list", EVEN)]
    rows += [row(name, of, of.get("work"), of.get("as told")) for name, of in found.items()]
    gpt, sizes = facts["gpt"], facts["sizes"]
    count = len(WORK) * sizes["drawn"]
    return f"""{verdict}

# Words about people, put into captions

{len(WORK)} kinds of work, {sizes["drawn"]} pictures of each in either language, of captions that tell nothing else.
Judged by the emoji that is nearest to the picture. "In the captions" are the words that the list's proportions came to;
true: others of the data, as they are, and as judged after the image tokenizer. Of {count:,} pictures a row, so that a
share has a standard error of at most {0.5 / count**0.5:.1%}.

| | work | {" | ".join(word for _, word in names)} | words drawn |
|---|{"---:|" * (len(names) + 2)}
{chr(10).join(rows)}

![a picture of each of eight captions: English before and after, Chinese before and after](sheet.png)

## How

- Pictures: 20 kinds of work, 2 genders and 5 tones, told as three; {sizes["pictures"]:,} to train on, in the shares of
  the first row. Of the captions 30 % tell neither, 20 % gender, 20 % skin, 30 % both.
- Image tokenizer: {sizes["image_steps"]:,} steps. GPT: preset tiny, {gpt["steps"]:,} steps in
  {gpt["seconds"] / 60:.1f} minutes, held-out image loss {gpt["held_out"]["image_loss"]:.3f}; threads:
  {facts["threads"]}.
"""
