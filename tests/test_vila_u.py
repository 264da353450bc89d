"""VILA-U: drawing, its options and its errors; understanding beside it; conversion and saving."""

import json
import math
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, VILA_U_CASE
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sparse import write_shards, write_sparse
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessorList,
    SiglipConfig,
    SiglipModel,
    pipeline,
)
from vila import VilaUConfig
from vila.conversion_vila import convert
from vila.generation_vila_u import VilaUPictureStreamer
from vila.original_config_vila_u import SIGLIP_CONFIGS, siglip_config
from vila.quantization_vila import Int4Linear
from vila.quantize.checkpoint import quantize
from vila.quantize.options import Options

CASE = VILA_U_CASE
PROMPTS = ["A snowy mountain.", "Fireworks in the air, over a river, at night.", "Cats."]
LIKELIEST = {"do_sample": False}


def noise_picture(seed, size=(60, 60)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def user(*content):
    blocks = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return [{"role": "user", "content": blocks}]


@pytest.fixture
def folder(vila_u_folder):
    return vila_u_folder


@pytest.fixture
def model(vila_u_model):
    return vila_u_model


@pytest.fixture
def processor(vila_u_processor):
    return vila_u_processor


@pytest.fixture
def language_model_inputs(model):
    """The shapes of what the language model is given, call by call."""
    shapes = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    yield shapes
    hook.remove()


def draw(model, processor, prompts, mode="image", negative_text=None, **options):
    inputs = processor(text=prompts, generation_mode=mode, negative_text=negative_text, return_tensors="pt")
    return model.generate(**inputs, generation_mode=mode, **{**LIKELIEST, **options})


def encode(processor, chat, **options):
    return processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


# ---------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("scale", [1, 3.0])
def test_prompts_in_a_batch_are_drawn_as_alone(model, processor, scale):
    together = draw(model, processor, PROMPTS, guidance_scale=scale)
    for row, prompt in enumerate(PROMPTS):
        alone = draw(model, processor, [prompt], guidance_scale=scale)
        assert torch.equal(together.sequences[row], alone.sequences[0])
        torch.testing.assert_close(together.pixel_values[row], alone.pixel_values[0], atol=1e-5, rtol=0)
    assert len({codes.numpy().tobytes() for codes in together.sequences}) == len(PROMPTS)


def test_drawing_equals_a_plain_loop_without_any_cache(model, processor):
    """Position by position, everything so far computed anew, the depth transformer's teacher-forced pass included."""
    inputs = processor(text=PROMPTS[:1], generation_mode="image", return_tensors="pt")
    base, scale, count = model.model, 2.5, 6
    branches = [inputs["input_ids"], inputs["negative_prompt_ids"]]
    embeds = [base.embed_text(ids) for ids in branches]
    drawn = []
    with torch.no_grad():
        for _ in range(count):
            hidden = [base.language_model(inputs_embeds=e).last_hidden_state[:, -1] for e in embeds]
            codes = torch.zeros(1, model.config.code_depth, dtype=torch.long)
            for depth in range(model.config.code_depth):
                given = base.quantizer.embed(codes)
                prompted, negative = (base.depth_transformer(h, given)[:, depth] for h in hidden)
                codes[:, depth] = (negative + scale * (prompted - negative)).argmax(-1)
            drawn.append(codes)
            new = base.multi_modal_projector(base.quantizer.embed(codes).sum(-2).unsqueeze(1))
            embeds = [torch.cat([e, new], dim=1) for e in embeds]
    output = draw(model, processor, PROMPTS[:1], guidance_scale=scale)
    assert torch.equal(output.sequences[:, :count], torch.stack(drawn, dim=1))


def test_prompts_are_prefilled_once_for_all_samples(model, processor, language_model_inputs):
    draw(model, processor, PROMPTS[:2], num_return_sequences=3, guidance_scale=3.0)
    prefill, *steps = language_model_inputs
    # two prompts and the one negative prompt that they share
    assert prefill[0] == 3
    assert set(steps) == {(2 * 2 * 3, 1)}
    assert len(steps) == model.config.num_tile_tokens - 1


def test_without_guidance_the_negative_prompt_is_not_run(model, processor, language_model_inputs):
    inputs = processor(text=PROMPTS[:2], generation_mode="image", return_tensors="pt")
    del inputs["negative_prompt_ids"], inputs["negative_prompt_attention_mask"]
    model.generate(**inputs, generation_mode="image", guidance_scale=1, **LIKELIEST)
    assert {rows for rows, _ in language_model_inputs} == {2}


def test_depth_transformer_computes_one_position_at_a_time(model, processor):
    lengths = []
    layer = model.model.depth_transformer.layers[0]
    hook = layer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    draw(model, processor, PROMPTS[:1])
    hook.remove()
    assert lengths == [1] * model.config.num_tile_tokens * model.config.code_depth


def test_only_samples_are_decoded_a_few_frames_at_a_time(model, processor, monkeypatch):
    monkeypatch.setattr(model.config, "vision_chunk_size", 3)
    sizes = []
    hook = model.model.pixel_decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    output = draw(model, processor, PROMPTS[:2], mode="video", num_frames=2)
    hook.remove()
    assert sizes == [3, 1]
    assert output.pixel_values.shape == (2, 2, 3, 64, 64)
    frames = output.sequences.unflatten(1, (2, -1))
    monkeypatch.setattr(model.config, "vision_chunk_size", None)
    torch.testing.assert_close(model.decode_codes(frames), output.pixel_values, atol=1e-5, rtol=0)


def test_first_frame_of_a_shorter_video_is_the_same(model, processor):
    one, two = (draw(model, processor, PROMPTS[:1], mode="video", num_frames=frames) for frames in (1, 2))
    assert torch.equal(one.sequences[0], two.sequences[0, : model.config.num_tile_tokens])
    assert one.pixel_values.shape == (1, 1, 3, 64, 64)


def test_negative_text_changes_what_guidance_leaves(model, processor):
    plain = draw(model, processor, PROMPTS[:2], guidance_scale=4.0)
    shared = draw(model, processor, PROMPTS[:2], negative_text="blurry", guidance_scale=4.0)
    apart = draw(model, processor, PROMPTS[:2], negative_text=["blurry", ""], guidance_scale=4.0)
    assert not torch.equal(plain.sequences, shared.sequences)
    assert torch.equal(apart.sequences[0], shared.sequences[0])
    assert torch.equal(apart.sequences[1], plain.sequences[1])
    unguided = draw(model, processor, PROMPTS[:1], negative_text="blurry", guidance_scale=1)
    assert torch.equal(unguided.sequences, draw(model, processor, PROMPTS[:1], guidance_scale=1).sequences)


def test_samples_differ_and_a_generator_repeats_them(model, processor):
    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return draw(
            model, processor, PROMPTS[:1], num_return_sequences=3, do_sample=True, generator=generator
        ).sequences

    first = sample(1)
    assert torch.equal(first, sample(1))
    assert not torch.equal(first, sample(2))
    assert len({codes.numpy().tobytes() for codes in first}) == 3


def test_global_seed_is_untouched_by_a_generator_and_used_without_one(model, processor):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    draw(model, processor, PROMPTS[:1], do_sample=True, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.rand(1), expected)
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(draw(model, processor, PROMPTS[:1], do_sample=True).sequences)
    assert torch.equal(*runs)


def test_defaults_of_the_release_are_the_checkpoints(model, folder):
    drawing = json.loads((folder / "generation_config.json").read_text())["drawing"]
    # the release keeps 900 of 16384 codes; this codebook has 64
    assert drawing == {"do_sample": True, "guidance_scale": 3.0, "temperature": 1.0, "top_k": 64, "top_p": 0.96}
    sampling, scale = model._sampling()
    assert scale == 3.0 and sampling.do_sample
    logits = torch.randn(3, 64)
    explicit = model._sampling(temperature=1.0, top_k=64, top_p=0.96)[0]
    assert torch.equal(sampling.probabilities(logits), explicit.probabilities(logits))


@pytest.mark.parametrize(
    ("drawing", "message"),
    [
        (["top_k"], "drawing may hold"),
        ({"beams": 2}, "drawing may hold"),
        ({"top_k": "many"}, "top_k"),
        ({"top_k": 65}, "top_k"),
        ({"temperature": "hot"}, "temperature"),
        ({"guidance_scale": [3]}, "guidance_scale"),
    ],
    ids=str,
)
def test_checkpoints_defaults_without_sense_are_refused(model, processor, monkeypatch, drawing, message):
    monkeypatch.setattr(model.generation_config, "drawing", drawing)
    inputs = processor(text=PROMPTS[:1], generation_mode="image", return_tensors="pt")
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, generation_mode="image")


