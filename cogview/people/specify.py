"""Captions with words for what they leave open about people."""

import random
from functools import cache

from cogview.people import chinese, english
from cogview.people.words import People


def specify(caption: str, seed: int, people: People | None = None) -> str:
    """The caption with words put in, which depend on it and on the seed. people: default the package's list."""
    people, draws = default() if people is None else people, random.Random(f"{seed}\0{caption}")

    def draw(attributes: list[str]) -> list[str]:
        chosen = (people.attributes[name] for name in attributes)
        return [draws.choices(list(words), list(words.values()))[0] for words in chosen]

    language = chinese if chinese.is_chinese(caption) else english
    return language.put_in(caption, people, draw)


@cache
def default() -> People:
    return People.load()
