"""VILA-HD: looking at pictures of batches, chats and videos, what is computed once, and options."""

import json
import os
import subprocess
import sys

import pytest
import torch
from chat_requests import encode
from PIL import Image
from transformers import AutoModel, AutoProcessor, DynamicCache, GenerationConfig, pipeline
from vila.conversion_vila import convert
from vila.loading_vila import Checkpoint
from vila_hd_requests import CASE, NONE, ONE, TWO, picture, text, user
from without_package import WITHOUT_PACKAGE


@pytest.fixture(scope="module")
def model(vila_hd_folder):
    return AutoModel.from_pretrained(vila_hd_folder, dtype="float32").eval()


@pytest.fixture(scope="module")
def processor(vila_hd_folder):
    return AutoProcessor.from_pretrained(vila_hd_folder)


LATE = [user(text("hello")), {"role": "assistant", "content": [text("yes?")]}, user(picture(1), text("what is it?"))]


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


def test_pipeline_takes_look_options(vila_hd_folder):
    pipe = pipeline("image-text-to-text", model=str(vila_hd_folder), dtype="float32", device="cpu")
    answers = [
        pipe(text=ONE, max_new_tokens=8, return_full_text=False, generate_kwargs=options)[0]["generated_text"]
        for options in ({"num_look_close": 0}, {"num_look_close": 4})
    ]
    assert answers[0] != answers[1]


def test_bfloat16_answers(vila_hd_folder, processor):
    half = AutoModel.from_pretrained(vila_hd_folder, dtype="bfloat16").eval()
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


def test_a_chat_is_continued_with_the_looks_that_it_was_begun_with(model, processor):
    inputs, cache = encode(processor, ONE), DynamicCache()
    first = model.generate(**inputs, past_key_values=cache, num_look_close=1, max_new_tokens=1)
    assert first.shape[1] == inputs["input_ids"].shape[1] + 1
    whole = encode(processor, [*ONE, {"role": "assistant", "content": [text("red")]}, user(text("and now?"))])
    with pytest.raises(ValueError, match="num_look_close=1"):
        model.generate(**whole, past_key_values=cache, num_look_close=4, max_new_tokens=1)
    assert answer(model, whole, past_key_values=cache).tolist() == answer(model, whole, num_look_close=1).tolist()


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


def test_pictures_one_at_a_time_give_the_same_answer(vila_hd_folder, processor):
    model, inputs = AutoModel.from_pretrained(vila_hd_folder, dtype="float32").eval(), encode(processor, TWO)
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
        {"num_look_close": 1, "select_num_each_scale": [10**6, 10**6]},
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
    ("options", "seen"),
    [
        ({"num_look_close": 1, "select_num_each_scale": [48, 0]}, [48, 0]),
        ({"num_look_close": 1, "select_num_each_scale": [0, 48]}, [0, 48]),
        ({"num_token_look_close": 0}, None),
    ],
    ids=str,
)
def test_budgets_may_be_empty(options, seen, model, processor):
    output = model.generate(**encode(processor, ONE), **options, max_new_tokens=1, output_selection_maps=True)
    maps = output.selection_maps
    assert (seen is None and maps is None) or [int(scale.sum()) for scale in maps] == seen


def test_looks_are_those_of_the_call_then_of_the_generation_config(vila_hd_folder, processor):
    model, inputs = AutoModel.from_pretrained(vila_hd_folder, dtype="float32").eval(), encode(processor, ONE)

    def seen(**options):
        output = model.generate(**inputs, **options, max_new_tokens=1, output_selection_maps=True)
        return sum(int(scale.sum()) for scale in output.selection_maps)

    config = GenerationConfig(num_look_close=1)
    assert seen() == 120
    assert seen(generation_config=config) == 60
    assert seen(generation_config=config, num_token_look_close=10) == 10
    model.generation_config.num_look_close = 3
    assert seen() == 180 and seen(generation_config=config) == 60


def test_the_processor_hands_on_how_to_look(model, processor):
    picture_of = Image.open(CASE / "input_0.png")
    inputs = processor(images=picture_of, text=f"{processor.image_token}what?", return_tensors="pt", num_look_close=1)
    assert inputs["num_look_close"] == 1 and "look_close_mode" not in inputs
    output = model.generate(**inputs.to("cpu"), max_new_tokens=1, output_selection_maps=True)
    assert [int(scale.sum()) for scale in output.selection_maps] == [12, 48]


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


def test_more_than_the_context_holds_is_refused(vila_hd_folder, processor):
    small = AutoModel.from_pretrained(vila_hd_folder, dtype="float32").eval()
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


@pytest.mark.parametrize("shape", [(3, 280, 280), (280, 280)])
def test_wrong_maps_are_refused(shape, model, processor):
    with pytest.raises(ValueError, match="a map for every picture"):
        model(**encode(processor, ONE), gt_selection_maps=torch.ones(shape))


def test_saved_model_loads_with_the_code_beside_it(model, processor, tmp_path):
    saved = tmp_path / "saved-hd"
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    again = AutoModel.from_pretrained(saved, dtype="float32").eval()
    inputs = encode(AutoProcessor.from_pretrained(saved), ONE)
    assert torch.equal(answer(again, inputs), answer(model, inputs))
    assert (saved / "modeling_vila_hd.py").is_file() and (saved / "selection_ps3.py").is_file()


LOOK_AND_ENCODE = """
import json
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


def test_code_beside_the_weights_answers_without_the_package(vila_hd_folder, model, processor, tmp_path):
    encoder = convert(CASE / "checkpoint" / "vision_tower", tmp_path / "tiny-encoder")
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE + LOOK_AND_ENCODE, str(vila_hd_folder), str(encoder), json.dumps(ONE)],
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


def test_another_template_ends_the_question_elsewhere(vila_hd_folder, model):
    checkpoint = Checkpoint(vila_hd_folder, "vicuna_v1")
    processor = checkpoint.load_processor()
    ends = checkpoint.load_model(processor, "cpu").config.user_end_ids
    assert processor.tokenizer.decode(ends) == "ASSISTANT:"
    assert processor.tokenizer.decode(model.config.user_end_ids) == "<|im_end|>\n<|im_start|>assistant"


def test_command_line_looks_as_it_is_told(vila_hd_folder, capsys):
    from vila.infer import main, parse_arguments

    base = ["-m", str(vila_hd_folder), "--media", str(CASE / "input_0.png"), "--text", "what?", "--device", "cpu"]
    answers = []
    for look in ([], ["--num-look-close", "all"], ["--num_look_close", "0", "--look-close-mode", "after_image"]):
        main([*base, "--max-new-tokens", "8", *look])
        answers.append(capsys.readouterr().out)
    assert len(set(answers)) == 3
    options = parse_arguments([*base, "--select-num-each-scale", "12+48", "--num-token-look-close", "75"])
    assert (options.select_num_each_scale, options.num_token_look_close) == ([12, 48], 75)
    with pytest.raises(SystemExit):
        main([*base, "--num-look-close", "1", "--num-token-look-close", "1"])