def test_options_of_a_call_win_over_a_config(model, processor):
    config = GenerationConfig(top_k=1, do_sample=True)
    likeliest = draw(model, processor, PROMPTS[:1])
    by_config = draw(model, processor, PROMPTS[:1], generation_config=config, do_sample=None)
    assert torch.equal(by_config.sequences, likeliest.sequences)
    torch.manual_seed(0)
    by_call = draw(model, processor, PROMPTS[:1], generation_config=config, do_sample=True, top_k=64)
    assert not torch.equal(by_call.sequences, likeliest.sequences)


def test_further_filters_are_applied(model, processor):
    def only_code_five(ids, scores):
        return torch.full_like(scores, -math.inf).index_fill(1, torch.tensor(5), 0.0)

    filters = LogitsProcessorList([only_code_five])
    output = draw(model, processor, PROMPTS[:1], do_sample=True, logits_processor=filters)
    assert (output.sequences == 5).all()


class Rows:
    def __init__(self):
        self.rows, self.ended = [], False

    def put(self, codes):
        self.rows.append(codes)

    def end(self):
        self.ended = True


def test_streamer_is_given_every_row_as_it_is_drawn(model, processor):
    streamer = Rows()
    output = draw(model, processor, PROMPTS[:2], mode="video", num_frames=2, streamer=streamer)
    rows, columns = model.config.code_grid
    assert len(streamer.rows) == 2 * rows and streamer.ended
    assert all(row.shape == (2, columns, model.config.code_depth) for row in streamer.rows)
    assert torch.equal(torch.cat(streamer.rows, dim=1), output.sequences)


