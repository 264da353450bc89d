"""VILA-U draws: batches, samples, guidance, options, streaming; the pictures and videos that come of it."""

import json
import math

import av
import numpy as np
import pytest
import torch
from chat_requests import noise_picture
from PIL import Image
from transformers import (
    AutoModel,
    GenerationConfig,
    LogitsProcessorList,
)
from vila.generation_vila_u import VilaUPictureStreamer
from vila_u_requests import LIKELIEST, PROMPTS, draw, encode, user


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


def test_a_given_config_says_how_many_are_drawn(model, processor):
    config = GenerationConfig(num_return_sequences=2, do_sample=True)
    drawn = draw(model, processor, PROMPTS[:1], generation_config=config, guidance_scale=1)
    assert len(drawn.sequences) == 2
    alone = draw(model, processor, PROMPTS[:1], generation_config=config, num_return_sequences=1, guidance_scale=1)
    assert len(alone.sequences) == 1


def test_nothing_of_the_text_head_is_computed(model, processor):
    def called(*arguments):
        raise AssertionError("the text head was run")

    hook = model.lm_head.register_forward_hook(called)
    try:
        draw(model, processor, PROMPTS[:1], guidance_scale=3.0)
    finally:
        hook.remove()


def test_half_precision_draws(folder, processor):
    half = AutoModel.from_pretrained(folder, dtype="bfloat16").eval()
    output = draw(half, processor, PROMPTS[:1], num_return_sequences=2)
    assert output.pixel_values.dtype == torch.bfloat16 and output.pixel_values.isfinite().all()
    pictures = processor.post_process_multimodal_output(output.pixel_values, generation_mode="image")
    assert [picture.size for picture in pictures] == [(64, 64)] * 2


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
