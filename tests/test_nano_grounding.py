"""examples/nano: what is practised for training alone, and labels for words."""

import random
from dataclasses import replace

import grounding
import phrasings
import practice
import pytest
import scenes
import shots
import torch
from drawing import Thing, draw_things
from episodes import Episode, Turn, image_block
from grounding import IGNORED, KINDS, WAYS, GroundedTraining, GroundingCollator
from transformers import AutoModel, AutoProcessor
from vocabulary import COLOURS, HELD_OUT_PAIRS, SHAPES

RED, BLUE, STAR = (
    Thing("red", "circle", 20, 90, 12),
    Thing("blue", "square", 80, 30, 12),
    Thing("red", "star", 60, 80, 9),
)
COLOUR = {name: number for number, name in enumerate(COLOURS, 1)}


@pytest.fixture(scope="module")
def processor(small_nano):
    return AutoProcessor.from_pretrained(small_nano)


@pytest.fixture
def model(small_nano):
    return AutoModel.from_pretrained(small_nano, dtype="float32")


def draw(things):
    return image_block(draw_things(random.Random(0), things))


def rows_of(*episodes):
    return [{"messages": episode.messages, "things": episode.things} for episode in episodes]


def labelled(processor, episode):
    """`(word, {kind: label})` of every labelled token, in order."""
    batch = GroundingCollator(processor)(rows_of(episode))
    words = [processor.tokenizer.decode(token).strip() for token in batch["input_ids"][0]]
    found = []
    for word, labels in zip(words, batch["grounding"][0].tolist()):
        if any(label != IGNORED for label in labels):
            found.append((word, {kind: label for kind, label in zip(KINDS | WAYS, labels) if label != IGNORED}))
    return found


# --------------------------------------------------------------------------------------------------------- practice


def test_trained_phrasings_are_never_those_of_the_test():
    assert phrasings.MORE.keys() == phrasings.TRAINED.keys()
    for kind, trained in phrasings.TRAINED.items():
        everything = (*trained, *phrasings.MORE[kind])
        assert len(set(everything)) == len(everything)
        assert not set(everything) & set(phrasings.HELD_OUT.get(kind, ()))


def test_training_alone_uses_more_phrasings():
    def asked(split):
        rng = random.Random(0)
        return {phrasings.ask(rng, split, "read") for _ in range(400)}

    trained, more, held_out = (source["read"] for source in (phrasings.TRAINED, phrasings.MORE, phrasings.HELD_OUT))
    assert asked("train") == {*trained, *more}
    assert asked("validation") == {*trained}
    assert asked("test") == {*trained, *held_out}


def test_answers_about_places_are_right():
    rng = random.Random(0)
    for _ in range(300):
        scene = scenes.draw_scene(rng, "train", rng.randint(1, 4))
        by_name = {thing.name: thing for thing in scene}
        turn = practice.side_turn(rng, "train", scene)
        if turn is not None:
            side = turn.question.split("more to the ")[1].split(",")[0]
            asked = [thing for name, thing in by_name.items() if f"the {name}" in turn.question]
            along = {"left": lambda t: t.x, "right": lambda t: -t.x, "top": lambda t: t.y, "bottom": lambda t: -t.y}
            assert turn.answer == min(asked, key=along[side]).name
        ordered = practice.ordered_turn(rng, "train", scene)
        named = [by_name[name] for name in ordered.answer.split(", ")]
        assert sorted(map(id, named)) == sorted(map(id, scene))
        towards = ordered.question.removeprefix("Name all from ").rstrip(".")
        values = [getattr(thing, "x" if "left" in towards else "y") for thing in named]
        assert values == sorted(values, reverse=towards.startswith(("right", "bottom")))
        place = practice.place_turn(rng, "train", scene)
        (thing,) = [thing for name, thing in by_name.items() if name in place.question]
        assert place.answer == scenes.place_words(thing)
        shapes = practice.shape_first_turn(rng, "train", scene).answer.split(", ")
        assert shapes == [f"{t.shape} {t.colour}" for t in sorted(scene, key=lambda t: t.x)]


def test_answers_about_two_pictures_are_right():
    rng, kinds = random.Random(0), set()
    for _ in range(60):
        episode = practice.contrast(rng, "train")
        for turn in episode.turns:
            for shape in SHAPES:
                counts = [sum(t.shape == shape for t in things) for things in episode.things]
                if scenes.plural(shape) in turn.question and turn.answer.isdecimal():
                    assert turn.answer == str(counts["second" in turn.question])
                    kinds.add("count")
                elif scenes.plural(shape) in turn.question:
                    assert counts[turn.answer == "second"] > counts[turn.answer == "first"]
                    kinds.add("more")
            for pair in ((c, s) for c in COLOURS for s in SHAPES):
                name = " ".join(pair)
                if f"a {name}" in turn.question:
                    has = [any((t.colour, t.shape) == pair for t in things) for things in episode.things]
                    assert has == [turn.answer == "first", turn.answer == "second"]
                    kinds.add("which")
    assert kinds == {"count", "more", "which"}


@pytest.mark.parametrize("task", [practice.look, practice.tally, practice.contrast, shots.fewshot, scenes.compare])
def test_pictures_and_things_go_together_and_unseen_pairs_stay_unseen(task):
    rng = random.Random(1)
    for _ in range(20):
        episode = task(rng, "train")
        assert len(episode.things) == sum(len(blocks) for blocks in episode.media)
        assert not {(t.colour, t.shape) for things in episode.things for t in things} & HELD_OUT_PAIRS
        texts = " ".join(turn.question + turn.answer for turn in episode.turns)
        assert not any(" ".join(pair) in texts for pair in HELD_OUT_PAIRS)


