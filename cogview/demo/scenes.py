"""The demo's world: pictures of one or two emoji on a coloured background, with English and Chinese captions.

64 x 64 pixels; every emoji is a 32-pixel tile at a multiple of 16, so that it always falls alike on the
8 x 8 cells of the image tokens. A scene says everything about its picture. At scale 2 all of that is twice
as large, which has all the detail that the emoji have.

Split by content: of pictures with one emoji an eighth of the combinations (emoji, place, background) are
"test"; of those with two, an eighth of the unordered pairs of emoji, whatever the relation and background.
So no test picture and no test caption, in either language, occurs in training, while every word does.
"""

import hashlib
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path

from PIL import Image

from cogview.data.shuffle import permutation
from cogview.demo.png_shard import Rows, write_splits
from cogview.emoji import at_size, load_emoji

VERSION = 1
SIZE = 64  # pixels of a side
TILE = 32  # pixels of an emoji's side
SCALES = (1, 2, 3)
SCENES_PER_SHARD = 4096
_SALT = "2908"  # with it every emoji is in some test scene of either kind, and none in many

# English noun: codepoints, English article, Chinese measure word, Chinese noun
NOUNS = {
    "panda": ("1f43c", "a", "只", "熊猫"),
    "star": ("2b50", "a", "颗", "星星"),
    "apple": ("1f34e", "an", "个", "苹果"),
    "frog": ("1f438", "a", "只", "青蛙"),
    "fox": ("1f98a", "a", "只", "狐狸"),
    "football": ("26bd", "a", "个", "足球"),
    "tree": ("1f333", "a", "棵", "树"),
    "mushroom": ("1f344", "a", "个", "蘑菇"),
    "fish": ("1f41f", "a", "条", "鱼"),
    "rocket": ("1f680", "a", "枚", "火箭"),
    "house": ("1f3e0", "a", "座", "房子"),
    "penguin": ("1f427", "a", "只", "企鹅"),
}
# English colour: RGB, English article, Chinese
BACKGROUNDS = {
    "blue": ((100, 160, 245), "a", "蓝色"),
    "green": ((130, 205, 130), "a", "绿色"),
    "pink": ((255, 175, 195), "a", "粉色"),
    "purple": ((165, 130, 225), "a", "紫色"),
    "orange": ((255, 180, 100), "an", "橙色"),
    "grey": ((120, 125, 132), "a", "灰色"),
}
# of one emoji: its corner (x, y) in pixels, English, Chinese
PLACES = {
    "centre": ((16, 16), "in the middle of", "中间"),
    "left": ((0, 16), "on the left of", "左边"),
    "right": ((32, 16), "on the right of", "右边"),
    "top": ((16, 0), "at the top of", "上方"),
    "bottom": ((16, 32), "at the bottom of", "下方"),
}
# of two emoji: where the first and the second stand, English, Chinese
RELATIONS = {
    "left of": ("left", "right", "to the left of", "左边"),
    "right of": ("right", "left", "to the right of", "右边"),
    "above": ("top", "bottom", "above", "上方"),
    "below": ("bottom", "top", "below", "下方"),
}


@dataclass(frozen=True)
class Scene:
    """`first` alone at `place` (of PLACES), or `first` in the relation `place` (of RELATIONS) to `second`."""

    first: str
    place: str
    background: str
    second: str | None = None

    def __post_init__(self):
        known: dict[str, list] = {
            "first": list(NOUNS),
            "place": list(PLACES if self.second is None else RELATIONS),
            "background": list(BACKGROUNDS),
            "second": [None, *NOUNS],
        }
        for name, values in known.items():
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, values))}, got {value!r}")
        if self.first == self.second:
            raise ValueError(f"second: expected another emoji than the first, got {self.second!r} twice")

    @property
    def placed(self) -> tuple[tuple[str, str], ...]:
        """(emoji, place) of each emoji, in the order of the caption."""
        if self.second is None:
            return ((self.first, self.place),)
        first, second, _, _ = RELATIONS[self.place]
        return (self.first, first), (self.second, second)


@cache
def tiles(scale: int = 1) -> dict[str, Image.Image]:
    """The emoji of every English noun, RGBA, TILE x TILE times the scale."""
    emoji = load_emoji([noun[0] for noun in NOUNS.values()])
    return {name: at_size(emoji[n[0]].image, TILE * scale) for name, n in NOUNS.items()}


