"""The embedded VILA-U: it draws what it is asked for, and sees what is drawn."""

import json
import random

import evaluate_u
import judge
import publish
import pytest
import torch
from codes_training import quality
from conftest import REPOSITORY
from drawn_judge import is_right, look
from drawn_scenes import DESCRIBED, draw_picture
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

FOLDER = REPOSITORY / "checkpoints" / "vila-u-nano"
REPORT = json.loads((FOLDER / publish.SCORES).read_text())
BEST = REPORT["best"]
SAMPLES, SEED = 40, 7


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(FOLDER, trust_remote_code=True, dtype="float32").eval()


def test_the_whole_evaluation_is_shown():
    assert [float(scale) for scale in REPORT["drawing"]] == list(evaluate_u.SCALES)
    scores = [*REPORT["drawing"].values(), REPORT["unseen"]]
    assert {score["questions"] for score in scores} == {evaluate_u.SAMPLES} and REPORT["understanding"][
        "score"
    ] >= 0.95
    assert REPORT["reconstruction"]["depth 4"] >= REPORT["reconstruction"]["mean picture"] + 10


def draw(model, processor, scenes, scale=BEST):
    return evaluate_u.draw(model, processor, scenes, scale, SEED, tqdm(disable=True))


@pytest.fixture(scope="module")
def scenes():
    """Scenes that were not measured."""
    return evaluate_u.scenes(SAMPLES, SEED, "validation")


@pytest.fixture(scope="module")
def pictures(model, processor, scenes):
    return draw(model, processor, scenes)


def within(right, total, score):
    low, high = judge.wilson(right, total)
    return low <= score <= high


def test_drawings_are_right_as_often_as_measured(scenes, pictures):
    right = sum(map(is_right, scenes, pictures))
    assert within(right, SAMPLES, REPORT["drawing"][str(BEST)]["score"])


def test_drawings_follow_the_text(scenes, pictures):
    others = [*scenes[1:], scenes[0]]
    assert sum(map(is_right, others, pictures)) < sum(map(is_right, scenes, pictures)) / 4


def test_the_same_seed_draws_the_same(model, processor, scenes, pictures):
    again = draw(model, processor, scenes[:1])
    assert again[0].tobytes() == draw(model, processor, scenes[:1])[0].tobytes()
    assert again[0].size == pictures[0].size


def test_it_sees_what_is_drawn(model, processor):
    scenes = evaluate_u.scenes(SAMPLES, SEED, "validation", DESCRIBED)
    shown = [(scene, draw_picture(random.Random(number), scene)) for number, scene in enumerate(scenes)]
    right, total = evaluate_u.understand(model, processor, shown, SEED)
    swapped = [(scene, picture) for (scene, _), (_, picture) in zip(shown, [*shown[1:], shown[0]])]
    blind, _ = evaluate_u.understand(model, processor, swapped, SEED)
    assert right / total > 0.8 and blind < 0.7 * right


def test_each_depth_makes_reconstructions_better(model):
    found = quality(model.model, pictures=32)
    values = list(found.values())
    assert values == sorted(values)
    assert found["depth 4"] > found["mean picture"] + 10


def test_its_own_pictures_go_through_the_codes(model, processor, scenes, pictures):
    """A picture that is right is still right after encoding and decoding."""
    right = [(scene, picture) for scene, picture in zip(scenes, pictures) if is_right(scene, picture)]
    pixels = processor.image_processor([picture for _, picture in right], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        decoded = model.decode_codes(model.encode_image(pixels))
    again = processor.post_process_multimodal_output(decoded, generation_mode="image")
    kept = sum(
        sorted(str(piece[0]) for piece in look(one)) == sorted(thing.colour for thing in scene.things)
        for (scene, _), one in zip(right, again)
    )
    assert kept >= 0.8 * len(right)
