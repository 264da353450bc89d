"""examples/nano_hd: frozen canvases, labels, what the trainees learn from, and the recipe in two steps a stage."""

import hashlib
import json
import random

import build_hd
import canvases
import encoder_training
import evaluate_hd
import looking_training
import matplotlib
import numpy as np
import PIL
import pytest
import running
import torch
import train_hd
from canvases import CELL, CELLS, SIDE
from PIL import features
from torch.utils.data import default_collate
from transformers import AutoModel, AutoProcessor
from vila.training_vila import VilaDataCollator
from vocabulary import HELD_OUT_PAIRS, split_of

FROZEN_TEXTS = "c625e3b6c67ecdd6e3cb05902fb348540b0f438e10d91e75fafe3324c4b8a07d"
FROZEN_PIXELS = "8df8cadb076ae3d603fce86f9dd8208ecc69f4cdf562e3b92fa21eebd9a0ebfe"
# what draws the glyphs
FROZEN_WITH = ("13.0.0", "2.14.3", "3.11.2")
COUNT = 12


def drawn(split, count=COUNT, seed=0):
    return [canvases.code_episode(random.Random(f"{split}/code/{seed}/{index}"), split) for index in range(count)]


@pytest.fixture(scope="module")
def tested():
    return drawn("test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_hd.build(tmp_path_factory.mktemp("nano_hd") / "untrained")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModel.from_pretrained(folder, dtype="float32").eval()


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


# ----------------------------------------------------------------------------------------------------- the canvases


def test_the_test_split_is_frozen(tested):
    texts, pixels = hashlib.sha256(), hashlib.sha256()
    for (episode, canvas, spot), judged in zip(tested, evaluate_hd.drawn_episodes(COUNT)):
        assert episode.turns == judged[0].turns
        texts.update(repr((episode.turns, canvas.spots, spot.box)).encode())
        pixels.update(canvas.picture.tobytes())
    assert canvas.picture.size == (SIDE, SIDE)
    if (PIL.__version__, features.version("freetype2"), matplotlib.__version__) == FROZEN_WITH:
        assert (texts.hexdigest(), pixels.hexdigest()) == (FROZEN_TEXTS, FROZEN_PIXELS)


def test_codes_and_pairs_of_the_test_are_never_trained_on(tested):
    assert {split_of(spot.code) for _, canvas, _ in tested for spot in canvas.spots} == {"test"}
    for split in ("train", "validation"):
        spots = [spot for _, canvas, _ in drawn(split) for spot in canvas.spots]
        assert {split_of(spot.code) for spot in spots} == {split}
        assert not {(spot.thing.colour, spot.thing.shape) for spot in spots} & HELD_OUT_PAIRS


def test_a_question_names_one_thing_and_its_code_is_beside_it(tested):
    for episode, canvas, spot in tested:
        assert len({other.thing.colour for other in canvas.spots}) == len(canvas.spots)
        assert spot.thing.name in episode.target.question and episode.target.answer == spot.code
        left, upper, right, lower = spot.box
        assert 0 <= left < right <= SIDE and 0 <= upper < lower <= SIDE
        distances = [
            np.hypot(other.thing.x - (left + right) / 2, other.thing.y - (upper + lower) / 2) for other in canvas.spots
        ]
        assert canvas.spots[int(np.argmin(distances))] == spot


def test_boxes_hold_the_ink_of_their_codes(tested):
    for _, canvas, _ in tested[:4]:
        for spot in canvas.spots:
            left, upper, right, _ = spot.box
            print_of = np.asarray(canvas.picture.crop(spot.box), dtype=int).mean(2)
            around = np.asarray(canvas.picture.crop((left - 3, upper - 3, right + 3, upper)), dtype=int).mean(2)
            assert print_of.min() < 110 < around.min()


def test_a_sixth_of_the_size_does_not_show_the_print(tested):
    """Codes are less than five pixels high there."""
    heights = [spot.box[3] - spot.box[1] for _, canvas, _ in tested for spot in canvas.spots]
    assert max(heights) * build_hd.LOW_SIDE / SIDE < 5


def test_cells_of_a_box_are_those_that_it_touches():
    assert canvases.cells_of((0, 0, CELL, CELL)) == [0]
    assert canvases.cells_of((CELL - 1, 0, CELL + 1, 5)) == [0, 1]
    assert canvases.cells_of((CELL, CELL - 1, CELL + 2, CELL + 1)) == [1, CELLS + 1]


# ----------------------------------------------------------------------------------------------------- the start


def test_a_budget_of_five_percent_of_the_patches(model):
    vision = model.config.vision_config
    assert sum(vision.look_budget) / (vision.input_size // vision.patch_size) ** 2 < 0.05
    assert sum(weight.numel() for weight in model.parameters()) * 2 < 16_000_000


def test_a_stretched_kernel_answers_to_an_enlarged_patch():
    torch.manual_seed(0)
    kernel, patch = torch.randn(5, 3, 11, 11), torch.randn(1, 3, 11, 11)
    enlarged = torch.nn.functional.interpolate(patch, size=(18, 18), mode="bicubic")
    stretched = build_hd.stretch_kernel(kernel, 18)
    expected = torch.nn.functional.conv2d(patch, kernel)
    assert torch.allclose(torch.nn.functional.conv2d(enlarged, stretched), expected, atol=1e-3)


def test_blocks_and_language_model_are_those_of_vila_nano(model):
    nano = AutoModel.from_pretrained(build_hd.NANO, dtype="float32")
    layer, block = nano.model.vision_tower.encoder.layers[2], model.model.vision_tower.trunk.blocks[2]
    features = torch.randn(1, 7, nano.config.vision_config.hidden_size)
    # GELU is exact here, and its approximation there
    assert torch.allclose(block(features)[0], layer(features, None), atol=5e-3)
    ids = torch.arange(20)[None]
    assert torch.equal(model.model.language_model(ids)[0], nano.model.language_model(ids)[0])


# ----------------------------------------------------------------------------------------------------- training data


def test_labels_say_what_is_drawn_where():
    _, canvas, spot = drawn("train", 1)[0]
    large, low = encoder_training.label(canvas)
    side = large.cell
    (upper, lower), edges = spot.box[1::2], spot.edges
    for number, character in enumerate(spot.code):
        row, column = int((upper + lower) / 2 / side), int((edges[number] + edges[number + 1]) / 2 / side)
        found = dict(zip(large.kinds, large.maps[:, row, column]))
        assert encoder_training.CHARACTERS[found["character"] - 1] == character and found["place"] == number + 1
        assert list(canvases.COLOURS)[found["owner"] - 1] == spot.thing.colour
    row, column = int(spot.box[1] / low.cell), int(spot.box[0] / low.cell)
    assert low.maps[low.kinds.index("owner"), row, column] == found["owner"]
    assert large.maps.shape[1:] == (2 * SIDE // build_hd.PATCH,) * 2


def test_blocks_of_codes_are_dense():
    picture, labels, cells = encoder_training.draw_blocks(random.Random(0), "train")
    assert picture.size == (SIDE, SIDE) and len(set(cells)) == encoder_training.LABELLED_CELLS
    per_cell = CELL // round(labels.cell)
    maps = labels.maps[0].reshape(CELLS, per_cell, CELLS, per_cell).transpose(0, 2, 1, 3).reshape(CELLS**2, -1)
    assert (maps[cells] > 0).mean() > 0.2 and not np.delete(maps, cells, axis=0).any()


def test_the_encoder_is_trained_as_it_sees(model, processor):
    """The trainee's features are those of the encoder at the same patches."""
    rows = encoder_training.LabelledCanvases(0.83, 0.18)
    trainee = encoder_training.EncoderTraining(model.model.vision_tower)
    rng = random.Random("encoder/train/0/1")
    canvas = canvases.draw_canvas(rng, "train")
    row = rows.row(random.Random("encoder/train/0/1"), is_dense=False)
    pixels = processor.image_processor(canvas.picture, return_tensors="pt")["pixel_values"]
    tower = model.model.vision_tower
    with torch.no_grad():
        low, close = trainee.see(row["low"][None], row["patches"][None], row["indices"][None])
        view = tower.see_low_res(pixels)
        assert torch.allclose(view.hidden_states[-1], low, atol=1e-3)
        assert torch.allclose(tower.look(view, [row["indices"][None]])[-1], close, atol=1e-3)


@pytest.mark.parametrize("is_shown", [True, False])
def test_the_quick_collator_equals_that_of_the_library(processor, is_shown):
    (row,) = (row for _, row in zip(range(1), looking_training.AskedCanvases(is_shown)))
    quick = looking_training.AskedCollator(processor)([row])
    full = VilaDataCollator(processor)([{"messages": row.messages}])
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(quick[name], full[name])
    assert torch.allclose(quick["pixel_values"], full["pixel_values"], atol=1e-5)
    assert ("shown" in quick) == is_shown and (len(row.turns) > 1) == is_shown


def test_rows_are_the_same_wherever_one_starts():
    first = [row for _, row in zip(range(3), looking_training.AskedCanvases(False))]
    (later,) = (row for _, row in zip(range(1), looking_training.AskedCanvases(False, start=2)))
    assert first[2].turns == later.turns and torch.equal(first[2].pixels, later.pixels)


def test_what_is_saved_is_all_that_a_stopped_stage_needs(model):
    """Tied weights have one name in the file, and are found by both."""
    trainee = looking_training.LookingTraining(model)
    state = trainee.state_dict()
    assert len({weight.data_ptr() for weight in state.values()}) == len(state)
    found = trainee.load_state_dict(state, strict=False)
    assert not found.missing_keys and not found.unexpected_keys


@pytest.mark.parametrize("is_shown", [True, False])
def test_the_losses_reach_everything_but_the_encoder(model, processor, is_shown):
    trainee = looking_training.LookingTraining(model)
    rows = [row for _, row in zip(range(2), looking_training.AskedCanvases(is_shown))]
    batch = looking_training.AskedCollator(processor)(rows)
    output = trainee(**batch)
    output["loss"].backward()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    model.requires_grad_(True)
    assert not any(".trunk." in name for name in reached)
    assert {"answer", "top_down", "bottom_up", "colour", "spelling"} == set(trainee.parts)
    assert (trainee.parts["spelling"] > 0) == is_shown
    for part in ("top_down_prompt_head", "selection_feature_proj", "highres_selection", "prior_prompt"):
        assert any(part in name for name in reached), part
    assert any("language_model" in name for name in reached)
    assert output["cells"].shape[1] == (looking_training.SHOWN_CELLS if is_shown else build_hd.LOOK_CELLS)


def test_what_is_shown_is_spelled_where_it_stands(model):
    _, canvas, spot = drawn("train", 1)[0]
    spelling = looking_training.spelling_of(canvas.spots)
    side, names = spelling.shape[-1], len(encoder_training.CHARACTERS) + 1
    each, middle = SIDE // side, (spot.edges[0] + spot.edges[1]) / 2
    first, *_, owner = spelling[:, (spot.box[1] + spot.box[3]) // 2 // each, int(middle) // each]
    assert encoder_training.CHARACTERS[first - 1] == spot.code[0]
    assert list(canvases.COLOURS)[owner - 1] == spot.thing.colour
    cells = torch.tensor([canvases.cells_of(spot.box)])
    patches, per_row = encoder_training.patches_of(cells)[0], SIDE // build_hd.PATCH
    shown = sorted({int(patch) // per_row // 2 * side + int(patch) % per_row // 2 for patch in patches})
    right = spelling.flatten(1)[:, shown].T
    assert (right > 0).any(0).all()
    maps = torch.zeros(1, per_row**2)
    maps[0, patches] = 1
    trainee = looking_training.LookingTraining(model)
    trainee.spelling_heads = torch.nn.ModuleList(torch.nn.Identity() for _ in looking_training.SPELLED)
    for is_wrong, named in ((False, right), (True, right.roll(1, 0))):
        states = 50 * torch.nn.functional.one_hot(named, names).flatten(1).float()
        loss = float(trainee.spelling_loss([states, states], maps, spelling[None]))
        assert (loss > 1) == is_wrong, loss
    model.requires_grad_(True)


def test_the_trainee_answers_as_the_model_does(model, processor):
    """Same selection, same answer loss as `forward` of the model itself."""
    trainee = looking_training.LookingTraining(model).eval()
    (row,) = (row for _, row in zip(range(1), looking_training.AskedCanvases(False)))
    batch = looking_training.AskedCollator(processor)([row])
    with torch.no_grad():
        cells = trainee(**batch)["cells"]
        batch["asked_maps"] = looking_training.cell_maps([cells[0].tolist()])[None]  # nothing is missed
        trainee(**batch)
        inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask", "labels")}
        own = model(**inputs)
    model.requires_grad_(True)
    assert own.selection_maps[0].flatten().nonzero().flatten().tolist() == (
        encoder_training.patches_of(cells)[0].tolist()
    )
    assert abs(float(own.loss) - trainee.parts["answer"]) < 1e-3


def test_every_stage_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    for name in ("ENCODER", "READING", "LOOKING"):
        monkeypatch.setattr(train_hd, f"{name}_STEPS", 2)
        monkeypatch.setattr(train_hd, f"{name}_BATCH", 1)
    monkeypatch.setattr(encoder_training, "VALIDATION_ROWS", 2)
    train_hd.main(["--output", str(tmp_path), "--threads", "1"])
    model = AutoModel.from_pretrained(tmp_path / "final")
    assert model.dtype == torch.bfloat16
    logged = [json.loads(line) for line in (tmp_path / running.LOG).read_text().splitlines()]
    assert [row["stage"] for row in logged if row["step"] == 2] == ["encoder", "reading", "looking"]
    assert {"answer", "top_down", "bottom_up"} <= set(logged[-1])


# ----------------------------------------------------------------------------------------------------- the judge


def test_a_code_is_seen_where_all_its_patches_were_looked_at(tested):
    _, _, spot = tested[0]
    maps = torch.zeros(1, SIDE // build_hd.PATCH, SIDE // build_hd.PATCH)
    assert not evaluate_hd.is_seen([maps], 0, spot) and not evaluate_hd.is_seen(None, 0, spot)
    cells = torch.tensor(canvases.cells_of(spot.box))
    maps.view(1, -1)[0, encoder_training.patches_of(cells)] = 1
    assert evaluate_hd.is_seen([maps], 0, spot)
    maps[0, spot.box[1] // build_hd.PATCH, spot.box[0] // build_hd.PATCH] = 0
    assert not evaluate_hd.is_seen([maps], 0, spot)


def test_an_untrained_model_reads_nothing(model, processor):
    rows = evaluate_hd.score(model, processor, samples=2, batch_size=2)
    assert [row["right"] for row in rows] == [0, 0, 0] and {row["total"] for row in rows} == {2}
    assert all(0.02 < row["patches"] < 0.05 for row in rows[:2]) and rows[2]["patches"] == 0
    assert evaluate_hd.table_of({"scores": rows}).count("\n") == 4


def test_the_sheet_shows_two_questions_a_canvas(model, processor):
    drawn = evaluate_hd.sheet(model, processor, rows=1)
    assert drawn.width > drawn.height and len(np.unique(np.asarray(drawn))) > 50


def test_default_collate_stacks_labelled_rows():
    rows = encoder_training.LabelledCanvases(0.83, 0.18)
    batch = default_collate([row for _, row in zip(range(2), rows)])
    patches = encoder_training.LABELLED_CELLS * build_hd.PATCHES_PER_CELL
    assert batch["patches"].shape == (2, patches, 3, build_hd.PATCH, build_hd.PATCH)
    assert batch["labels"].shape == (2, len(encoder_training.LARGE_KINDS), patches, 2, 2)