def test_picture_streamer_shows_ever_more_rows_and_in_the_end_the_picture(model, processor):
    shown = []
    output = draw(model, processor, PROMPTS[:1], streamer=VilaUPictureStreamer(model, shown.append))
    assert [pixels.shape for pixels in shown] == [(1, 3, 8 * rows, 64) for rows in range(1, 9)]
    torch.testing.assert_close(shown[-1], output.pixel_values, atol=1e-5, rtol=0)


def test_picture_streamer_begins_anew_with_every_frame(model, processor):
    shown = []
    streamer = VilaUPictureStreamer(model, shown.append)
    output = draw(model, processor, PROMPTS[:1], mode="video", num_frames=2, streamer=streamer)
    assert [pixels.shape[2] for pixels in shown] == [8 * rows for rows in range(1, 9)] * 2
    torch.testing.assert_close(torch.stack([shown[7], shown[15]], dim=1), output.pixel_values, atol=1e-5, rtol=0)


def test_padding_in_front_of_a_prompt_takes_no_positions(model, processor):
    positions = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    inputs = processor(text=PROMPTS[:2], generation_mode="image", return_tensors="pt")
    model.generate(**inputs, generation_mode="image", **LIKELIEST)
    hook.remove()
    lengths = [*inputs["attention_mask"].sum(1).tolist(), inputs["negative_prompt_attention_mask"].sum().item()]
    assert len(set(lengths)) == 3
    assert positions[0][:, -1].tolist() == [length - 1 for length in lengths]
    negative = lengths[2] + len(positions) - 2
    assert positions[-1][:, 0].tolist() == [n + len(positions) - 2 for n in lengths[:2]] + [negative] * 2


def test_picture_in_the_prompt_is_seen(model, processor):
    def codes(seed):
        inputs = encode(processor, user(noise_picture(seed), "Draw it again."), generation_mode="image")
        return model.generate(**inputs, generation_mode="image", guidance_scale=1, **LIKELIEST).sequences

    assert not torch.equal(codes(1), codes(2))


def test_half_precision_draws(folder, processor):
    half = AutoModel.from_pretrained(folder, dtype="bfloat16").eval()
    output = draw(half, processor, PROMPTS[:1], num_return_sequences=2)
    assert output.pixel_values.dtype == torch.bfloat16 and output.pixel_values.isfinite().all()
    pictures = processor.post_process_multimodal_output(output.pixel_values, generation_mode="image")
    assert [picture.size for picture in pictures] == [(64, 64)] * 2


# -------------------------------------------------------------------------------------------------- codes and pixels


def test_codes_of_a_picture_decode_to_what_its_features_decode_to(model, processor):
    pixels = processor.image_processor(noise_picture(1), return_tensors="pt")["pixel_values"]
    codes = model.encode_image(pixels)
    assert codes.shape == (1, 64, 4) and codes.dtype == torch.int64
    with torch.no_grad():
        tower = model.model.vision_tower(pixel_values=pixels).last_hidden_state
        quantised, _ = model.model.quantizer(tower)
        expected = model.model.decode_features(quantised)
    torch.testing.assert_close(model.decode_codes(codes), expected, atol=1e-4, rtol=0)


def test_every_depth_quantises_what_is_left(model):
    features = model.model.quantizer.codebooks[0].weight[:9].detach() * 1.3
    quantised, codes = model.model.quantizer(features)
    embeddings = model.model.quantizer.embed(codes)
    table, residual = model.model.quantizer.codebooks[0].weight[:64].detach(), features
    for depth in range(4):
        nearest = torch.cdist(residual, table).argmin(-1)
        assert torch.equal(codes[:, depth], nearest)
        residual = residual - embeddings[:, depth]
    torch.testing.assert_close(features - residual, quantised)