def test_tallies_are_those_of_the_picture():
    rng = random.Random(0)
    for _ in range(30):
        episode = practice.tally(rng, "train")
        for turn in episode.turns:
            (shape,) = [shape for shape in SHAPES if scenes.plural(shape) in turn.question]
            assert int(turn.answer) == sum(thing.shape == shape for thing in episode.things[0])


# --------------------------------------------------------------------------------------------------------- labels


def test_words_are_labelled_with_where_and_how_many(processor):
    turns = (
        Turn("Is the red circle left of the green star?", "no"),
        Turn("What shape is the blue thing?", "square"),
        Turn("How many circles are there?", "1"),
        Turn("Is there a red thing?", "yes"),
    )
    found = labelled(processor, Episode("look", turns, ((draw([RED, BLUE, STAR]),),), ((RED, BLUE, STAR),)))
    at = {"circle": {"x": 2, "y": 7, "count": 1}, "square": {"x": 6, "y": 3, "count": 1}}
    assert found == [
        ("circle", at["circle"]),
        ("star", {"x": 0, "y": 0, "count": 0}),
        ("thing", at["square"]),
        ("square", at["square"]),
        ("circles", at["circle"]),
        ("thing", {"x": 0, "y": 0, "count": 2}),
    ]


def test_words_about_two_pictures_are_labelled_with_both_counts(processor):
    turns = (Turn("Which picture has more circles?", "first"), Turn("Which picture has a blue square?", "second"))
    pictures = ((RED, replace(RED, x=70)), (BLUE, STAR))
    episode = Episode("compare", turns, (tuple(map(draw, pictures)),), pictures)
    assert labelled(processor, episode) == [
        ("circles", {"count": 2, "second count": 0}),
        ("square", {"count": 0, "second count": 1}),
    ]


def test_where_an_answer_begins_the_last_picture_is_named(processor):
    turns = (Turn("The names are BAX, DOF. What is this?", "BAX"), Turn("And this?", "DOF"))
    episode = Episode("fewshot", turns, ((draw([RED]),), (draw([BLUE]),)), ((RED,), (BLUE,)))
    found = [labels for _, labels in labelled(processor, episode)]
    assert found == [
        {"x": 2, "y": 7, "shape": SHAPES.index("circle") + 1, "colour": COLOUR["red"]},
        {"x": 6, "y": 3, "shape": SHAPES.index("square") + 1, "colour": COLOUR["blue"]},
    ]


def test_where_an_answer_begins_the_way_between_the_named_things_is_told(processor):
    things = (RED, BLUE, replace(STAR, colour="green", shape="star"))
    turns = (
        Turn("Is the red circle left of the blue square?", "yes"),
        Turn("Is the blue square below the red circle?", "no"),
        Turn("Is the red circle above the cyan ring?", "no"),
        Turn("What do you see?", "a red circle, a blue square, a green star"),
        Turn("Which is more to the top, the green star or the red circle?", "green star"),
    )
    found = labelled(processor, Episode("look", turns, ((draw(things),),), (things,)))
    ways = [labels for _, labels in found if set(labels) & set(WAYS)]
    assert ways == [{"across": 2, "down": 0}, {"across": 0, "down": 2}, {"across": 0, "down": 2}]


def test_rows_without_known_things_have_no_labels(processor):
    assert labelled(processor, replace(scenes.naming(random.Random(0), "train"), things=())) == []


def test_labels_teach_the_layers_below_their_heads(processor, model):
    torch.manual_seed(0)
    trainee = GroundedTraining(model)
    rng = random.Random(0)
    batch = GroundingCollator(processor)(rows_of(*(practice.look(rng, "train") for _ in range(4))))
    loss = trainee(**batch)["loss"]
    expected = trainee.parts["answer"] + grounding.GROUNDING_WEIGHT * trainee.parts["grounding"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    inputs = {name: value for name, value in batch.items() if name != "grounding"}
    assert trainee.model(**inputs).loss.item() == pytest.approx(trainee.parts["answer"], rel=1e-5)
    reached = []
    for own in (slice(len(KINDS)), slice(len(KINDS), None)):
        labels = torch.full_like(batch["grounding"], IGNORED)
        labels[..., own] = batch["grounding"][..., own]
        trainee.zero_grad()
        (trainee(**{**batch, "grounding": labels})["loss"] - trainee.model(**inputs).loss).backward()
        layers = trainee.model.model.language_model.layers
        reached.append([layer.mlp.up_proj.weight.grad.abs().max().item() > 1e-4 for layer in layers])
    assert reached == [[True, False], [True, True]]
    optimizer, losses = torch.optim.AdamW(trainee.parameters(), 1e-2), []
    for _ in range(15):
        optimizer.zero_grad()
        trainee(**batch)["loss"].backward()
        optimizer.step()
        losses.append(trainee.parts["grounding"])
    assert losses[-1] < 0.7 * losses[0]


def test_text_alone_has_no_loss_of_labels(processor, model):
    trainee = GroundedTraining(model)
    episode = Episode("text", (Turn("Is there a red circle?", "no"),))
    assert trainee(**GroundingCollator(processor)(rows_of(episode)))["loss"].isfinite()
    assert trainee.parts["grounding"] == 0
