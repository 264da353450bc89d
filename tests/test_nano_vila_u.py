"""examples/nano_u: frozen scenes and judge, codes that learn, stages that go on where they were stopped."""

import dataclasses
import hashlib
import itertools
import json
import random

import build_u
import drawing_training
import drawn_scenes
import evaluate_u
import PIL
import pytest
import torch
import train_u
from codes_training import CodesTraining, LabelledScenes, normalise, psnr, quality
from drawing import Thing
from drawing_training import DrawingCollator, DrawingTraining
from drawn_judge import is_right, look
from drawn_scenes import DESCRIBED, SIDE, DrawnScenes, Scene, draw_picture, draw_scene, label_patches, questions
from PIL import Image
from torch.utils.data import default_collate
from transformers import AutoModel, AutoProcessor
from vila.training_vila_u import VilaUDataCollator
from vocabulary import COLOURS as NAMED_COLOURS
from vocabulary import HELD_OUT_PAIRS, SHAPES

COLOURS = list(NAMED_COLOURS)
FROZEN_TEXTS = "84db283c1b12b4355b1afebc8bbc47796f45cd261fefcaa1336a79788842dd84"
FROZEN_PIXELS = "7ed1c1ed34a156213bb32fdd1d9e86d1166bc38548e17a0e3aa2b21fe77d6ad9"
FROZEN_WITH = "13.0.0"
PAIR = Scene((Thing("red", "circle", 18, 30, 10), Thing("blue", "square", 46, 33, 11)), "left of")


def asked(split, count=100):
    return evaluate_u.scenes(count, 0, split)


def drawn(scene, seed=0):
    return draw_picture(random.Random(seed), scene)


def shrink(monkeypatch):
    """Sizes of a model of the same form, but much smaller."""
    text, vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}, {"num_hidden_layers": 1}
    monkeypatch.setattr(build_u, "TEXT", {**build_u.TEXT, **text})
    monkeypatch.setattr(build_u, "VISION", {**build_u.VISION, **vision})
    monkeypatch.setattr(build_u, "CODES", {**build_u.CODES, "depth_hidden_size": 48, "depth_num_layers": 1})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        return build_u.build(tmp_path_factory.mktemp("nano_u") / "untrained")


def test_the_model_fits_into_its_file():
    with torch.device("meta"):
        model = build_u.build_model(build_u.build_config(build_u.build_tokenizer()))
    assert 5e6 < model.num_parameters() < 16e6 / 2


# ------------------------------------------------------------------------------------------------ scenes and judge


def test_what_is_asked_for_is_frozen():
    texts, pixels = hashlib.sha256(), hashlib.sha256()
    for split in ("validation", "test"):
        for number, scene in enumerate(asked(split)):
            texts.update(repr((scene.text, questions(random.Random(number), scene))).encode())
            pixels.update(drawn(scene, number).tobytes())
    assert texts.hexdigest() == FROZEN_TEXTS
    if PIL.__version__ == FROZEN_WITH:
        assert pixels.hexdigest() == FROZEN_PIXELS


def test_unseen_pairs_are_asked_for_in_their_row_only():
    def pairs(split):
        return {(thing.colour, thing.shape) for scene in asked(split, 200) for thing in scene.things}

    assert not pairs("validation") & HELD_OUT_PAIRS
    assert pairs("test") >= HELD_OUT_PAIRS
    rows = itertools.islice(DrawnScenes(drawing=1.0), 300)
    texts = " ".join(row["messages"][0]["content"][0]["text"] for row in rows)
    assert not any(f"{colour} {shape}" in texts for colour, shape in HELD_OUT_PAIRS)


@pytest.mark.parametrize("split", ("validation", "test"))
def test_the_judge_finds_what_is_drawn(split):
    assert all(is_right(scene, drawn(scene, number)) for number, scene in enumerate(asked(split, 200)))