def render(scene: Scene, scale: int = 1) -> Image.Image:
    """The picture of a scene, RGB, SIZE x SIZE times the scale."""
    picture = Image.new("RGB", (SIZE * scale, SIZE * scale), BACKGROUNDS[scene.background][0])
    for name, place in scene.placed:
        (x, y), tile = PLACES[place][0], tiles(scale)[name]
        picture.paste(tile, (x * scale, y * scale), tile)
    return picture


def caption(scene: Scene, language: str) -> str:
    """The caption of a scene. language: "en" or "zh"."""
    _, article, measure, noun = NOUNS[scene.first]
    _, colour_article, colour = BACKGROUNDS[scene.background]
    if language == "en":
        on = f"{colour_article} {scene.background} background"
        if scene.second is None:
            return f"{article} {scene.first} {PLACES[scene.place][1]} {on}"
        relation, second = RELATIONS[scene.place][2], f"{NOUNS[scene.second][1]} {scene.second}"
        return f"{article} {scene.first} {relation} {second} on {on}"
    if language == "zh":
        if scene.second is None:
            return f"{colour}背景{PLACES[scene.place][2]}有一{measure}{noun}"
        return f"{colour}背景上，{noun}在{NOUNS[scene.second][3]}{RELATIONS[scene.place][3]}"
    raise ValueError(f'language: expected "en" or "zh", got {language!r}')


def split_of(scene: Scene) -> str:
    """ "train" or "test", by content alone."""
    if scene.second is None:
        content = [scene.first, scene.place, scene.background]
    else:
        content = sorted([scene.first, scene.second])
    return "test" if hashlib.sha256("\0".join([_SALT, *content]).encode()).digest()[0] < 32 else "train"


@cache
def _scenes(split: str) -> tuple[list[Scene], list[Scene]]:
    """All scenes of a split with one emoji, and all with two."""
    if split not in ("train", "test"):
        raise ValueError(f'split: expected "train" or "test", got {split!r}')
    alone = (Scene(*parts) for parts in product(NOUNS, PLACES, BACKGROUNDS))
    pairs = (
        Scene(first, relation, background, second)
        for a, b in combinations(NOUNS, 2)
        for first, second in ((a, b), (b, a))
        for relation, background in product(RELATIONS, BACKGROUNDS)
    )
    return [s for s in alone if split_of(s) == split], [s for s in pairs if split_of(s) == split]


def sample_scenes(split: str, n: int, seed: int = 0) -> list[Scene]:
    """`n` scenes of a split, one emoji and two emoji in turn.

    No scene comes twice before all of its kind came once. The first n of a longer sample are the same.
    """
    sample = []
    for i in range(n):
        kind, scenes = i % 2, _scenes(split)[i % 2]
        round_, place = divmod(i // 2, len(scenes))
        sample.append(scenes[_order(len(scenes), seed, kind, round_)[place]])
    return sample


_order = cache(permutation)


def build_scene_shards(
    folder: str | Path, n_train: int, n_test: int, seed: int = 0, progress=iter, scale: int = 1
) -> dict:
    """Writes `{train,test}-00000.tar`, … into `folder`: PNG, and JSON with both captions and the scene.

    Key i of a split is `sample_scenes(split, n, seed)[i]`. Shards already there are kept: the same call goes
    on where a killed one stopped; other settings in the same folder are a ValueError. progress wraps the
    list of shards to write, as rich's and tqdm's `track` do. Returns {"train": [paths], "test": [paths]}.
    """
    folder = Path(folder)
    for name, n in (("n_train", n_train), ("n_test", n_test)):
        if n < 1:
            raise ValueError(f"{name}: expected at least 1, got {n}")
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(map(str, SCALES))}, got {scale}")
    settings = {"version": VERSION, "n_train": n_train, "n_test": n_test, "seed": seed}
    settings |= {"scale": scale} if scale != 1 else {}
    others = f"folder: {str(folder)!r} holds scenes built with other settings; name another or remove it"

    def rows(split: str, start: int, end: int) -> Rows:
        for scene in sample_scenes(split, end, seed)[start:]:
            captions = {language: caption(scene, language) for language in ("en", "zh")}
            yield render(scene, scale), captions | {"scene": asdict(scene)}

    counts = {"train": n_train, "test": n_test}
    return write_splits(folder / "scenes.json", settings, others, counts, SCENES_PER_SHARD, rows, progress)
