"""Videos in prompts: the placeholders are the feature rows, and every way to show a video gives one answer."""

import json
import shutil

import av
import numpy as np
import pytest
import torch
from chat_requests import assert_same, encode, logits, noise_picture, said, user
from conftest import COMMITTED_GOLDENS, MEDIA
from transformers import AutoModel, AutoProcessor, DynamicCache, pipeline
from vila.conversion_vila import convert, to_original
from vila.vision_vila import pool_video

CHECKPOINTS = ("nvila_lite_image", "nvila_dynamic_s2_image", "vila15_image")
LITE = CHECKPOINTS[0]
POOLS = {
    "basic": None,
    "time": [[8, 1, 1]],
    "not dividing": [[3, 2, 2], [5, 1, 3]],
    "two": [[1, 2, 2], [4, 1, 1]],
}


def noise(seed, size=(60, 50)):
    return noise_picture(seed, size)


def clip(frames, seed=0):
    return [noise(100 * seed + number) for number in range(frames)]


WIDE = noise(7, (200, 70))
TEXT, PICTURE, PICTURES = [user("Hello!")], [user(WIDE, "What?")], [user(noise(8), WIDE, "Compare.")]
VIDEO, VIDEOS = [user(clip(4), "What happens?")], [user(clip(2, 1), "and", clip(3, 2), "differ how?")]
BOTH, BOTH_BACK = [user(WIDE, clip(3, 3), "Is it in there?")], [user(clip(3, 4), "or", noise(9), "?")]
MIXED = [TEXT, PICTURE, PICTURES, VIDEO, VIDEOS, BOTH, BOTH_BACK]


@pytest.fixture
def case(load, monkeypatch):
    """`case(checkpoint, **attributes)` with video options set for one test; `pools` in the model too."""

    def prepare(checkpoint=LITE, pools=None, chunk=None, **attributes):
        loaded = load(checkpoint)
        monkeypatch.setattr(loaded.model.config, "video_pool_sizes", pools)
        for name, value in {"video_pool_sizes": pools, **attributes}.items():
            monkeypatch.setattr(loaded.processor, name, value)
        if chunk:
            monkeypatch.setattr(loaded.model.config, "vision_chunk_size", chunk)
        return loaded

    return prepare


WAYS = {
    "shown": {"video_as_images": True},
    "encoded": {"video_as_images": False},
    "pooled": {"video_as_images": False, "pools": POOLS["not dividing"]},
}


# ---- counts


