"""Videos of any length: what is streamed and chunked gives the same answer, in the memory of one chunk."""

import json
from functools import cache

import av
import numpy as np
import pytest
import torch
from chat_requests import NEW_TOKENS, assert_same, encode, logits, noise_picture, user
from conftest import REPOSITORY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache
from vila import generation_vila
from vila.cache_vila import ROOM
from vila.frame_stream_vila import FrameStream, Views, exactly
from vila.processing_vila_hd import VilaHDProcessor
from vila.processing_vila_u import VilaUProcessor

SIZE = (48, 40)
WAYS = {
    "shown": {"video_as_images": True},
    "encoded": {"video_as_images": False},
    "pooled": {"video_as_images": False, "pools": [[3, 2, 2]]},
    "pooled twice": {"video_as_images": False, "pools": [[1, 2, 2], [4, 1, 1]]},
}


def make_clip(path, frames, seed=0):
    """A file whose frames all differ."""
    generator = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for _ in range(frames):
            blocks = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(blocks, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """`clip(frames)`: a file, made once."""
    return cache(lambda frames: make_clip(tmp_path_factory.mktemp("clips") / f"{frames}.mp4", frames, frames))


@pytest.fixture
def case(load, monkeypatch):
    """`case(way, checkpoint)`: model and processor that show videos in one of the `WAYS`, two frames at a time."""

    def prepare(way="shown", checkpoint="nvila_lite_image"):
        loaded, options = load(checkpoint), dict(WAYS[way])
        pools = options.pop("pools", None)
        monkeypatch.setattr(loaded.model.config, "video_pool_sizes", pools)
        monkeypatch.setattr(loaded.model.config, "vision_chunk_size", 2)
        for name, value in {"video_pool_sizes": pools, **options}.items():
            monkeypatch.setattr(loaded.processor, name, value)
        return loaded

    return prepare


PICTURE = noise_picture(5, (170, 50))
ENDLESS = {"eos_token_id": None, "max_new_tokens": 1}


# ---- frames that are decoded as they are encoded


@pytest.mark.parametrize("checkpoint", ["nvila_lite_image", "nvila_dynamic_s2_image"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 9}], ids=["whole", "chunks"])
def test_streamed_frames_give_the_answer_of_decoded_ones(case, clip, checkpoint, way, options):
    loaded = case(way, checkpoint)
    chat = [user(PICTURE, "and", clip(7), "and", clip(3), "differ how?")]
    decoded, streamed = (encode(loaded.processor, chat, num_frames=7, stream_frames=each) for each in (False, True))
    assert torch.equal(streamed["input_ids"], decoded["input_ids"])
    name = "pixel_values" if way == "shown" else "pixel_values_videos"
    assert isinstance(streamed[name], FrameStream) and len(streamed[name]) == len(decoded[name])
    expected = logits(loaded.model, decoded)
    for _ in range(2):  # the same inputs serve again
        assert_same(logits(loaded.model, streamed, **options), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}])
def test_beams_and_batches_see_streamed_frames(case, clip, way, options):
    loaded = case(way)
    chats = [[user(clip(5), "What happens?")], [user(PICTURE, "or", clip(3), "?")]]
    decoded, streamed = (encode(loaded.processor, chats, num_frames=4, stream_frames=each) for each in (False, True))
    options = {**options, "max_new_tokens": 4, "prefill_chunk_size": 9}
    expected = loaded.model.generate(**decoded, **{**options, "prefill_chunk_size": None})
    assert torch.equal(loaded.model.generate(**streamed, **options), expected)


@pytest.mark.parametrize("way", WAYS)
def test_pixels_of_a_streamed_video_exist_a_few_at_a_time(case, clip, way, monkeypatch):
    loaded, seen = case(way), []
    make = loaded.processor.image_processor.pixels_of_views
    monkeypatch.setattr(
        loaded.processor.image_processor,
        "pixels_of_views",
        lambda views, **kw: seen.append(len(views)) or make(views, **kw),
    )
    inputs = encode(loaded.processor, [user(clip(25), "What happens?")], num_frames=25, stream_frames=True)
    assert seen == []  # nothing is decoded before it is asked for
    loaded.model.generate(**inputs, **ENDLESS, prefill_chunk_size=16)
    assert sum(seen) == 25 and max(seen) <= 4  # four make a block of the second pooling


def test_a_stream_moves_and_slices_like_a_tensor():
    pixels = np.arange(7, dtype=np.float32).reshape(7, 1, 1, 1)
    stream = FrameStream([Views(2, [0, 1]), Views(5, lambda: iter(range(2, 7)))], lambda views: pixels[views])
    values = torch.arange(7.0)
    assert len(stream) == 7 and len(stream[1:4]) == 3
    for chunk, expected in zip(stream.split(3), values.split(3), strict=True):
        assert torch.equal(chunk.flatten(), expected)
    for part, expected in zip(stream.split([1, 4, 2]), values.split([1, 4, 2]), strict=True):
        assert torch.equal(torch.cat(list(part.split(10))).flatten(), expected)
    joined = stream[:1] + stream[5:]
    assert torch.cat(list(joined.to("cpu", torch.float64).split(2))).flatten().tolist() == [0, 5, 6]
    assert next(iter(joined.to(dtype=torch.bfloat16).split(1))).dtype == torch.bfloat16


