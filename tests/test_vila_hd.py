"""VILA-HD: looking at pictures of batches, chats and videos, what is computed once, options, and training."""

import copy
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import COMMITTED_GOLDENS, REPOSITORY
from PIL import Image
from transformers import AutoModel, AutoProcessor, DynamicCache, Trainer, TrainingArguments, pipeline
from vila.conversion_vila import convert
from vila.loading_vila import Checkpoint
from vila.training_vila_hd import SELECTION_PARTS, VilaHDDataCollator, box_map, train_selection_only
from vila.vision_vila_hd import selection_loss

CASE = COMMITTED_GOLDENS / "vila_hd" / "vila_hd_vlm"
SIZE = 280


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return convert(CASE / "checkpoint", tmp_path_factory.mktemp("vila_hd") / "tiny-hd")


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoModel.from_pretrained(folder, dtype="float32").eval()


@pytest.fixture
def model(loaded):
    return loaded


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def picture(number=0):
    return {"type": "image", "path": str(CASE / f"input_{number}.png")}


def text(content):
    return {"type": "text", "text": content}


def user(*content):
    return {"role": "user", "content": list(content)}


ONE = [user(picture(0), text("what is the color of the big sign?"))]
TWO = [user(picture(0), picture(1), text("what is in the picture?"))]
NONE = [user(text("where does the exit lead to?"))]
LATE = [user(text("hello")), {"role": "assistant", "content": [text("yes?")]}, user(picture(1), text("what is it?"))]


def encode(processor, chats, **options):
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def answer(model, inputs, **options):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


# ------------------------------------------------------------------------------------------------- prompts and batches


def test_batch_of_unequal_picture_counts_equals_single_prompts(model, processor):
    chats = [TWO, NONE, ONE, LATE]
    together = answer(model, encode(processor, chats), num_look_close=2)
    for row, chat in zip(together, chats):
        assert row.tolist() == answer(model, encode(processor, chat), num_look_close=2)[0].tolist()


def test_logits_of_a_batch_equal_those_of_single_prompts(model, processor):
    chats = [TWO, NONE, ONE]
    with torch.no_grad():
        together = model(**encode(processor, chats), num_look_close=1).logits
        for row, chat in zip(together, chats):
            alone = model(**encode(processor, chat), num_look_close=1).logits[0]
            torch.testing.assert_close(row[-len(alone) :], alone, atol=1e-4, rtol=0)


def test_text_alone_is_answered_and_has_no_maps(model, processor):
    inputs = encode(processor, NONE)
    output = model.generate(**inputs, max_new_tokens=4, output_selection_maps=True)
    assert output.sequences.shape[1] > inputs["input_ids"].shape[1]
    assert output.selection_maps is None
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_picture_after_the_first_question_gets_the_same_answer_with_and_without_reuse(model, processor):
    inputs = encode(processor, LATE)
    assert answer(model, inputs).tolist() == answer(model, inputs, cache_implementation="static").tolist()


@pytest.mark.parametrize("mode", ["after_prompt", "after_image"])
def test_beams_and_several_answers_per_prompt(mode, model, processor):
    inputs = encode(processor, [ONE, NONE])
    beams = answer(model, inputs, num_beams=2, num_return_sequences=2, look_close_mode=mode)
    assert beams.shape == (4, 8)
    one_by_one = answer(model, encode(processor, ONE), num_beams=2, num_return_sequences=2, look_close_mode=mode)
    assert beams[:2].tolist() == one_by_one.tolist()


@pytest.mark.parametrize(
    "options", [{"prefill_chunk_size": 7}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}], ids=str
)
def test_ways_of_generating_give_the_same_answer(options, model, processor):
    inputs = encode(processor, ONE)
    assert answer(model, inputs, **options).tolist() == answer(model, inputs).tolist()


def test_pipeline_takes_look_options(folder):
    pipe = pipeline("image-text-to-text", model=str(folder), dtype="float32", device="cpu")
    answers = [
        pipe(text=ONE, max_new_tokens=8, return_full_text=False, generate_kwargs=options)[0]["generated_text"]
        for options in ({"num_look_close": 0}, {"num_look_close": 4})
    ]
    assert answers[0] != answers[1]