@pytest.mark.parametrize("pools", POOLS)
@pytest.mark.parametrize("wrapping", [(None, "\n", None), ("<", ">", "|"), (None, None, None)], ids=str)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_placeholders_are_as_many_as_feature_rows(case, checkpoint, pools, wrapping):
    names = ("video_start_tokens", "video_end_tokens", "video_sep_tokens")
    loaded = case(checkpoint, POOLS[pools], video_as_images=False, **dict(zip(names, wrapping)))
    start, end, separator = ([] if t is None else loaded.processor.tokenizer(t)["input_ids"] for t in wrapping)
    side = int(loaded.model.config.num_tile_tokens**0.5)
    for frames in (*range(1, 10), 15, 16, 17, 20):
        expected = []
        for time, rows, columns in POOLS[pools] or [(1, 1, 1)]:
            tokens = -(-side // rows) * -(-side // columns)
            view = start + [loaded.model.config.video_token_id] * tokens + end
            expected += view * -(-frames // time) + separator
        assert loaded.processor.video_block(frames) == expected
        counted = expected.count(loaded.model.config.video_token_id)
        pixels = torch.empty(frames, 0)
        assert loaded.model.model.media_sizes("video", pixels, None) == [(frames, counted)]
    inputs = encode(loaded.processor, [user(clip(3), clip(5))])
    features = loaded.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    assert (inputs["input_ids"] == loaded.model.config.video_token_id).sum() == sum(map(len, features))
    assert [row.tolist() for row in inputs["video_grid_thw"]] == [[3, 1, 1], [5, 1, 1]]


@pytest.mark.parametrize("pools", [*POOLS.values(), [[2, 3, 2], [7, 7, 7]]], ids=str)
@pytest.mark.parametrize(("frames", "side"), [(1, 1), (5, 3), (8, 4), (17, 5)])
def test_pooling_equals_a_naive_loop(pools, frames, side):
    features = torch.randn(frames, side, side, 3, generator=torch.Generator().manual_seed(0))
    expected = []
    for time, rows, columns in pools or [(1, 1, 1)]:
        for t in range(0, frames, time):
            for y in range(0, side, rows):
                for x in range(0, side, columns):
                    expected.append(features[t : t + time, y : y + rows, x : x + columns].mean((0, 1, 2)))
    torch.testing.assert_close(pool_video(features, pools), torch.stack(expected))


def test_token_types_tell_pictures_from_videos(case):
    loaded = case(video_as_images=False)
    inputs = encode(loaded.processor, [BOTH, TEXT, VIDEO], return_mm_token_type_ids=True)
    ids, types, config = inputs["input_ids"], inputs["mm_token_type_ids"], loaded.model.config
    assert (types[ids == config.image_token_id] == 1).all() and (types[ids == config.video_token_id] == 2).all()
    assert set(types[0].tolist()) == {0, 1, 2} and set(types[2].tolist()) == {0, 2} and not types[1].any()


# ---- ways to show a video


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_frames_as_pictures_equal_an_encoded_video_without_pooling(case, checkpoint):
    shown = encode(case(checkpoint, video_as_images=True).processor, VIDEO)
    loaded = case(checkpoint, video_as_images=False)
    assert_same(logits(loaded.model, shown), logits(loaded.model, encode(loaded.processor, VIDEO)))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_video_shown_as_pictures_equals_its_frames_given_as_pictures(case, checkpoint):
    loaded = case(checkpoint, video_as_images=True)
    frames = clip(4)
    video, pictures = (encode(loaded.processor, [user(*shown, "What?")]) for shown in ([frames], frames))
    assert video["input_ids"].tolist() == pictures["input_ids"].tolist()
    assert torch.equal(video["pixel_values"], pictures["pixel_values"])


def test_one_frame_alone_is_tiled_like_a_picture_and_two_are_not(case):
    loaded = case(video_as_images=True)
    alone, picture = encode(loaded.processor, [user([WIDE], "What?")]), encode(loaded.processor, [user(WIDE, "What?")])
    assert alone["input_ids"].tolist() == picture["input_ids"].tolist()
    assert torch.equal(alone["pixel_values"], picture["pixel_values"]) and len(alone["pixel_values"]) > 1
    assert len(encode(loaded.processor, [user([WIDE, WIDE], "What?")])["pixel_values"]) == 2
    assert len(encode(loaded.processor, [user([WIDE], noise(1))])["pixel_values"]) == 2


@pytest.mark.parametrize("checkpoint", CHECKPOINTS[:2])
@pytest.mark.parametrize("frames", [1, 3])
def test_pictures_are_tiled_beside_a_video_whose_frames_are_not(case, checkpoint, frames):
    loaded = case(checkpoint, video_as_images=True)
    inputs = encode(loaded.processor, [user(WIDE, [WIDE] * frames)], tile_multiple_images=True)
    assert inputs["image_grid_thw"][0].prod() > 1
    assert inputs["image_grid_thw"][1:].tolist() == [[1, 1, 1]] * frames


@pytest.mark.parametrize("way", ["shown", "encoded"])
@pytest.mark.parametrize("frames", [1, 2])
def test_tiles_of_frames_count_as_frames(case, way, frames):
    loaded = case(**WAYS[way], video_max_tiles=4)
    inputs = encode(loaded.processor, [user([WIDE] * frames, "What?")])
    tiled = loaded.processor.image_processor(WIDE, max_tiles=4, return_tensors="pt")["pixel_values"]
    pixels = inputs["pixel_values" if way == "shown" else "pixel_values_videos"]
    assert torch.equal(pixels, tiled.repeat(frames, 1, 1, 1)) and len(tiled) > 1
    assert torch.isfinite(logits(loaded.model, inputs)).all()


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("way", WAYS)
def test_chunks_of_the_tower_do_not_change_features(case, checkpoint, way):
    inputs = encode(case(checkpoint, **WAYS[way]).processor, [VIDEO, VIDEOS])
    results = [logits(case(checkpoint, chunk=size, **WAYS[way]).model, inputs) for size in (1, 4, 100)]
    for result in results[1:]:
        assert_same(result, results[0])


# ---- batches and generation


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chats", [MIXED, MIXED[::-1], [VIDEO, TEXT]], ids=["mixed", "reversed", "two"])
def test_rows_of_a_batch_equal_single_rows(case, checkpoint, way, chats):
    loaded = case(checkpoint, **WAYS[way])
    inputs = encode(loaded.processor, chats)
    for row, chat in enumerate(chats):
        single = encode(loaded.processor, chat)
        length = single["input_ids"].shape[1]
        assert inputs["input_ids"][row, -length:].tolist() == single["input_ids"][0].tolist()
        assert not inputs["attention_mask"][row, :-length].any()
    together = logits(loaded.model, inputs)
    for row, chat in zip(together, chats):
        assert_same(row, logits(loaded.model, encode(loaded.processor, chat))[0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
    ],
    ids=str,
)
def test_ways_of_decoding_agree(case, way, options):
    loaded = case(**WAYS[way])
    inputs = encode(loaded.processor, MIXED)
    expected = logits(loaded.model, inputs).repeat_interleave(options.get("num_return_sequences", 1), dim=0)
    assert_same(logits(loaded.model, inputs, **options), expected)


@pytest.mark.parametrize("way", WAYS)
def test_beams_of_a_batch_see_their_own_videos(case, way):
    loaded = case(**WAYS[way])
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": 151650}
    together = loaded.model.generate(**encode(loaded.processor, MIXED), **options)[:, -5:]
    for row, chat in zip(together, MIXED):
        assert row.tolist() == loaded.model.generate(**encode(loaded.processor, chat), **options)[0, -5:].tolist()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}, {"prefill_chunk_size": 5}], ids=str)