def test_frames_that_cannot_be_decoded_are_stood_for_by_the_last_one(caplog):
    assert list(exactly(iter("abc"), 5, "video 0")) == [*"abccc"]
    assert "stands for 2 that cannot be decoded" in caplog.text


def test_a_cut_file_still_fills_its_placeholders(case, clip, tmp_path, monkeypatch):
    loaded = case("shown")
    whole = clip(25).read_bytes()
    damaged = bytearray(whole)
    middle = len(whole) * 2 // 3
    damaged[middle : middle + 400] = bytes(400)
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    inputs = encode(loaded.processor, [user(tmp_path / "damaged.mp4", "?")], num_frames=25, stream_frames=True)
    assert (
        loaded.model.generate(**inputs, **ENDLESS, prefill_chunk_size=16).shape[1] == inputs["input_ids"].shape[1] + 1
    )


def test_tiled_frames_cannot_be_streamed(case, clip):
    with pytest.raises(ValueError, match="video_max_tiles"):
        encode(case().processor, [user(clip(3), "?")], stream_frames=True, video_max_tiles=2)


@pytest.mark.parametrize("family", [VilaHDProcessor, VilaUProcessor])
def test_families_that_cannot_stream_say_so(case, clip, family, monkeypatch):
    loaded = case()
    assert not family.can_stream
    monkeypatch.setattr(loaded.processor, "can_stream", family.can_stream, raising=False)
    with pytest.raises(ValueError, match="this one does not"):
        encode(loaded.processor, [user(clip(3), "?")], stream_frames=True)


def test_vila_hd_refuses_a_new_part_alone():
    with pytest.raises(ValueError, match="pass the whole chat"):
        VilaHDProcessor.continue_chat(None, [], {}, None)


# ---- long prompts


@pytest.mark.parametrize("way", WAYS)
def test_a_long_prompt_goes_through_in_chunks_by_itself(case, clip, way, monkeypatch):
    loaded, lengths = case(way), []
    inputs = encode(loaded.processor, [user(clip(25), "What happens?")], num_frames=25)
    expected = logits(loaded.model, inputs)
    monkeypatch.setattr(generation_vila, "LONG_PROMPT", 20)
    monkeypatch.setattr(generation_vila, "PREFILL_CHUNK", 7)
    hook = loaded.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    assert_same(logits(loaded.model, inputs), expected)
    assert max(lengths) == 7 and sum(lengths[: 1 - NEW_TOKENS]) == inputs["input_ids"].shape[1]
    lengths.clear()
    assert_same(logits(loaded.model, inputs, prefill_chunk_size=11), expected)
    assert max(lengths) == 11
    lengths.clear()
    assert_same(logits(loaded.model, inputs, use_cache=False), expected)
    assert max(lengths) > 20
    hook.remove()


class Largest(TorchDispatchMode):
    """Notes the shapes of all tensors that operations give."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.shapes.update(tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


@pytest.mark.parametrize(("way", "frames"), [("shown", 150), ("pooled", 560)])
def test_nothing_grows_with_the_prompt_but_the_cache(case, clip, way, frames):
    """No mask of the prompt squared, no logits of all its tokens, no embeddings, features or pixels of all of it."""
    loaded = case(way)
    text = loaded.model.config.text_config
    inputs = encode(loaded.processor, [user(clip(25), "What happens?")], num_frames=frames, stream_frames=True)
    length = inputs["input_ids"].shape[1]
    assert length > max(text.vocab_size, text.intermediate_size)  # so that a size of that many is the prompt
    with Largest() as seen:
        loaded.model.generate(**inputs, **ENDLESS, prefill_chunk_size=16)
    assert [shape for shape in seen.shapes if len(shape) == 3 and shape[-1] == text.vocab_size] == [
        (1, 1, text.vocab_size)
    ]
    growing = [shape for shape in seen.shapes if any(size >= length - 1 for size in shape)]
    keys = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    assert max(map(np.prod, growing)) == keys * (length + ROOM)
    pixels = 3 * loaded.model.config.vision_config.image_size**2
    assert max(np.prod(shape) for shape in seen.shapes if shape[-3:-2] == (3,)) <= 3 * pixels


# ---- the notebook


def test_the_notebook_asks_again_at_the_cost_of_the_question(capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    cells = json.loads((REPOSITORY / "examples" / "long_video.ipynb").read_text(encoding="utf-8"))["cells"]
    shown: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), shown)
    tokens = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines() if "new tokens" in line]
    assert tokens[0] > 900 and max(tokens[1:]) < 30
    assert isinstance(shown["cache"], DynamicCache) and shown["cache"].get_seq_length() > sum(tokens)
