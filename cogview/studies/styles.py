"""Styles measured (CogView paper, section 3.3): a model that knows 200 things, as emoji and in the styles of five
filters, is finetuned to pictures by another hand whose captions tell the style alone; then it draws things in that
style that the finetuning never showed it there, and some whose pictures it saw without their names.

Two networks trained on true pictures, all of them, say which style and which thing a picture shows.
"""

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.config import TrainConfig
from cogview.data import decoded
from cogview.data.shards import PairDataset
from cogview.data.tokens import TokenDataset
from cogview.demo import models
from cogview.demo.demo import IMAGE
from cogview.demo.png_shard import write_pngs
from cogview.demo.things import BACKGROUNDS, FILTERS, PLAIN, STYLES, View, held_out, named, pictures_of, render, things
from cogview.pipeline import decode, image_tokenizer, text_tokenizer, tokenize_pairs
from cogview.progress import track
from cogview.recipes.cogview import CogView
from cogview.recipes.style import Style, drawn, learned
from cogview.studies import styles_report
from cogview.studies.counts import Counts
from cogview.studies.styles_judges import Judges
from cogview.system import System
from cogview.tokenizers.train_image import TRAINING
from cogview.train.loop import Trainer
from cogview.train.token_task import TokenTask

BASE, ALL = "gpt", "all"
SHOWN = 8  # pictures of a row
POINTS = (0, 5, 10, 15, 20, 30, 60)
"""Steps of a finetuning after which it is asked."""
HOW: dict[str, Any] = {"temperature": 0.5, "text_attention": 1.0, "batch_size": 64}
"""Near the captions, which are of a kind that the model did not learn."""
_HELD_OUT, _TEXT_PIECES = 500, 700
_UNNAMED = 0.2  # of the captions of a filter's pictures those that tell the style alone


@dataclass(frozen=True)
class Sizes(Counts):
    """Of the study: pictures drawn of each pair of thing and style that is asked for, and steps."""

    drawn: int
    image_steps: int
    base_steps: int
    style_steps: int
    judge_steps: int


def run(out: Path, sizes: Sizes) -> str:
    """Does what is not done yet and writes report.md, figures.json and pictures; returns what they come to."""
    begun = time.monotonic()
    tokens = _tokens(out, sizes)
    held = tokens.pop("test")
    trained = {BASE: models.new(out / BASE, CogView, sizes.base_steps, tokens.pop("train"), held)}
    for name, data in tokens.items():
        steps = sizes.style_steps * (len(STYLES) if name == ALL else 1)  # as many pictures of each
        trained[name] = models.finetuned(out / name, Style, out / BASE, steps, data, None)
    systems = {name: System.load(out, name=name) for name in trained}
    judges = Judges.trained(out, systems[BASE], sizes.judge_steps)
    plain = [View(thing, PLAIN, "white") for thing in things()]
    figures: dict[str, Any] = {
        "plain": judges.score(draw(systems[BASE], plain, 1), plain),
        "true": judges.score(judges.true, judges.views),
    }
    rows = list[tuple[str, list[Tensor]]]()
    together = along(out, STYLES, systems[BASE], tokens[ALL], judges, sizes.drawn)
    for style in STYLES:
        alone = along(out, (style,), systems[BASE], tokens[style], judges, sizes.drawn)
        figures[style] = {"along": {"own": alone[style], "all": together[style]}}
        new = asked(style)["held out"]
        plainly = draw(systems[style], [view._replace(style=PLAIN) for view in new], sizes.drawn)
        figures[style]["not asked for"] = judges.score(plainly, repeated(new, sizes.drawn))
        for name, of in {"before": BASE, "own": style, "all": ALL}.items():
            for kind, views in asked(style).items():
                pictures = draw(systems[of], views, sizes.drawn)
                of_these = judges.score(pictures, repeated(views, sizes.drawn))
                figures[style].setdefault(kind, {})[name] = of_these
                if kind == "held out":
                    rows.append((f"{style}, {name}", list(pictures[:: sizes.drawn][:SHOWN])))
        rows.append((f"{style}, true, never seen", list(pictures_of(asked(style)["held out"][:SHOWN]))))
    facts = {
        "sizes": asdict(sizes),
        "pairs": {style: len(asked(style)["held out"]) for style in STYLES},
        "models": {name: models.fact(result) for name, result in trained.items()},
        "threads": torch.get_num_threads(),
        "minutes_this_time": (time.monotonic() - begun) / 60,
    }
    return styles_report.write(out, facts | {"figures": figures}, rows)