def test_gradient_passes_straight_through_the_quantiser(model):
    features = torch.randn(5, 64, requires_grad=True)
    weights = torch.randn(5, 64)
    (model.model.quantizer(features)[0] * weights).sum().backward()
    assert torch.equal(features.grad, weights)
    assert all(book.weight.grad is None for book in model.model.quantizer.codebooks)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(64, 4, dtype=torch.long), "must be"),
        (torch.zeros(1, 63, 4, dtype=torch.long), "must be"),
        (torch.zeros(1, 64, 3, dtype=torch.long), "must be"),
        (torch.zeros(0, 64, 4, dtype=torch.long), "must be"),
        (torch.zeros(1, 128, 4, dtype=torch.long), "frames"),
        (torch.zeros(1, 64, 4), "whole numbers"),
        (torch.full((1, 64, 4), 64), "0 to 63, got 64"),
        (torch.full((1, 64, 4), -1), "0 to 63, got -1"),
    ],
    ids=str,
)
def test_codes_that_cannot_be_decoded_are_refused(model, codes, message):
    with pytest.raises(ValueError, match=message):
        model.decode_codes(codes)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 32, 64)])
def test_pixels_that_cannot_be_encoded_are_refused(model, shape):
    with pytest.raises(ValueError, match="pixel_values must be"):
        model.encode_image(torch.zeros(shape))


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 0}, "guidance_scale"),
        ({"guidance_scale": -1.5}, "guidance_scale"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"guidance_scale": math.inf}, "guidance_scale"),
        ({"guidance_scale": "3"}, "guidance_scale"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"num_return_sequences": 1.5}, "num_return_sequences"),
        ({"top_k": 65}, "top_k must be 1 to 64"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"num_frames": 2}, "num_frames is for"),
        ({"num_beams": 2}, "num_beams"),
        ({"generation_mode": "audio"}, "unknown generation_mode 'audio'; known are text, image, video"),
        ({"generation_mode": "video"}, "must end with"),
        ({"input_ids": None}, "drawing needs input_ids"),
        ({"negative_prompt_ids": None}, "drawing needs negative_prompt_ids"),
        ({"attention_mask": torch.ones(1, 3)}, "its mask"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_drawing_without_sense_is_refused(model, processor, options, message):
    inputs = processor(text=PROMPTS[:1], generation_mode="image", return_tensors="pt")
    with pytest.raises(ValueError, match=message):
        model.generate(**{**inputs, "generation_mode": "image", **options})


@pytest.mark.parametrize("frames", [0, -1, 2.0, True, 10**9])
def test_number_of_frames_without_sense_is_refused(model, processor, frames):
    with pytest.raises(ValueError, match="num_frames"):
        draw(model, processor, PROMPTS[:1], mode="video", num_frames=frames)


def test_prompt_beyond_the_context_is_refused(model, processor):
    with pytest.raises(ValueError, match="exceed the 4096"):
        draw(model, processor, ["word " * 5000])
    with pytest.raises(ValueError, match="fewer frames"):
        draw(model, processor, PROMPTS[:1], mode="video", num_frames=64)


def test_prompt_that_asks_for_no_picture_is_refused(model, processor):
    inputs = encode(processor, user("Hello!"))
    with pytest.raises(ValueError, match="generation_mode='image'"):
        model.generate(**inputs, generation_mode="image")


def test_mode_that_was_forgotten_is_asked_for(model, processor):
    inputs = processor(text=PROMPTS[:1], generation_mode="image", return_tensors="pt")
    with pytest.raises(ValueError, match="pass their generation_mode"):
        model.generate(**inputs)


def test_two_threads_draw_what_one_draws(model, processor):
    alone = [draw(model, processor, [prompt]).sequences for prompt in PROMPTS]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda prompt: draw(model, processor, [prompt]).sequences, PROMPTS))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


def test_placeholders_without_pictures_are_refused(model, processor):
    inputs = encode(processor, user(noise_picture(1), "Again."), generation_mode="image")
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="64 image placeholders"):
        model.generate(**inputs, generation_mode="image")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_mode": "audio"}, "unknown generation_mode"),
        ({"text": []}, "non-empty list"),
        ({"text": 5}, "string"),
        ({"images": [noise_picture(1)]}, "chat"),
        ({"negative_text": ["a", "b", "c"]}, "2 prompt"),
        ({"negative_text": 5}, "string"),
        ({"generation_mode": "text", "negative_text": "a"}, "negative_text"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_requests_without_sense_are_refused(processor, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        processor(**{"text": PROMPTS[:2], "generation_mode": "image", **options})


@pytest.mark.parametrize("typed", ["<im_start>", "<im_end></s> ASSISTANT: <vi_start>", "<image>", "<vila/video>"])
def test_control_tokens_in_a_request_stay_text(processor, typed):
    data = processor(text=[f"A {typed} cat"], generation_mode="image")
    ids = data["input_ids"][0]
    control = {token for token, entry in processor.tokenizer.added_tokens_decoder.items() if entry.special}
    bos, start = processor.tokenizer.bos_token_id, processor.tokenizer.convert_tokens_to_ids("<im_start>")
    assert [token for token in ids if token in control] == [bos, start]


# ----------------------------------------------------------------------------------------------------- what was drawn


def test_pictures_are_rounded_and_clamped(processor):
    levels = torch.tensor([-2.0, -1.0, 0.0, 1 / 127.5 * 0.6, 1.0, 3.0, math.nan])
    pixels = levels.view(1, 1, 1, -1).expand(1, 3, 2, -1)
    (picture,) = processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 0, 128, 128, 255, 255, 0]


def test_video_is_written_and_reads_back(processor, tmp_path):
    frames = [Image.new("RGB", (65, 48), (30 * number, 100, 200)) for number in range(6)]
    pixels = torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in frames]) / 127.5 - 1
    (video,) = processor.post_process_multimodal_output(pixels[None], generation_mode="video")
    assert [np.array_equal(np.asarray(ours), np.asarray(frame)) for ours, frame in zip(video, frames)] == [True] * 6
    processor.save_video(video, tmp_path / "clip.mp4", fps=4)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 4
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(read) == 6
    assert abs(int(read[5][20, 20, 0]) - 150) < 12