def other(thing_number, **change):
    things = list(PAIR.things)
    things[thing_number] = dataclasses.replace(things[thing_number], **change)
    return Scene(tuple(things), PAIR.relation)


WRONG = {
    "another colour": other(0, colour="green"),
    "another shape": other(1, shape="star"),
    "the other side": Scene(tuple(reversed(PAIR.things)), PAIR.relation),
    "another relation": Scene(PAIR.things, "above"),
    "one thing too many": Scene(PAIR.things[:1]),
    "one thing too few": Scene((*PAIR.things, Thing("green", "star", 30, 10, 9)), PAIR.relation),
    "colours changed places": Scene(
        (dataclasses.replace(PAIR.things[0], colour="blue"), dataclasses.replace(PAIR.things[1], colour="red")),
        PAIR.relation,
    ),
}


@pytest.mark.parametrize("scene", WRONG.values(), ids=WRONG)
def test_the_judge_refuses_what_was_not_asked_for(scene):
    assert is_right(PAIR, drawn(PAIR))
    assert not is_right(scene, drawn(PAIR))


@pytest.mark.parametrize("colour", ("white", "red"))
def test_the_judge_sees_nothing_in_an_empty_picture(colour):
    assert look(Image.new("RGB", (SIDE, SIDE), colour)) == []


@pytest.mark.parametrize("boxes", ([(10, 30, 40, 33), (10, 30, 13, 50)], [(6, 6, 58, 58)]), ids=("smear", "too large"))
def test_the_judge_names_no_shape_for_what_is_none(boxes):
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    for box in boxes:
        picture.paste((214, 38, 38), box)
    assert [piece[1] for piece in look(picture)] == [None]


def test_answers_follow_the_scene():
    found = dict(questions(random.Random(3), PAIR))
    assert found[drawn_scenes.DESCRIBE] == PAIR.text == "a red circle left of a blue square"
    for number in range(200):
        scene = draw_scene(random.Random(number), "train", DESCRIBED)
        kinds = {f"{thing.colour} {thing.shape}" for thing in scene.things}
        for question, answer in questions(random.Random(number), scene):
            if question.startswith("Is there"):
                assert (answer == "yes") == any(kind in question for kind in kinds)


# ------------------------------------------------------------------------------------------------------------ training


def test_rows_are_the_same_wherever_one_starts():
    def rows(start, count):
        return [row["messages"] for row in itertools.islice(DrawnScenes(start=start), count)]

    assert rows(0, 6)[3:] == rows(3, 3)
    first, again = (list(itertools.islice(LabelledScenes(8, start=start), 4)) for start in (0, 2))
    assert torch.equal(first[3]["pixel_values"], again[1]["pixel_values"])


def test_the_collator_takes_both_kinds_of_rows(folder):
    processor = AutoProcessor.from_pretrained(folder)
    batch = VilaUDataCollator(processor)(list(itertools.islice(DrawnScenes(), 12)))
    is_code = batch["labels"] == processor.image_token_id
    assert is_code.any(1).any() and not is_code.any(1).all()
    assert (batch["labels"] != -100).any(1).all()