def test_every_frame_is_encoded_once(case, way, options):
    loaded, seen = case(**WAYS[way]), []
    inputs = encode(loaded.processor, MIXED)
    hook = loaded.model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    logits(loaded.model, inputs, **options)
    hook.remove()
    assert sum(seen) == len(inputs["pixel_values"]) + len(inputs.get("pixel_values_videos", []))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "turns",
    [(VIDEO, [user(clip(3, 5), "And this?")]), (VIDEO, [user(WIDE, "And this?")]), (TEXT, VIDEO), (VIDEO, TEXT)],
    ids=["new video", "new picture", "first video", "text"],
)
def test_a_continued_chat_equals_one_without_cache(case, way, turns):
    loaded = case(**WAYS[way])
    first, second = turns
    past = DynamicCache(config=loaded.model.config.text_config)
    whole = encode(loaded.processor, [*first, said("It is blue"), *second])
    begin = encode(loaded.processor, first)
    with torch.no_grad():
        loaded.model(**begin, past_key_values=past)
    assert whole["input_ids"][0, : past.get_seq_length()].tolist() == begin["input_ids"][0].tolist()
    assert_same(logits(loaded.model, whole, past_key_values=past), logits(loaded.model, whole, use_cache=False))


# ---- files


def write_video(path, frames=10):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(noise(number, (64, 48)))))
        container.mux(stream.encode())
    return path


def count_frames(loaded, source, **options):
    return encode(loaded.processor, [user(source, "What?")], **options)["video_grid_thw"][0, 0]


def test_the_checkpoint_says_how_many_frames_a_file_gives(case, tmp_path):
    path = write_video(tmp_path / "video.mp4")
    assert count_frames(case(video_as_images=False), path) == 8
    assert count_frames(case(video_as_images=False, num_video_frames=3), path) == 3
    loaded = case(video_as_images=False, num_video_frames=8, video_fps=2.0)
    assert count_frames(loaded, path) == 4
    assert count_frames(loaded, path, num_frames=5) == 5
    assert count_frames(loaded, path, fps=1.0) == 2
    assert count_frames(loaded, clip(6)) == 6
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(6):
        noise(number).save(folder / f"{number}.png")
    assert count_frames(loaded, folder, num_frames=4) == 4
    assert count_frames(loaded, folder) == 8