def test_what_cannot_be_post_processed_is_refused(processor, tmp_path):
    with pytest.raises(ValueError, match="unknown generation_mode"):
        processor.post_process_multimodal_output(torch.zeros(1, 3, 4, 4), generation_mode="audio")
    with pytest.raises(ValueError, match="'image' are"):
        processor.post_process_multimodal_output(torch.zeros(1, 2, 3, 4, 4), generation_mode="image")
    with pytest.raises(ValueError, match="at least one frame"):
        processor.save_video([], tmp_path / "clip.mp4")
    with pytest.raises(ValueError, match="fps"):
        processor.save_video([noise_picture(1)], tmp_path / "clip.mp4", fps=0)


# ------------------------------------------------------------------------------------------------------ understanding


def test_answers_in_a_batch_equal_those_alone(model, processor):
    chats = [
        user("Hello!"),
        user(noise_picture(1), "What is this?"),
        user("First:", noise_picture(2), "then", noise_picture(3), "Compare."),
    ]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": []}
    inputs = encode(processor, chats)
    together = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for row, chat in enumerate(chats):
        alone = encode(processor, chat)
        assert torch.equal(model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :], together[row])


def test_pipeline_answers(folder):
    pipe = pipeline("image-text-to-text", model=str(folder), dtype="float32")
    answer = pipe(text=user(noise_picture(1), "What is this?"), max_new_tokens=4, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)


def test_text_between_pictures_starts_with_a_blank_of_its_own(processor):
    tokenizer = processor.tokenizer
    ids = encode(processor, user(noise_picture(1)))["input_ids"][0].tolist()
    behind = ids[len(ids) - ids[::-1].index(processor.image_token_id) :]
    # a turn is stripped: the picture's line break goes, and " ASSISTANT:" follows
    assert tokenizer.convert_ids_to_tokens(behind)[:2] == ["\u2581", "\u2581A"]


def test_system_prompt_can_be_left_out(processor):
    chat = [{"role": "system", "content": ""}, *user("Hello!")]
    tokens = processor.tokenizer.convert_ids_to_tokens(encode(processor, chat)["input_ids"][0].tolist())
    assert tokens[:3] == ["<s>", "\u2581", "\u2581U"]


# --------------------------------------------------------------------------------------------- conversion and saving


