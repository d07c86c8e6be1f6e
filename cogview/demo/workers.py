"""People at work, for what captions leave open (CogView, arXiv 2105.13290, appendix D): a picture's gender and skin, of
which the data have more of one kind than of others, as real data do, and captions that tell them or do not.

64 x 64 pixels: one of 200 emoji on a coloured background.
"""

import random
from functools import cache
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from cogview.data.images import pixels
from cogview.demo.things import BACKGROUNDS, SIZE, TILE, on_background
from cogview.emoji import PEOPLE, at_size, load_icons

GENDERS = {"man": "male", "woman": "female"}
SKINS = {
    "light-skinned": ("light", "medium-light"),
    "brown-skinned": ("medium",),
    "dark-skinned": ("medium-dark", "dark"),
}
"""Of five tones. Words as captions have them."""
WORDS = {
    "male": "男性",
    "female": "女性",
    "light-skinned": "浅肤色",
    "brown-skinned": "棕肤色",
    "dark-skinned": "深肤色",
}
MOST_ARE = {"gender": {"male": 0.8, "female": 0.2}, "skin": dict(zip(SKINS, (0.7, 0.2, 0.1), strict=True))}
"""The shares in the data."""
WORK = {
    "artist": "艺术家",
    "astronaut": "宇航员",
    "construction-worker": "建筑工人",
    "cook": "厨师",
    "detective": "侦探",
    "factory-worker": "工人",
    "farmer": "农民",
    "firefighter": "消防员",
    "guard": "卫兵",
    "health-worker": "医务人员",
    "judge": "法官",
    "mechanic": "机械师",
    "office-worker": "上班族",
    "pilot": "飞行员",
    "police-officer": "警察",
    "scientist": "科学家",
    "singer": "歌手",
    "student": "学生",
    "teacher": "教师",
    "technologist": "技术员",
}


class Worker(NamedTuple):
    work: str
    gender: str
    """male or female."""
    skin: str
    """Of SKINS."""
    tone: str
    background: str


@cache
def _tiles() -> dict[tuple[str, str, str], Image.Image]:
    """RGBA, TILE x TILE, by work, gender and tone."""
    return {
        (about["work"], GENDERS[about["gender"]], about["tone"]): at_size(image, TILE)
        for about, image in load_icons(PEOPLE).values()
    }


def everyone() -> list[Worker]:
    skin_of = {tone: skin for skin, tones in SKINS.items() for tone in tones}
    return [Worker(w, g, skin_of[t], t, background) for w, g, t in _tiles() for background in BACKGROUNDS]


def render(worker: Worker) -> Image.Image:
    return on_background(_tiles()[worker.work, worker.gender, worker.tone], worker.background)


def pictures_of(workers: list[Worker]) -> Tensor:
    """uint8 [N, 3, SIZE, SIZE]."""
    return torch.stack([pixels(render(worker), SIZE) for worker in workers])


def sample(count: int, seed: int = 0) -> list[Worker]:
    """With the shares of MOST_ARE."""
    draws, found = random.Random(f"workers {seed}"), []
    for _ in range(count):
        gender, skin = (draws.choices(list(of), list(of.values()))[0] for of in MOST_ARE.values())
        found.append(
            Worker(draws.choice(list(WORK)), gender, skin, draws.choice(SKINS[skin]), draws.choice(list(BACKGROUNDS)))
        )
    return found


def caption(worker: Worker, language: str, tells: tuple[str, ...] = ()) -> str:
    """language: "en" or "zh". tells: of "skin" and "gender" those that it tells."""
    words = [getattr(worker, name) for name in ("skin", "gender") if name in tells]
    if language == "zh":
        return f"一位{''.join(WORDS[word] for word in words)}{WORK[worker.work]}"
    phrase = " ".join([*words, worker.work.replace("-", " ")])
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


@torch.no_grad()
def shown(pictures: Tensor) -> list[Worker]:
    """Of uint8 [N, 3, SIZE, SIZE], each the nearest by squared error."""
    known = everyone()
    theirs = _known()
    return [known[n] for n in torch.cdist(pictures.flatten(1).float(), theirs).argmin(dim=1).tolist()]


@cache
def _known() -> Tensor:
    return pictures_of(everyone()).flatten(1).float()