def test_bfloat16_answers(folder, processor):
    half = AutoModel.from_pretrained(folder, dtype="bfloat16").eval()
    inputs = encode(processor, [TWO, NONE])
    output = half.generate(**inputs, max_new_tokens=4, num_look_close=2, output_selection_maps=True)
    assert output.selection_maps[0].sum((1, 2)).tolist() == [24, 24]


def test_continued_chat_equals_the_whole_chat(model, processor):
    cache = DynamicCache()
    inputs = encode(processor, ONE)
    first = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, min_new_tokens=4)
    reply = processor.tokenizer.decode(first[0, inputs["input_ids"].shape[1] :])
    for question in ([text("and now?")], [picture(1), text("and this?")]):
        chat = [*ONE, {"role": "assistant", "content": [text("red")]}, user(*question)]
        whole = encode(processor, chat)
        fresh = DynamicCache()
        model.generate(**inputs, past_key_values=fresh, max_new_tokens=1)
        continued = answer(model, whole, past_key_values=fresh)
        assert continued.tolist() == answer(model, whole).tolist(), reply


def test_batch_of_chats_with_pictures_is_not_continued(model, processor):
    inputs, cache = encode(processor, [ONE, ONE]), DynamicCache()
    model.generate(**inputs, past_key_values=cache, max_new_tokens=1)
    with pytest.raises(ValueError, match="one by one"):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=1)


def test_frames_of_a_video_are_looked_at_one_by_one(model, processor):
    frames = [Image.open(CASE / "input_0.png").convert("RGB"), Image.open(CASE / "input_1.png").convert("RGB")]
    inputs = encode(processor, [user({"type": "video", "video": frames}, text("what happens?"))])
    output = model.generate(**inputs, max_new_tokens=2, output_selection_maps=True)
    assert len(output.selection_maps[0]) == 2


# ---------------------------------------------------------------------------------------------------- computed once


def count_calls(monkeypatch, owner, name):
    calls, original = [], getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_nothing_is_computed_twice(model, processor, monkeypatch):
    """One low-resolution pass, one selection net, one resize per scale, and no position of the prefix twice."""
    tower, inputs = model.model.vision_tower, encode(processor, ONE)
    seen = count_calls(monkeypatch, tower, "see_low_res")
    nets = count_calls(monkeypatch, tower.highres_selection_feature_module, "forward")
    resized = count_calls(monkeypatch, torch.nn.functional, "interpolate")
    language = count_calls(monkeypatch, model.model.language_model, "forward")
    answer(model, inputs, num_look_close=4, max_new_tokens=1, min_new_tokens=1)

    assert len(seen) == len(nets) == 1
    sizes = [kwargs["size"] for _, kwargs in resized if kwargs.get("mode") == "bicubic" and "antialias" not in kwargs]
    assert sorted(sizes) == [(70, 70), (140, 140), (1512, 1512)]
    lengths = [kwargs["inputs_embeds"].shape[1] for _, kwargs in language]
    prefix = inputs["input_ids"][0].tolist().index(model.config.image_token_id) + model.config.num_tile_tokens
    assert lengths[0] == prefix
    # what is left of the question, then everything behind the prefix with what was seen closely
    assert lengths[1] + prefix < inputs["input_ids"].shape[1]
    assert len(lengths) == 3


def test_pictures_one_at_a_time_give_the_same_answer(folder, processor):
    model, inputs = AutoModel.from_pretrained(folder, dtype="float32").eval(), encode(processor, TWO)
    expected = answer(model, inputs, num_look_close=2)
    model.config.vision_chunk_size = 1
    assert torch.equal(answer(model, inputs, num_look_close=2), expected)


def test_positions_are_made_for_chosen_patches_only(model, processor, monkeypatch):
    made = count_calls(monkeypatch, torch.nn.functional, "interpolate")
    answer(model, encode(processor, ONE), num_look_close=2)
    tables = [args[0].shape for args, kwargs in made if kwargs.get("antialias")]
    side = model.config.vision_config.position_grid
    assert tables and all(shape == (1, 1, side, side) for shape in tables)


