"""The embedded VILA-HD: what it reads, where it looks for it, and that it reads what it looks at."""

import json

import canvases
import evaluate_hd
import judge
import numpy as np
import publish
import pytest
from canvases import CELL, QUESTIONS, SIDE
from episodes import Episode, Turn, image_block
from PIL import ImageDraw
from transformers import AutoModel, AutoProcessor

FOLDER = evaluate_hd.DEFAULT_MODEL
SCORES = {row["mode"]: row for row in json.loads((FOLDER / publish.SCORES).read_text())["scores"]}
COUNT, SEED = 48, 5


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(FOLDER, trust_remote_code=True, dtype="float32").eval()


@pytest.fixture(scope="module")
def drawn():
    """Canvases that were not measured."""
    return list(evaluate_hd.drawn_episodes(COUNT, SEED))


@pytest.fixture(scope="module")
def answered(model, processor, drawn):
    """`(answer, maps)` of every canvas."""
    rows = []
    for start in range(0, COUNT, evaluate_hd.BATCH_SIZE):
        some = [episode for episode, _, _ in drawn[start : start + evaluate_hd.BATCH_SIZE]]
        answers, maps = ask(model, processor, some)
        rows += [(answer, [maps[0][number]]) for number, answer in enumerate(answers)]
    return rows


@pytest.fixture(scope="module")
def read(drawn, answered):
    """The first canvases whose code was read."""
    pairs = zip(drawn, answered)
    return [(one, maps) for one, (answer, maps) in pairs if judge.is_right(one[0], answer)][:4]


def ask(model, processor, episodes, mode="top-down"):
    return evaluate_hd.ask(model, processor, evaluate_hd.prepare(processor, episodes), mode)


def asked(canvas, spot, picture=None):
    turn = Turn(QUESTIONS[0].format(thing=spot.thing.name), spot.code)
    return Episode("code", (turn,), ((image_block(picture or canvas.picture),),))


def test_the_whole_evaluation_is_shown():
    assert list(SCORES) == list(evaluate_hd.MODES) and all(row["total"] >= 200 for row in SCORES.values())
    assert all(row["patches"] <= 0.15 for row in SCORES.values())
    low, high = SCORES["low resolution"]["goal"]
    assert low <= SCORES["low resolution"]["accuracy"] <= high


def test_it_reads_as_well_as_was_measured(drawn, answered):
    right = sum(judge.is_right(episode, answer) for (episode, _, _), (answer, _) in zip(drawn, answered))
    low, high = judge.wilson(right, COUNT)
    assert low <= SCORES["top-down"]["accuracy"] <= high, right


def test_a_look_takes_a_few_percent_of_the_patches(answered):
    assert all(0 < float(maps[0].mean()) <= 0.05 for _, maps in answered)


def test_the_low_resolution_view_alone_shows_no_code(model, processor, drawn):
    some = [episode for episode, _, _ in drawn[: evaluate_hd.BATCH_SIZE]]
    answers, maps = ask(model, processor, some, "low resolution")
    assert maps is None and sum(map(judge.is_right, some, answers)) <= 1


def test_without_its_print_a_code_is_not_answered(model, processor, read):
    """The selection stays where it was: what is covered is a few pixels."""
    assert len(read) == 4
    covered = []
    for (_, canvas, spot), _ in read:
        picture = canvas.picture.copy()
        ImageDraw.Draw(picture).rectangle(spot.box, fill=picture.getpixel((spot.box[0] - 4, spot.box[1] - 4)))
        covered.append(asked(canvas, spot, picture))
    answers, _ = ask(model, processor, covered)
    assert not any(map(judge.is_right, covered, answers))


def test_another_print_is_another_answer(model, processor, read):
    """The code of one thing, copied over that of another."""
    changed = []
    for (_, canvas, spot), _ in read:
        other = next(one for one in canvas.spots if one != spot)
        picture = canvas.picture.copy()
        ImageDraw.Draw(picture).rectangle(spot.box, fill=picture.getpixel((spot.box[0] - 4, spot.box[1] - 4)))
        picture.paste(canvas.picture.crop(other.box), spot.box[:2])
        turn = Turn(QUESTIONS[0].format(thing=spot.thing.name), other.code)
        changed.append(Episode("code", (turn,), ((image_block(picture),),)))
    answers, _ = ask(model, processor, changed)
    assert sum(map(judge.is_right, changed, answers)) >= 2


def test_the_question_leads_the_eye(model, processor, drawn):
    """Two questions about one canvas: each looks at its own code, and spends what is left on other codes."""
    seen, shared = 0, []
    for _, canvas, first in drawn[:4]:
        second = max(
            canvas.spots, key=lambda spot: np.hypot(spot.thing.x - first.thing.x, spot.thing.y - first.thing.y)
        )
        _, (chosen,) = ask(model, processor, [asked(canvas, first), asked(canvas, second)])
        seen += sum(evaluate_hd.is_seen([chosen], number, spot) for number, spot in enumerate((first, second)))
        shared.append(float((chosen[0] * chosen[1]).sum() / chosen[0].sum()))
    assert seen >= 6 and np.mean(shared) < 0.8


def test_a_drawn_selection_is_bright_where_it_looked(processor, drawn, answered):
    (_, canvas, _), (_, maps) = drawn[0], answered[0]
    overlay = np.asarray(processor.draw_selection(canvas.picture, maps), dtype=float).mean(2)
    chosen = np.kron(maps[0].numpy(), np.ones((SIDE // maps[0].shape[0],) * 2)) > 0
    assert overlay.shape == (SIDE, SIDE)
    assert overlay[chosen].mean() > overlay[~chosen].mean() + 20


def test_cells_are_what_a_place_of_the_low_resolution_grid_shows(model):
    vision = model.config.vision_config
    assert vision.image_size // vision.patch_size == canvases.CELLS
    assert vision.patch_size * vision.input_size // vision.image_size == CELL