def test_patches_are_labelled_as_they_are_drawn():
    for row in itertools.islice(DrawnScenes(drawing=1.0), 40):
        scene, picture = row["scene"], row["messages"][1]["content"][0]["image"]
        shapes, colours = label_patches(scene, 8).reshape(2, 8, 8)
        assert ((shapes > 0) == (colours > 0)).all()
        named = {(COLOURS[c - 1], SHAPES[s - 1]) for s, c in zip(shapes[shapes > 0], colours[shapes > 0])}
        assert named == {(thing.colour, thing.shape) for thing in scene.things}
        if picture.size == (SIDE, SIDE) and scene.things[0].shape == "square":
            thing = scene.things[0]
            assert shapes[int(thing.y // 8), int(thing.x // 8)] == SHAPES.index("square") + 1


def test_training_draws_more_single_things_than_is_asked_for():
    def share(scenes):
        return sum(len(scene.things) == 1 for scene in scenes) / len(scenes)

    rows = [row["scene"] for row in itertools.islice(DrawnScenes(drawing=1.0), 400)]
    assert share(rows) == pytest.approx(drawn_scenes.TRAINED_SINGLES, abs=0.08)
    assert share(asked("validation", 400)) == pytest.approx(drawn_scenes.SINGLES, abs=0.08)


def test_heads_name_the_next_patches_and_teach_the_language_model(folder):
    torch.manual_seed(0)
    trainee = DrawingTraining(AutoModel.from_pretrained(folder, dtype="float32"))
    collator = DrawingCollator(AutoProcessor.from_pretrained(folder), 8, 0.0)
    rows = list(itertools.islice(DrawnScenes(), 8))
    batch = collator(rows)
    assert batch["patch_labels"].shape == (sum("scene" in row for row in rows), 2, 64)
    loss = trainee(**batch)["loss"]
    parts = trainee.parts
    expected = parts["text"] + parts["image"] + drawing_training.NAMING_WEIGHT * parts["naming"]
    assert loss.item() == pytest.approx(expected, rel=1e-5) and parts["naming"] > 0
    layer = trainee.model.model.language_model.layers[0].mlp.up_proj.weight
    losses = []
    optimizer = torch.optim.AdamW(trainee.parameters(), 3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        trainee(**batch)["loss"].backward()
        optimizer.step()
        losses.append(trainee.parts["naming"])
    assert losses[-1] < 0.9 * losses[0] and layer.grad.abs().sum() > 0
    only_text = collator([row for row in rows if "scene" not in row][:1])
    assert only_text["patch_labels"].shape == (0, 2, 64)
    assert trainee(**only_text)["loss"].isfinite() and trainee.parts["naming"] == 0


def test_the_state_that_predicts_a_patch_is_given_its_label(folder, monkeypatch):
    """The head that is shown a state has the label of the patch behind it."""
    trainee = DrawingTraining(AutoModel.from_pretrained(folder, dtype="float32"))
    rows = [row for row in itertools.islice(DrawnScenes(), 8) if "scene" in row][:2]
    batch = DrawingCollator(AutoProcessor.from_pretrained(folder), 8, 0.0)(rows)
    seen = []
    monkeypatch.setattr(
        drawing_training, "naming_loss", lambda logits, wanted: seen.append((logits, wanted)) or logits.sum()
    )
    trainee(**batch)
    states = trainee.model(
        **{name: value for name, value in batch.items() if name not in ("patch_labels", "labels")},
        output_hidden_states=True,
    ).hidden_states[-1]
    starts = (batch["input_ids"] == trainee.model.config.image_token_id).int().argmax(1)
    logits, wanted = seen[-1]
    for number, start in enumerate(starts.tolist()):
        own = trainee.heads[-1](states[number, start - 1 : start + 63])
        torch.testing.assert_close(logits[64 * number : 64 * number + 64], own, atol=1e-4, rtol=1e-4)
        assert (wanted[64 * number : 64 * number + 64].T.numpy() == label_patches(rows[number]["scene"], 8)).all()


def test_codebooks_follow_what_they_stand_for(folder, monkeypatch):
    monkeypatch.setattr("codes_training.WARM_UP", 15)
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(folder, dtype="float32").model
    trainee, rows = CodesTraining(model).train(), iter(LabelledScenes(8))
    optimizer = torch.optim.AdamW([p for p in trainee.parameters() if p.requires_grad], 2e-3)
    tables = [table.weight.detach().clone() for table in model.quantizer.codebooks]
    losses = []
    for _ in range(45):
        found = trainee(**default_collate([next(rows) for _ in range(4)]))
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        losses.append(found["reconstruction"].item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    for table, before in zip(model.quantizer.codebooks, tables):
        assert not torch.equal(table.weight[:-1], before[:-1]) and table.weight.isfinite().all()
    found = quality(model.eval(), pictures=4)
    assert list(found) == ["mean picture", "depth 1", "depth 2", "depth 3", "depth 4"]


def test_normalised_features_have_the_same_codes_and_pixels(folder):
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(folder, dtype="float32").eval()
    pixels = torch.stack([row["pixel_values"] for row in itertools.islice(LabelledScenes(8), 8)])
    with torch.no_grad():
        for table in model.model.quantizer.codebooks:
            table.weight[:-1].normal_()
        last = [module for name, module in model.model.vision_tower.named_modules() if name.endswith("fc2")][-1]
        last.bias.add_(torch.randn_like(last.bias) * 3)
        codes = model.encode_image(pixels)
        before = model.decode_codes(codes)
        normalise(model.model, pixels)
        features = model.model.vision_tower(pixel_values=pixels).last_hidden_state
        assert torch.equal(model.encode_image(pixels), codes)
        torch.testing.assert_close(model.decode_codes(codes), before, atol=1e-4, rtol=0)
    torch.testing.assert_close(features.mean((0, 1)), torch.zeros(features.shape[-1]), atol=1e-4, rtol=0)
    assert features.std().item() == pytest.approx(1, abs=1e-3)


def test_psnr_is_that_of_values_from_minus_one_to_one():
    assert psnr(torch.zeros(8), torch.full((8,), 0.2)) == pytest.approx(20.0)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    shrink(monkeypatch)
    for name, value in {"CODES_STEPS": 4, "STEPS": 4, "BATCH": 4, "CODES_BATCH": 2}.items():
        monkeypatch.setattr(train_u, name, value)
    language = train_u.STAGES["language"]

    def interrupted(*arguments):
        monkeypatch.setitem(train_u.STAGES, "language", language)
        raise KeyboardInterrupt

    monkeypatch.setitem(train_u.STAGES, "language", interrupted)
    options = ["--output", str(tmp_path), "--threads", "1"]
    with pytest.raises(KeyboardInterrupt):
        train_u.main(options)
    done = (tmp_path / "codes" / "final" / "model.safetensors").stat().st_mtime_ns
    train_u.main(options)
    assert (tmp_path / "codes" / "final" / "model.safetensors").stat().st_mtime_ns == done
    stages = {json.loads(line)["stage"] for line in (tmp_path / "log.jsonl").read_text().splitlines()}
    assert stages == {"codes", "language"}
    model = AutoModel.from_pretrained(tmp_path / "final", trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    before, after = (
        AutoModel.from_pretrained(tmp_path / name / "final", dtype="float32").state_dict()
        for name in ("codes", "language")
    )
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert {"language_model", "depth_transformer", "multi_modal_projector"} <= changed
    assert not changed & {"vision_tower", "quantizer", "pixel_decoder"}


def test_an_untrained_model_is_scored(folder, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    evaluate_u.main(
        ["--model", str(folder), "--samples", "2", "--scales", "1", "3", "--sheet", str(sheet), "--dtype", "float32"]
    )
    found = json.loads(capsys.readouterr().out)
    assert list(found["drawing"]) == ["1.0", "3.0"] and found["best"] in (1.0, 3.0)
    assert found["unseen"] == {"score": 0, "interval": found["unseen"]["interval"], "questions": 2}
    assert "| reconstruction, depth 4 |" in evaluate_u.table_of(found)
    assert found["understanding"] is None
    assert Image.open(sheet).width == evaluate_u.COLUMNS * SIDE * evaluate_u.ZOOM


def test_no_samples_are_refused(folder, capsys):
    with pytest.raises(SystemExit):
        evaluate_u.main(["--model", str(folder), "--samples", "0"])
    assert "--samples must be at least 1" in capsys.readouterr().err