def test_projector_sees_only_kept_cells(model, processor, monkeypatch):
    rows = count_calls(monkeypatch, model.model.multi_modal_projector.layers[2], "forward")
    output = model.generate(**encode(processor, ONE), num_look_close=2, max_new_tokens=1, output_selection_maps=True)
    shapes = [args[0].shape for args, _ in rows]
    cells = sum(
        int((scale.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).sum((2, 4)) == 4).sum())
        for scale in output.selection_maps
    )
    assert sorted(shape[0] if len(shape) == 2 else shape[0] * shape[1] for shape in shapes) == [9, cells]


def test_half_precision_finds_the_tokens_of_every_scale(model):
    """Of 341 chosen patches a sum in bfloat16 makes 340."""
    projector, count = model.model.multi_modal_projector, 341
    maps = [(torch.arange(400) < count).float().view(20, 20)] * 2
    assert maps[0].bfloat16().sum() == count - 1
    tokens = torch.randn(2 * count, model.config.vision_config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, _ = projector.project_chosen(tokens, maps)
        kept, _ = projector.project_chosen(tokens, [scale.bfloat16() for scale in maps])
    assert torch.equal(kept, expected)


def test_looking_at_nothing_asks_nothing(model, processor, monkeypatch):
    scores = count_calls(monkeypatch, model.model.vision_tower, "score")
    inputs = encode(processor, ONE)
    output = model.generate(**inputs, num_look_close=0, max_new_tokens=2, output_selection_maps=True)
    assert not scores and output.selection_maps is None
    with torch.no_grad():
        assert model(**inputs, num_look_close=0).logits.shape[1] == inputs["input_ids"].shape[1]


# ------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "options",
    [
        {"num_token_look_close": 10**6},
        {"num_token_look_close": "all"},
        {"num_look_close": "all"},
        {"num_look_close": 10**6},
    ],
    ids=str,
)
def test_more_than_there_is_means_everything(options, model, processor):
    output = model.generate(**encode(processor, ONE), **options, max_new_tokens=1, output_selection_maps=True)
    assert all((scale == 1).all() for scale in output.selection_maps)


def test_budgets_of_each_scale(model, processor):
    output = model.generate(
        **encode(processor, ONE),
        num_look_close=1,
        select_num_each_scale=[40, 4],
        max_new_tokens=1,
        output_selection_maps=True,
    )
    assert [int(scale.sum()) for scale in output.selection_maps] == [40, 4]
    assert model.config.vision_config.look_budget == [12, 48]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_look_close": -1}, "num_look_close"),
        ({"num_look_close": 1.5}, "num_look_close"),
        ({"num_look_close": "every"}, "num_look_close"),
        ({"num_token_look_close": -3}, "num_token_look_close"),
        ({"num_look_close": 1, "num_token_look_close": 3}, "either"),
        ({"select_num_each_scale": [1]}, "select_num_each_scale"),
        ({"select_num_each_scale": [0, 0]}, "select_num_each_scale"),
        ({"select_num_each_scale": [-1, 5]}, "select_num_each_scale"),
        ({"look_close_mode": "before"}, "look_close_mode"),
    ],
)
def test_options_without_sense_are_refused_by_name(options, message, model, processor):
    inputs = encode(processor, ONE)
    for call in (lambda: model.generate(**inputs, **options), lambda: model(**inputs, **options)):
        with pytest.raises(ValueError, match=message):
            call()
    assert answer(model, inputs).shape == (1, 8)


def test_more_than_the_context_holds_is_refused(folder, processor):
    small = AutoModel.from_pretrained(folder, dtype="float32").eval()
    small.config.text_config.max_position_embeddings = 80
    with pytest.raises(ValueError, match="context"):
        small.generate(**encode(processor, ONE), num_look_close="all", max_new_tokens=1)