@pytest.mark.parametrize("way", WAYS)
def test_a_broken_video_is_named_and_the_processor_goes_on(case, way, tmp_path):
    loaded = case(**WAYS[way])
    (tmp_path / "broken.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"^prompt 1: video 0: the video 'broken.mp4' is broken"):
        encode(loaded.processor, [VIDEO, [user(tmp_path / "broken.mp4", "What?")]])
    assert len(encode(loaded.processor, VIDEO)["input_ids"]) == 1


@pytest.mark.parametrize("way", ["shown", "encoded"])
def test_the_pipeline_takes_files_arrays_and_frames(case, way, tmp_path):
    loaded = case(**WAYS[way], num_video_frames=10)
    pipe = pipeline("image-text-to-text", model=loaded.model, processor=loaded.processor)
    path = write_video(tmp_path / "video.mp4")
    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    array = np.stack([np.asarray(frame) for frame in frames])

    def ask(source, **options):
        chat = [user(source, "What?")]
        output = pipe(text=chat, max_new_tokens=5, return_tensors=True, processor_kwargs=options)
        return output[0]["generated_token_ids"].tolist()

    expected = ask(frames)
    assert ask(path) == ask(array) == expected
    assert ask(path, num_frames=3) == ask(frames, num_frames=3) != expected
    assert ask(path, fps=1.0) == ask([frames[0], frames[5]])


def videos():
    return sorted(MEDIA.glob("*.mp4")) or [None]


@pytest.mark.parametrize("path", videos(), ids=lambda path: getattr(path, "name", "none"))
@pytest.mark.parametrize("way", ["shown", "pooled"])
def test_real_videos_go_through_the_pipeline(case, way, path):
    if path is None:
        pytest.skip(f"no videos: {MEDIA} is absent (set $VILA_MEDIA)")
    loaded = case(**WAYS[way])
    pipe = pipeline("image-text-to-text", model=loaded.model, processor=loaded.processor)
    output = pipe(text=[user(path, "What?")], max_new_tokens=4, processor_kwargs={"num_frames": 4})
    assert isinstance(output[0]["generated_text"][-1]["content"], str)


# ---- what is stored

ATTRIBUTES = {
    "video_as_images": False,
    "num_video_frames": 3,
    "video_fps": 2.0,
    "video_max_tiles": 5,
    "video_pool_sizes": [[8, 1, 1], [2, 2, 2]],
    "video_start_tokens": "<",
    "video_end_tokens": None,
    "video_sep_tokens": "|",
}


def test_saving_and_loading_keeps_the_video_options(case, tmp_path):
    options = dict(ATTRIBUTES)
    case(pools=options.pop("video_pool_sizes"), **options).processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in ATTRIBUTES} == ATTRIBUTES


ENCODER = {
    "_target_": "llava.model.encoders.TSPVideoEncoder",
    "pool_sizes": ATTRIBUTES["video_pool_sizes"],
    "start_tokens": "<",
    "end_tokens": None,
    "sep_tokens": "|",
}


@pytest.mark.parametrize("form", [dict, json.dumps], ids=["dictionary", "string"])
def test_conversion_reads_the_video_options_and_gives_them_back(tmp_path, form):
    source = shutil.copytree(COMMITTED_GOLDENS / "vila" / LITE / "checkpoint", tmp_path / "source")
    given = {"video_encoder": form(ENCODER), "fps": 2.0, "num_video_frames": 3, "video_max_tiles": 5}
    root = json.loads((source / "config.json").read_text()) | given
    (source / "config.json").write_text(json.dumps(root))
    folder = convert(source, tmp_path / "converted")
    processor = AutoProcessor.from_pretrained(folder)
    assert {name: getattr(processor, name) for name in ATTRIBUTES} == ATTRIBUTES
    assert AutoModel.from_pretrained(folder).config.video_pool_sizes == ATTRIBUTES["video_pool_sizes"]
    back = json.loads((to_original(folder, tmp_path / "back") / "config.json").read_text())
    if isinstance(back["video_encoder"], str):
        back["video_encoder"] = json.loads(back["video_encoder"])
    assert {name: back[name] for name in given} == {**given, "video_encoder": ENCODER}


@pytest.mark.parametrize("pools", [None, [[2, 1, 1]], [[3, 1, 1], [2, 2, 2]]], ids=str)
@pytest.mark.parametrize("count", [1, 5, 17])
def test_pooling_block_by_block_equals_pooling_the_whole_video(case, pools, count):
    """A block holds whole groups of every pooling; the groups of the last one may be cut short."""
    frames = torch.rand(count, 3, 70, 70)
    features = {}
    for chunk in (1, 2, 64):
        model = case(pools=pools, chunk=chunk, video_as_images=False).model
        with torch.no_grad():
            (features[chunk],) = model.get_video_features(frames).pooler_output
    assert torch.allclose(features[1], features[64], atol=1e-5)
    assert torch.allclose(features[2], features[64], atol=1e-5)