def test_conversion_names_only_what_is_loaded(folder):
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(CASE.folder / "checkpoint" / "vision_tower" / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    left_out = stored - set(names)
    assert any("text_model" in name for name in left_out)
    assert {name for name in names if "codebooks" in name} == {"rqvaesiglip.quantizer.codebooks.0.weight"}
    assert not [name for name in names if "ema" in name or "logit_" in name]
    assert (folder / "vision_tower-model.safetensors").is_symlink()


def test_nothing_is_missing_or_unexpected(folder):
    _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


PARTS = ("vision_tower", "language_model", "quantizer", "depth_transformer", "pixel_decoder")


@pytest.mark.parametrize("offloaded", PARTS)
def test_part_that_lies_on_disk_changes_nothing(folder, model, processor, tmp_path, offloaded):
    places = dict.fromkeys([f"model.{part}" for part in (*PARTS, "multi_modal_projector")] + ["lm_head"], "cpu")
    places[f"model.{offloaded}"] = "disk"
    spread = AutoModel.from_pretrained(folder, dtype="float32", device_map=places, offload_folder=tmp_path)
    output = draw(spread, processor, PROMPTS[:1])
    assert torch.equal(output.sequences, draw(model, processor, PROMPTS[:1]).sequences)
    pixels = processor.image_processor(noise_picture(1), return_tensors="pt")["pixel_values"]
    assert torch.equal(spread.encode_image(pixels), model.encode_image(pixels))


def test_layers_behind_the_selected_one_are_not_built(model):
    assert len(model.model.vision_tower.encoder.layers) == model.config.vision_config.num_hidden_layers - 1


def test_copy_is_self_contained_and_without_what_is_not_used(tmp_path, model):
    target = convert(CASE.folder / "checkpoint", tmp_path / "copied_u", copy=True)
    stored = {name for file in target.glob("*.safetensors") for name in load_file(file)}
    assert not [name for name in stored if "text_model" in name or "ema" in name or "codebooks.1" in name]
    copied = AutoModel.from_pretrained(target, dtype="float32")
    for name, weight in model.state_dict().items():
        assert torch.equal(copied.state_dict()[name], weight), name


@pytest.mark.parametrize("original_names", [True, False])
def test_saved_model_loads_and_has_the_originals_names(model, processor, tmp_path, original_names):
    target = tmp_path / f"saved_u_{original_names}"
    model.save_pretrained(target, save_original_format=original_names)
    processor.save_pretrained(target)
    loaded = AutoModel.from_pretrained(target, dtype="float32")
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    stored = load_file(target / "model.safetensors")
    model.load_state_dict(stored)  # as Trainer does it
    if original_names:
        parts = {"llm": "llm.", "vision_tower": "vision_tower.vision_tower.", "mm_projector": "mm_projector."}
        original = {
            prefix + name
            for part, prefix in parts.items()
            for name in load_file(CASE.folder / "checkpoint" / part / "model.safetensors")
        }
        assert set(stored) - {"lm_head.weight"} <= original  # the same in both spellings
    assert draw(loaded, AutoProcessor.from_pretrained(target), PROMPTS[:1]).sequences.shape == (1, 64, 4)


def test_conversion_in_place_links_nothing_and_copies_nothing(tmp_path):
    source = shutil.copytree(CASE.folder / "checkpoint", tmp_path / "in_place_u")
    weights = {path: path.stat().st_ino for path in source.rglob("*.safetensors")}
    assert convert(source, in_place=True) == source
    assert {path: path.stat().st_ino for path in source.rglob("*.safetensors")} == weights
    _, info = AutoModel.from_pretrained(source, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert json.loads((source / "original_files" / "config.json").read_text())["model_type"] == "vila_u_llama"


def test_int4_language_model_draws_and_the_rest_is_left_alone(folder, model, processor, tmp_path):
    small = quantize(folder, tmp_path / "int4_u", Options(method="rtn", group_size=32, head_bits=16))
    loaded = AutoModel.from_pretrained(small, dtype="bfloat16")
    parts = {name.split(".")[1] for name, module in loaded.named_modules() if isinstance(module, Int4Linear)}
    assert parts == {"language_model"}
    depth = loaded.model.depth_transformer.head.weight
    assert torch.equal(depth, model.model.depth_transformer.head.weight.bfloat16())
    assert draw(loaded, AutoProcessor.from_pretrained(small), PROMPTS[:1]).pixel_values.isfinite().all()


def edited(tmp_path, file, change):
    """A copy of the original with one JSON file changed."""
    source = tmp_path / "original_u"
    shutil.copytree(CASE.folder / "checkpoint", source)
    path = source / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return source


def put(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


TOWER = "vision_tower/config.json"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", put("image_aspect_ratio", value="anyres"), "image_aspect_ratio"),
        ("llm/config.json", put("model_type", value="gpt2"), "model_type"),
        (TOWER, put("rqvaesiglip", value=None), "rqvaesiglip is missing"),
        (TOWER, lambda content: content["rqvaesiglip"].pop("n_embed"), "n_embed"),
        (TOWER, put("rqvaesiglip", "n_embed", value=65), "shape"),
        (TOWER, put("rqvaesiglip", "n_embed", value="many"), "codebook_size"),
        (TOWER, put("rqvaesiglip", "code_shape", value=[4, 4, 4]), "code_shape"),
        (TOWER, put("rqvaesiglip", "pretrained_model", value="google/siglip2"), "pretrained_model"),
        (TOWER, put("rqvaesiglip", "shared_codebook", value=False), None),
        (TOWER, put("rqvaesiglip", "ddconfig", "ch", value=33), "decoder_channels"),
        (TOWER, put("rqtransformer", "head", "block", "n_head", value=5), "depth_num_heads"),
        (TOWER, put("rqtransformer", "head", "n_layer", value=10**9), "depth_num_layers"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_checkpoints_without_sense_are_refused_by_name(tmp_path, file, change, message):
    source = edited(tmp_path, file, change)
    if message is None:
        unshared = AutoModel.from_pretrained(convert(source, tmp_path / "unshared_u"), dtype="float32")
        assert len(unshared.model.quantizer.codebooks) == 4
        return
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_missing_weight_is_named(tmp_path):
    source = tmp_path / "original_u"
    shutil.copytree(CASE.folder / "checkpoint", source)
    file = source / "vision_tower" / "model.safetensors"
    weights = load_file(file)
    del weights["rqtransformer.pos_emb_d"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="position_embedding"):
        convert(source, tmp_path / "target")


@pytest.mark.parametrize("name", ["google/siglip-large-patch16-256", "google/siglip-so400m-patch14-384"])
def test_released_towers_are_known_without_a_download(name, tmp_path):
    config = VilaUConfig(vision_config=siglip_config(name, tmp_path))
    assert config.code_grid == {"large": (16, 16), "so400m": (27, 27)}[name.split("-")[1]]


def test_other_templates_are_refused(tmp_path):
    with pytest.raises(ValueError, match="vicuna_v1"):
        convert(CASE.folder / "checkpoint", tmp_path / "target", conv_mode="qwen2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 0}, "codebook_size"),
        ({"code_depth": 65}, "code_depth"),
        ({"depth_dropout": 1.0}, "depth_dropout"),
        ({"depth_dropout": math.nan}, "depth_dropout"),
        ({"decoder_latent_shape": [6]}, "decoder_latent_shape"),
        ({"decoder_latent_shape": [10**6, 10**6]}, "decoder_latent_shape"),
        ({"decoder_num_res_blocks": 10**6}, "decoder_num_res_blocks"),
        ({"decoder_channel_multipliers": []}, "decoder_channel_multipliers"),
        ({"projector_type": "mlp_downsample"}, "downsampling"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "SigLIP"),
        ({"video_pool_sizes": [[8, 1, 1]]}, "pooling"),
    ],
    ids=str,
)
def test_options_without_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VilaUConfig(**options)


# ------------------------------------------------------------------------------------------------------- the ways in

WITHOUT_PACKAGE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "vila" or name.startswith("vila."):
            raise ImportError("the package must not be needed")
sys.meta_path.insert(0, Refuse())
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="float32")
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = processor(text=["A snowy mountain."], generation_mode="image", return_tensors="pt")
drawn = model.generate(**inputs, generation_mode="image", do_sample=False)
processor.post_process_multimodal_output(drawn.pixel_values, generation_mode="image")[0].save(sys.argv[2])
"""


def test_code_beside_the_weights_draws_without_the_package(folder, tmp_path, model, processor):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(folder), str(tmp_path / "drawn.png")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    output = draw(model, processor, ["A snowy mountain."])
    (picture,) = processor.post_process_multimodal_output(output.pixel_values, generation_mode="image")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "drawn.png")), np.asarray(picture))


def test_command_draws_pictures_and_videos_from_an_original(tmp_path, capsys, monkeypatch):
    from vila import loading_vila
    from vila.infer import main

    monkeypatch.setattr(loading_vila, "HF_HOME", str(tmp_path / "hf"))
    common = ["--model_path", str(CASE.folder / "checkpoint"), "--save_path", str(tmp_path / "out"), "--device", "cpu"]
    prompt = ["--prompt", "A snowy mountain.", "--dtype", "float32", "--temperature", "0", "--cfg", "3.0"]
    main([*common, *prompt, "--generation_nums", "2", "--video_generation", "False"])
    lines = capsys.readouterr().out.split()
    assert lines == [str(tmp_path / "out" / f"image_{number}.png") for number in range(2)]
    expected = CASE.tensors["pixels_0_255"][0].round().permute(1, 2, 0).numpy()
    drawn = np.asarray(Image.open(lines[1])).astype(float)
    assert np.abs(drawn - expected).max() <= 1
    main([*common, *prompt, "--video_generation", "True", "-nf", "2"])
    (line,) = capsys.readouterr().out.split()
    with av.open(line) as container:
        assert len(list(container.decode(video=0))) == 2
    noise_picture(1).save(tmp_path / "photo.png")
    main([*common[:2], "--image_path", str(tmp_path / "photo.png"), "--query", "What?", "--max-new-tokens", "3"])
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize(
    "arguments",
    [["--prompt", "a", "--query", "b"], ["--prompt", "a", "--cfg", "0"], ["--prompt", "a", "--cfg", "nan"],
     ["--prompt", "a", "--generation_nums", "0"], ["--prompt", "a", "--video_generation", "maybe"]],
    ids=str,
)  # fmt: skip
def test_command_refuses_what_makes_no_sense(arguments, capsys):
    from vila.infer import main

    with pytest.raises(SystemExit) as error:
        main(["--model_path", "nowhere", *arguments])
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_command_says_which_checkpoints_cannot_draw(converted):
    from vila.infer import main

    with pytest.raises(SystemExit, match="cannot draw"):
        main(["--model_path", str(converted("nvila_lite_image")), "--prompt", "a"])


# ------------------------------------------------------------------------------------------------------- the real size

# sizes of vila-u-7b-256, as far as they are known
LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32004, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "rope_scaling": {"type": "linear", "factor": 2.0},
}  # fmt: skip
TOWER_7B = {
    "model_type": "rqvaesigliptransformer_model",
    "hidden_size": 1024,
    "rqvaesiglip": {
        "n_embed": 16384, "embed_dim": 1024, "code_shape": [16, 16, 4], "latent_shape": [16, 16, 1024],
        "shared_codebook": True, "decoder_latent_shape": None, "pretrained_model": "google/siglip-large-patch16-256",
        "ddconfig": {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16],
                     "resolution": 256, "z_channels": 256, "out_ch": 3},
    },
    "rqtransformer": {"embed_dim": 2560, "head": {"n_layer": 6, "block": {"n_head": 40}}, "vocab_size": 16384},
}  # fmt: skip
SPELLINGS = {
    "code_projection": "in_mlp_1", "hidden_projection": "in_mlp_2", "position_embedding": "pos_emb_d",
    "layers": "head_transformer.blocks", "pre_attention_norm": "ln1", "pre_mlp_norm": "ln2", "attention": "attn",
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "proj", "norm": "classifier_mlp.layer_norm",
    "head": "classifier_mlp.linear",
}  # fmt: skip


def shapes_of(module, prefix=""):
    return {prefix + name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def released_tower():
    """Names and shapes in the tower's file of the release."""
    from vila.codes_vila_u import VilaUPixelDecoder
    from vila.depth_transformer_vila_u import VilaUDepthTransformer

    siglip = SIGLIP_CONFIGS["google/siglip-large-patch16-256"]
    with torch.device("meta"):
        config = VilaUConfig(vision_config=siglip_config("google/siglip-large-patch16-256", Path()))
        whole = SiglipModel(SiglipConfig(vision_config=siglip, text_config={**siglip, "vocab_size": 32000}))
        shapes = shapes_of(whole, "rqvaesiglip.siglip_model.")
        for name, shape in shapes_of(VilaUPixelDecoder(config)).items():
            shapes["rqvaesiglip." + ("" if name.startswith("post_quant") else "decoder.") + name] = shape
        for name, shape in shapes_of(VilaUDepthTransformer(config)).items():
            shapes["rqtransformer." + ".".join(SPELLINGS.get(part, part) for part in name.split("."))] = shape
    for depth in range(4):
        book = f"rqvaesiglip.quantizer.codebooks.{depth}."
        shapes |= {
            book + "weight": [16385, 1024],
            book + "embed_ema": [16384, 1024],
            book + "cluster_size_ema": [16384],
        }
    return shapes | {"rqvaesiglip.logit_scale": [1], "rqvaesiglip.logit_bias": [1]}


def test_release_converts_at_its_real_size(tmp_path):
    source = shutil.copytree(CASE.folder / "checkpoint", tmp_path / "vila-u-7b-256")
    tower = released_tower()
    # what is known of the released file
    assert len(tower) == 1107
    assert abs(2 * sum(math.prod(shape) for shape in tower.values()) / 1e9 - 2.7126) < 0.001
    for part, config in (("llm", LLAMA_7B), ("vision_tower", TOWER_7B)):
        (source / part / "config.json").write_text(json.dumps(config))
        (source / part / "model.safetensors").unlink()
    with torch.device("meta"):
        llm = shapes_of(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source / "llm")))
    write_shards(source / "llm", llm, 3)
    write_sparse(source / "vision_tower" / "model.safetensors", tower)
    projector = {"layers.0.weight": [4096, 1024], "layers.0.bias": [4096]}
    projector |= {"layers.2.weight": [4096, 4096], "layers.2.bias": [4096]}
    write_sparse(source / "mm_projector" / "model.safetensors", projector)
    target = convert(source, tmp_path / "converted_7b_u")
    config, processor = AutoConfig.from_pretrained(target), AutoProcessor.from_pretrained(target)
    assert config.num_tile_tokens == processor.num_tile_tokens == 256
    assert (config.code_depth, config.codebook_size) == (4, 16384)
    drawing = json.loads((target / "generation_config.json").read_text())["drawing"]
    assert drawing["top_k"] == 900
    named = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    # the text tower, three codebooks and the statistics: about a quarter of the tower's numbers
    assert sum(math.prod(shape) for name, shape in tower.items() if name not in named) > 3.9e8


def test_readme_draws(model, processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = (REPOSITORY / "README.md").read_text().split("\n## Draw\n")[1].split("\n## ")[0]
    (snippet,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names = {"model": model, "processor": processor}
    exec(snippet.replace("num_frames=8", "num_frames=2"), names)
    assert len(names["pictures"]) == 8 and len(names["frames"]) == 2
    assert (tmp_path / "fireworks.mp4").stat().st_size