def test_smoothing_and_mode_change_the_choice(model, processor):
    inputs = encode(processor, ONE)
    choices = [
        model.generate(**inputs, **options, max_new_tokens=1, output_selection_maps=True).selection_maps[1]
        for options in ({}, {"smooth_selection_prob": True}, {"look_close_mode": "after_image"})
    ]
    assert not torch.equal(choices[0], choices[1])
    assert not torch.equal(choices[0], choices[2])


def test_question_changes_the_choice(model, processor):
    """What is looked at follows the question, which is the point of it."""
    choices = [
        model(**encode(processor, [user(picture(0), text(question))])).top_down_prompt
        for question in ("what is the color of the big sign?", "how many are red?")
    ]
    assert not torch.allclose(*choices)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (3, 2)])
def test_tiny_pictures_are_looked_at(size, model, processor):
    inputs = encode(processor, [user({"type": "image", "image": Image.new("RGB", size, "red")}, text("what?"))])
    assert answer(model, inputs, num_look_close="all").shape == (1, 8)


def test_wrong_pixels_and_placeholders_are_refused(model, processor):
    inputs = encode(processor, ONE)
    small = {**inputs, "pixel_values": inputs["pixel_values"][..., :140, :140]}
    with pytest.raises(ValueError, match="280"):
        model.generate(**small)
    with pytest.raises(ValueError, match="pictures"):
        model.generate(**{**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
    cut = {name: inputs[name][:, 17:] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="placeholders"):
        model.generate(**{**inputs, **cut})


# ----------------------------------------------------------------------------------------------------- saving, drawing


def test_saved_model_loads_with_the_code_beside_it(model, processor, tmp_path):
    saved = tmp_path / "saved-hd"
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    again = AutoModel.from_pretrained(saved, dtype="float32").eval()
    inputs = encode(AutoProcessor.from_pretrained(saved), ONE)
    assert torch.equal(answer(again, inputs), answer(model, inputs))
    assert (saved / "modeling_vila_hd.py").is_file() and (saved / "selection_ps3.py").is_file()


WITHOUT_PACKAGE = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "vila" or name.startswith("vila."):
            raise ImportError("the package must not be needed")

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModel, AutoProcessor

folder, encoder, chat = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="float32").eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, output_selection_maps=True)
image = processor.draw_selection(__import__("PIL.Image").Image.new("RGB", (8, 8)), output.selection_maps)
tower = AutoModel.from_pretrained(encoder, trust_remote_code=True, dtype="float32").eval()
features = tower(torch.zeros(1, 3, 280, 280)).last_hidden_state
new_ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
json.dump({"ids": new_ids, "tokens": features.shape[1], "size": image.size}, sys.stdout)
"""


def test_code_beside_the_weights_answers_without_the_package(folder, model, processor, tmp_path):
    encoder = convert(CASE / "checkpoint" / "vision_tower", tmp_path / "tiny-encoder")
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, str(folder), str(encoder), json.dumps(ONE)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        cwd=tmp_path,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["ids"] == answer(model, encode(processor, ONE))[0].tolist()
    assert (found["tokens"], found["size"]) == (25 + 60, [8, 8])


def test_overlay_shows_what_was_looked_at(model, processor):
    image = Image.new("RGB", (90, 60), "white")
    maps = [torch.zeros(2, 10, 10), torch.zeros(2, 20, 20)]
    maps[0][1, 0, 0] = 1
    maps[1][1, -1, -1] = 1
    drawn = processor.draw_selection(image, maps, index=1)
    assert drawn.size == image.size and drawn.mode == "RGB"
    dimmed, coarse, fine = (drawn.getpixel(place) for place in ((45, 30), (0, 0), (89, 59)))
    assert len({dimmed, coarse, fine}) == 3 and max(dimmed) < max(coarse)
    assert processor.draw_selection(image, [scale[0] for scale in maps]).getpixel((0, 0)) == dimmed
    assert processor.draw_selection(image, None).getpixel((0, 0)) == dimmed
    with pytest.raises(ValueError, match="picture 5"):
        processor.draw_selection(image, maps, index=5)


def test_another_template_ends_the_question_elsewhere(folder, model):
    checkpoint = Checkpoint(folder, "vicuna_v1")
    processor = checkpoint.load_processor()
    ends = checkpoint.load_model(processor, "cpu").config.user_end_ids
    assert processor.tokenizer.decode(ends) == "ASSISTANT:"
    assert processor.tokenizer.decode(model.config.user_end_ids) == "<|im_end|>\n<|im_start|>assistant"


def test_command_line_looks_as_it_is_told(folder, capsys):
    from vila.infer import main, parse_arguments

    base = ["-m", str(folder), "--media", str(CASE / "input_0.png"), "--text", "what?", "--device", "cpu"]
    answers = []
    for look in ([], ["--num-look-close", "all"], ["--num_look_close", "0", "--look-close-mode", "after_image"]):
        main([*base, "--max-new-tokens", "8", *look])
        answers.append(capsys.readouterr().out)
    assert len(set(answers)) == 3
    options = parse_arguments([*base, "--select-num-each-scale", "12+48", "--num-token-look-close", "75"])
    assert (options.select_num_each_scale, options.num_token_look_close) == ([12, 48], 75)
    with pytest.raises(SystemExit):
        main([*base, "--num-look-close", "1", "--num-token-look-close", "1"])


# ----------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def trainable(folder):
    return AutoModel.from_pretrained(folder, dtype="float32").train()


def row(question=ONE, answer="red"):
    return {"messages": [*copy.deepcopy(question), {"role": "assistant", "content": [text(answer)]}]}


BOX_ROW = {"messages": ONE, "boxes": [[(0.2, 0.3, 0.6, 0.9)]]}


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return {
        name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.abs().sum() > 0
    }


def test_selection_loss_reaches_what_chooses_and_nothing_behind(trainable, processor):
    trainable.config.token_selection_loss_weight = 1.0
    trained = gradients(trainable, VilaHDDataCollator(processor)([BOX_ROW]))
    for part in SELECTION_PARTS:
        assert any(name.startswith(part) for name in trained), part
    assert any(name.startswith("model.vision_tower.trunk.blocks") for name in trained)
    assert not any(name.startswith(("model.language_model", "lm_head")) for name in trained)
    assert not any(name.startswith("model.multi_modal_projector.layers") for name in trained)


def test_selection_alone_can_be_trained(trainable, processor):
    trainable.config.token_selection_loss_weight = 1.0
    trained = gradients(train_selection_only(trainable), VilaHDDataCollator(processor)([BOX_ROW]))
    assert trained and all(name.startswith(SELECTION_PARTS) for name in trained)


def test_language_model_loss_reaches_all_but_what_chooses(trainable, processor):
    trained = gradients(trainable, VilaHDDataCollator(processor)([row()]))
    for part in ("lm_head", "model.language_model", "model.multi_modal_projector.layers"):
        assert any(name.startswith(part) for name in trained), part
    for part in ("model.vision_tower.pos_emb_residual", "model.multi_modal_projector.high_res_scale_embed"):
        assert any(name.startswith(part) for name in trained), part
    assert not any(name.startswith(SELECTION_PARTS) for name in trained)


@pytest.mark.parametrize("rows", [[row()], [row(NONE)], [BOX_ROW, row(TWO)]], ids=["picture", "text", "boxes"])
def test_every_weight_that_is_used_has_a_gradient_in_every_step(rows, trainable, processor):
    """Data-parallel processes wait for each other's gradients, whatever their rows hold."""
    trainable.config.token_selection_loss_weight = 1.0
    trainable(**VilaHDDataCollator(processor)(rows)).loss.backward()
    missing = [name for name, weight in trainable.named_parameters() if weight.grad is None]
    assert not [name for name in missing if "blocks.2" not in name], missing


