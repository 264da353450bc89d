"""Labels for words: what a language model should know, halfway, about a thing where a text names it.

Linear heads read the states behind half of its layers. Where a thing is named they say its place in the picture, and
how many of its kind are in this picture, or in each of two; where an answer begins, what the picture just shown is of.
Behind two thirds of the layers they say there how the two things lie to each other that the question named. From the
answers alone the model learned these steps late or never: a yes or no about two positions, or the made-up name of what
an earlier picture showed, needs all of them at once. The heads are thrown away.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from drawing import SIDE, Thing
from running import Trainee
from scenes import MAX_COUNT, plural
from torch import nn
from vila.training_vila import IGNORED, VilaDataCollator
from vocabulary import COLOURS, SHAPES

BINS = 8  # per side of a picture
# number of classes of every kind of label: 0 of a place or of a first thing stands for none, or for several
KINDS = {
    "x": BINS + 1,
    "y": BINS + 1,
    "count": MAX_COUNT + 1,
    "second count": MAX_COUNT + 1,
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
}
# of the second thing from the first: to the left, level, to the right; above, level, below
WAYS = {"across": 3, "down": 3}
MIN_WAY = 6  # pixels that are not level
GROUNDING_WEIGHT = 0.3


def bin_of(along: float) -> int:
    return 1 + min(BINS - 1, max(0, int(along * BINS / SIDE)))


def labels_of_mention(matching: Sequence[Sequence[Thing]]) -> tuple[int, ...]:
    """Args: matching: of the things in the last picture, or in the last two, those that are named."""
    place = (IGNORED, IGNORED)
    if len(matching) == 1:
        (own,) = matching
        place = (bin_of(own[0].x), bin_of(own[0].y)) if len(own) == 1 else (0, 0)
    counts = [min(MAX_COUNT, len(own)) for own in matching]
    return (*place, counts[0], counts[1] if len(counts) > 1 else IGNORED, *(IGNORED,) * 4)


def labels_of_answer(shown: Sequence[Thing], named: Sequence[Thing]) -> tuple[int, ...]:
    """Args: shown: the things in the last picture; named: those that the question names and that are there once."""
    ways = (IGNORED, IGNORED)
    if len(named) == 2:
        first, second = named
        ways = (way_of(second.x - first.x), way_of(second.y - first.y))
    if len(shown) != 1:
        return ((IGNORED,) * len(KINDS)) + ways
    (thing,) = shown
    kind = SHAPES.index(thing.shape) + 1, list(COLOURS).index(thing.colour) + 1
    return (bin_of(thing.x), bin_of(thing.y), IGNORED, IGNORED, *kind, *ways)


def way_of(offset: float) -> int:
    return 1 + (offset > MIN_WAY) - (offset < -MIN_WAY)


class GroundingCollator:
    """Rows of `NanoDataset` -> a batch of `VilaDataCollator` and `grounding`, `(batch, sequence, kinds and ways)`."""

    def __init__(self, processor: Any):
        self.collator = VilaDataCollator(processor)
        self.tokenizer = processor.tokenizer
        self.image, self.tokens_per_picture = processor.image_token_id, processor.num_tile_tokens
        self.turn_start = self.tokenizer.convert_tokens_to_ids("<|im_start|>")
        (self.answerer,) = self.tokenizer("assistant", add_special_tokens=False)["input_ids"]
        (self.thing,) = self.tokenizer(" thing", add_special_tokens=False)["input_ids"]
        self.shapes = self.ids_of({shape: (shape, plural(shape)) for shape in SHAPES})
        self.colours = self.ids_of({colour: (colour,) for colour in COLOURS})

    def ids_of(self, words: dict[str, tuple[str, ...]]) -> dict[int, str]:
        """Names by the tokens of their words, with and without a blank, where these are one token."""
        found = {}
        for name, forms in words.items():
            for text in (form for word in forms for form in (word, f" {word}")):
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                if len(ids) == 1:
                    found[ids[0]] = name
        return found

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator([{"messages": row["messages"]} for row in rows])
        batch["grounding"] = torch.full((*batch["input_ids"].shape, len(KINDS | WAYS)), IGNORED)
        for number, row in enumerate(rows):
            if row["things"]:
                ids, labels = batch["input_ids"][number].tolist(), batch["labels"][number].tolist()
                found = dict(self.find(ids, labels, row["things"]))
                batch["grounding"][number, list(found)] = torch.tensor(list(found.values()))
        return batch

    def find(
        self, ids: list[int], labels: list[int], things: Sequence[Sequence[Thing]]
    ) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Positions in a row whose every picture is one tile, and their labels."""
        tokens, shown, named, is_new_turn = 0, list[Sequence[Thing]](), list[Thing](), True
        for place, own in enumerate(ids):
            before = ids[place - 1] if place else None
            if own == self.turn_start:
                is_new_turn, named = True, named if ids[place + 1 : place + 2] == [self.answerer] else []
            elif own == self.image:
                shown, is_new_turn = [] if is_new_turn else shown, False
                tokens += 1
                if tokens % self.tokens_per_picture == 0:
                    shown.append(things[tokens // self.tokens_per_picture - 1])
            elif not shown:
                continue
            elif own in self.shapes or (own == self.thing and before in self.colours):
                shape, colour = self.shapes.get(own), self.colours.get(before)
                found = [matching(picture, shape, colour) for picture in shown]
                if len(shown) == 1 and len(found[0]) == 1:
                    named = [*named, found[0][0]]
                yield place, labels_of_mention(found)
            elif labels[place] == IGNORED and labels[place + 1 : place + 2] not in ([], [IGNORED]):
                yield place, labels_of_answer(shown[-1], named)


def matching(things: Sequence[Thing], shape: str | None, colour: str | None) -> list[Thing]:
    """Things of that shape and that colour; None stands for any."""
    return [t for t in things if shape in (None, t.shape) and colour in (None, t.colour)]


class GroundedTraining(Trainee):
    """Answers, and labels for words."""

    def __init__(self, model: Any):
        super().__init__(model)
        config = model.config.text_config
        layers = config.num_hidden_layers
        self.states = (layers // 2, layers - layers // 3)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, sum(kinds.values())))
            for kinds in (KINDS, WAYS)
        )

    def forward(self, grounding: torch.Tensor, **inputs: Any) -> dict[str, Any]:
        """Args: grounding: `(batch, sequence, kinds and ways)`, numbers of classes or -100."""
        output = self.model(**inputs, output_hidden_states=True)
        losses = [output.loss.new_zeros(())]
        for head, at, kinds, wanted in zip(
            self.heads, self.states, (KINDS, WAYS), grounding.split([len(KINDS), len(WAYS)], -1)
        ):
            is_labelled = (wanted != IGNORED).any(-1)
            if is_labelled.any():
                logits = head(output.hidden_states[at][is_labelled]).float().split(list(kinds.values()), -1)
                losses += [
                    F.cross_entropy(own, labels, ignore_index=IGNORED)
                    for own, labels in zip(logits, wanted[is_labelled].unbind(-1))
                    if (labels != IGNORED).any()
                ]
        grounded = torch.stack(losses).sum()
        self.parts = {"answer": output.loss.item(), "grounding": grounded.item()}
        return {"loss": output.loss + GROUNDING_WEIGHT * grounded}