def draw(system: System, views: Sequence[View], each: int) -> Tensor:
    """Of each view `each` pictures, one view after the other."""
    captions = [named(v.thing) if v.style == PLAIN else drawn(named(v.thing), v.style) for v in repeated(views, each)]
    return system.draw(captions, **HOW)


def repeated(views: Sequence[View], each: int) -> list[View]:
    """As `draw` draws them."""
    return [view for view in views for _ in range(each)]


def along(
    out: Path, styles: Sequence[str], base: System, data: TokenDataset, judges: Judges, each: int
) -> dict[str, list[dict[str, float]]]:
    """How a finetuning to styles draws things held out in each, as it goes on."""
    found: dict[str, list[dict[str, float]]] = {style: [] for style in styles}
    training = replace(Style.presets["tiny"][1], steps=POINTS[-1])
    recipe = Style(Style.begun(base.recipe.config))
    torch.manual_seed(training.seed)
    model = recipe.model()
    model.load_state_dict(base.model.state_dict())
    with tempfile.TemporaryDirectory(dir=out) as folder:
        trainer = Trainer(TokenTask(recipe, model, data, training, None), training, Path(folder))
        for point in track(POINTS, f"drawing {' and '.join(styles)} as learned"):
            while trainer.state.step < point:
                trainer.step()
            system = replace(base, recipe=recipe, model=model)
            for style in styles:
                views = asked(style)["held out"]
                shares = judges.score(draw(system, views, each), repeated(views, each))
                found[style].append({"steps": point} | shares)
    return found


def asked(style: str) -> dict[str, list[View]]:
    """In a style: things whose picture in it was held out, and as many whose picture the finetuning saw, nameless."""
    held = [thing for thing in things() if held_out(thing, style)]
    seen = random.Random(style).sample([thing for thing in things() if not held_out(thing, style)], len(held))
    some = {"held out": held, "seen": seen}
    return {kind: [View(thing, style, "white") for thing in each] for kind, each in some.items()}


def _tokens(out: Path, sizes: Sizes) -> dict[str, TokenDataset]:
    """Of "train" and "test", what the model learns first, of each style, and of all of them."""
    rows = {**_known(), **{style: _views(style) for style in STYLES}}
    rows[ALL] = [row for style in STYLES for row in rows[style]]
    paths = {
        name: write_pngs(out / "things" / f"{name}.tar", ((render(view), {"en": text}) for view, text in some))
        for name, some in rows.items()
    }
    pairs = {name: PairDataset([path], languages=("en",)) for name, path in paths.items()}
    every = PairDataset([paths[name] for name in ("train", ALL)], languages=("en",))
    text, pictures = text_tokenizer(every, out, _TEXT_PIECES), decode(every, out, 64)  # styles' names are pieces
    image, _ = image_tokenizer(every, pictures, out, IMAGE, TrainConfig(steps=sizes.image_steps, **TRAINING))
    found = {name: tokenize_pairs(some, text, image, out / "tokens" / name) for name, some in pairs.items()}
    decoded.remove(out / "pixels")
    return found


def _known() -> dict[str, list[tuple[View, str]]]:
    """Views and captions: plain things, and each in the filters' styles, some of which tell the style alone. No view is
    in both splits; those of plain things come three times in training."""
    draws, rows = random.Random("things"), list[tuple[View, str]]()
    for thing in things():
        for background in BACKGROUNDS:
            rows.append((View(thing, PLAIN, background), named(thing)))
            for style in FILTERS:
                text = learned(style) if draws.random() < _UNNAMED else drawn(named(thing), style)
                rows.append((View(thing, style, background), text))
    draws.shuffle(rows)
    test, train = rows[:_HELD_OUT], rows[_HELD_OUT:]
    train += [row for row in train if row[0].style == PLAIN] * 2
    draws.shuffle(train)
    return {"train": train, "test": test}


def _views(style: str) -> list[tuple[View, str]]:
    rows = [
        (View(thing, style, background), learned(style))
        for thing in things()
        for background in BACKGROUNDS
        if not held_out(thing, style)
    ]
    random.Random(style).shuffle(rows)
    return rows