def test_pictures_without_a_target_have_no_selection_loss():
    probs = [torch.rand(2, 4, 4), torch.rand(2, 8, 8)]
    wanted = torch.zeros(2, 16, 16)
    wanted[0, 3:9, 3:9] = 1
    alone = selection_loss([scale[:1] for scale in probs], wanted[:1])
    torch.testing.assert_close(selection_loss(probs, wanted), alone)
    wanted[1] = -1
    torch.testing.assert_close(selection_loss(probs, wanted), alone)
    assert selection_loss(probs, -torch.ones(2, 16, 16)) == 0


def test_boxes_become_maps(processor):
    wanted = box_map([(0.0, 0.5, 0.1, 0.6)], 20, 10)
    assert wanted[10:13, 0:2].all() and wanted.sum() == 6
    assert (box_map(None, 4, 4) == -1).all()
    with pytest.raises(ValueError, match="box"):
        box_map([(0.5, 0.0, 0.1, 1.0)], 4, 4)
    batch = VilaHDDataCollator(processor)([BOX_ROW, row(TWO)])
    assert batch["gt_selection_maps"].shape == (3, SIZE, SIZE)
    assert (batch["gt_selection_maps"][1:] == -1).all()
    assert (batch["labels"][0] == -100).all() and (batch["labels"][1] != -100).any()
    assert "gt_selection_maps" not in VilaHDDataCollator(processor)([row()])


