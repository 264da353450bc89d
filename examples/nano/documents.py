"""Interleaved documents: several pictures, each with what is said about it, in one conversation."""

import random

import reading
import scenes
from episodes import Episode
from vocabulary import Split

PARTS = (scenes.caption, scenes.naming, scenes.yes_no, scenes.count, reading.read, reading.transcribe, reading.chart)


def interleaved(rng: random.Random, split: Split) -> Episode:
    """Two pictures of any kind, one after the other."""
    parts = [rng.choice(PARTS)(rng, split) for _ in range(2)]
    turns = tuple(turn for part in parts for turn in part.turns)
    media = tuple(blocks for part in parts for blocks in part.media)
    # of all pictures or of none, so that the n-th is the n-th
    things = tuple(own for part in parts for own in part.things) if all(part.things for part in parts) else ()
    return Episode("interleaved", turns, media, things)


def pair(rng: random.Random, split: Split) -> Episode:
    """One of these pictures alone."""
    part = rng.choice(PARTS)(rng, split)
    return Episode("pair", part.turns, part.media, part.things)