def test_first_look_follows_the_target_in_training_if_asked(trainable, processor):
    trainable.config.select_gt_in_training = True
    batch = VilaHDDataCollator(processor)([BOX_ROW])
    with torch.no_grad():
        chosen = trainable(**batch, num_look_close=1).selection_maps[1][0]
    inside = torch.nn.functional.interpolate(batch["gt_selection_maps"][None], size=(10, 10), mode="area")[0, 0] > 0
    inside = inside.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert inside[chosen > 0].all()


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    return importlib.import_module("train").main


def train_on(train, folder, tmp_path, rows, *options):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    fixed = ["--model", str(folder), "--data", str(file), "--output", str(tmp_path / "out"), "--max_steps", "1"]
    train([*fixed, "--learning_rate", "1e-2", "--save_strategy", "no", "--disable_tqdm", "True", *options])
    return AutoModel.from_pretrained(tmp_path / "out", dtype="float32")


def test_command_learns_where_to_look_from_boxes(train, folder, loaded, tmp_path):
    tuned = train_on(train, folder, tmp_path, [BOX_ROW], "--token_selection_loss_weight", "1")
    changed = {
        name for name, weight in tuned.named_parameters() if not torch.equal(weight, loaded.get_parameter(name))
    }
    for part in SELECTION_PARTS:
        assert any(name.startswith(part) for name in changed), part
    assert not any(name.startswith("model.language_model") for name in changed)
    assert tuned.config.token_selection_loss_weight == 1


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([BOX_ROW], [], "teach nothing"),
        ([row()], ["--token_selection_loss_weight", "-1"], "token_selection_loss_weight"),
        ([row()], ["--packing", "True"], "packed"),
    ],
)
def test_command_refuses_boxes_that_teach_nothing(train, folder, tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        train_on(train, folder, tmp_path, rows, *options)


def test_command_refuses_boxes_of_models_that_do_not_choose(train, converted, tmp_path):
    with pytest.raises(ValueError, match="VILA-HD"):
        train_on(train, converted("nvila_lite_image"), tmp_path, [BOX_ROW])


def test_trainer_lowers_both_losses(trainable, processor, tmp_path):
    trainable.config.token_selection_loss_weight = 1.0
    rows = [row(), BOX_ROW, row(NONE, "left"), row(TWO, "a cat")]
    trainer = Trainer(
        trainable,
        TrainingArguments(
            str(tmp_path),
            remove_unused_columns=False,
            per_device_train_batch_size=4,
            max_steps=6,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
        ),
        data_collator=VilaHDDataCollator(processor),
        train_dataset=rows,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.evaluate(rows)["eval_loss"] > 0
    # pictures and prompts of the batches differ in number: only logits can be gathered
    assert trainer.predict(rows[:1]).predictions.shape[-1] == trainable.config.text_config.vocab_size


def test_packing_and_position_ids_are_refused(model, processor):
    with pytest.raises(ValueError, match="packed"):
        VilaHDDataCollator(processor, packing=True)
    inputs = encode(processor, ONE)
    with pytest.raises(ValueError, match="packed"):
        model(**inputs, position_ids=torch.arange(inputs["input_ids"].shape[1])[None])
