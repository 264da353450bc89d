"""What a prompt needs, said beforehand: equal to what a loaded model and its cache take."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from live_tensors import LiveTensors
from transformers import AutoModel, AutoProcessor, DynamicCache
from vila import VilaConfig, memory
from vila.cache_vila import ROOM
from vila.context_vila import context_length
from vila.frame_stream_vila import FrameStream, Views
from vila.geometry_vila import TileGrid
from vila.loading_vila import Checkpoint
from vila.memory_vila import MemoryPlan, loaded_bytes, weight_bytes

CHECKPOINTS = ("nvila_lite_image", "vila15_image", "vila15_clip_image")


def long_vila(**text):
    """LongVILA-7B: Qwen2.5-7B and SigLIP of 448 pixels."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, **text}
    text = {"model_type": "qwen2", "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, **text}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 448}
    vision |= {"num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "vision_use_head": False}
    return VilaConfig(text_config={"max_position_embeddings": 2**20, **text}, vision_config=vision)


def on_meta(config):
    with torch.device("meta"):
        return AutoModel.from_config(config)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_weights_are_counted_as_they_are_loaded(converted, checkpoint):
    folder = converted(checkpoint)
    model = AutoModel.from_pretrained(folder, dtype="bfloat16")
    files = sum(path.stat().st_size for path in folder.resolve().rglob("*.safetensors"))
    planned = weight_bytes(on_meta(VilaConfig.from_pretrained(folder)))
    assert planned == sum(weight.nbytes for weight in model.parameters())
    assert 0 <= loaded_bytes(model) - planned < 0.1 * planned and planned < 2 * files


def test_four_bits_are_those_of_the_layers_of_the_language_model():
    config = long_vila()
    model = on_meta(config)
    layers = sum(w.numel() for n, w in model.model.language_model.named_parameters() if w.ndim == 2 and "layers" in n)
    saved = weight_bytes(model) - weight_bytes(model, bits=4)
    assert saved == pytest.approx(layers * (16 - 4.25) / 8, rel=1e-6)
    assert weight_bytes(model, bits=4) < weight_bytes(model, bits=8) < weight_bytes(model)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("frames", [1, 3])
def test_tokens_and_cache_are_those_of_a_real_prompt(converted, checkpoint, frames):
    folder = converted(checkpoint)
    model = AutoModel.from_pretrained(folder, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(folder)
    wrapping = sum(
        len(processor._wrapping_ids(text)) for text in (processor.image_start_tokens, processor.image_end_tokens)
    )
    content = [{"type": "video", "video": torch.zeros(frames + 1, 40, 40, 3).byte().numpy()}]
    ways = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs, without = (
        processor.apply_chat_template([{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}], **ways)
        for parts in (content, [])
    )
    text_tokens = without["input_ids"].shape[1]
    plan = MemoryPlan(model.config, loaded_bytes(model), wrapping, text_tokens, value_bytes=4)
    length = inputs["input_ids"].shape[1]
    assert abs(plan.tokens(frames + 1) - length) <= 2  # line breaks may merge with the text
    cache = DynamicCache()
    model.generate(**inputs, past_key_values=cache, max_new_tokens=1)
    rooms = sum(room.nbytes for layer in cache.layers for room in layer.rooms.values())
    assert (
        rooms
        == plan.cache_bytes(length)
        == (length + ROOM) * sum(t.nbytes // t.shape[2] for layer in cache.layers for t in (layer.keys, layer.values))
    )


def small(**vision):
    """In the proportions of the released ones."""
    text = {"model_type": "qwen2", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 2**14}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 96, "intermediate_size": 256, **vision}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 14, "vision_use_head": False}
    return AutoModel.from_config(VilaConfig(text_config=text, vision_config=vision)).bfloat16().eval()


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_cpu"])
@pytest.mark.parametrize(("tokens", "chunk"), [(1024, None), (2048, 256), (2048, 64)], ids=str)
def test_a_chunk_takes_what_is_planned(attention, tokens, chunk):
    model, ids = small(image_size=28), torch.arange(tokens).unsqueeze(0) % 50 + 5
    model.set_attn_implementation(attention)
    plan = MemoryPlan(model.config, 0, attention=attention, chunk=chunk)
    with LiveTensors(ids, *model.parameters(), *model.buffers()) as live:
        model.generate(input_ids=ids, prefill_chunk_size=chunk, max_new_tokens=1, pad_token_id=0)
    assert live.most - plan.cache_bytes(tokens) == pytest.approx(plan.chunk_bytes(tokens), rel=0.1)
    assert plan.chunk_bytes(tokens) > plan.encoding_bytes()


@pytest.mark.parametrize("frames", [2, 4])
@torch.no_grad()
def test_frames_that_are_encoded_together_take_what_is_planned(frames):
    model = small(image_size=224)
    model.config.vision_chunk_size = frames
    stream = FrameStream([Views(8, range(8))], lambda views: np.zeros((len(views), 3, 224, 224), dtype=np.float32))
    with LiveTensors(*model.parameters(), *model.buffers()) as live:
        for _ in model.model.stream_features("image", stream, None):
            pass
    assert live.most == pytest.approx(MemoryPlan(model.config, 0).encoding_bytes(), rel=0.15)


def test_the_figures_of_a_million_tokens():
    """56 KiB a token, 56 GiB in all: the cache of LongVILA-7B-1M."""
    plan = MemoryPlan(long_vila(), 16 * 10**9, attention="flash_attention_2")
    assert plan.cache_bytes(2**20) == pytest.approx(56 * 2**30, rel=1e-3)
    assert plan.need(2048).tokens == 2048 * 257 + 512
    assert plan.chunk_bytes(2**20) == plan.chunk_bytes(2**15) < 0.5e9
    masked = MemoryPlan(long_vila(), 16 * 10**9)
    assert masked.chunk_bytes(2**20) > 2**20 * 2048 * 3 and masked.chunk_bytes(2048) == plan.chunk_bytes(2048)
    quantised = MemoryPlan(long_vila(), 16 * 10**9, cache_bits=4)
    assert 0.25 < quantised.cache_bytes(2**20) / plan.cache_bytes(2**20) < 0.35


def test_a_prompt_that_goes_through_whole_is_counted_whole():
    plan, chunked = (MemoryPlan(long_vila(), 16 * 10**9, attention="none", chunk=chunk) for chunk in (None, 2048))
    assert chunked.chunk_bytes(8192) == chunked.chunk_bytes(2048) == plan.chunk_bytes(2048) == plan.chunk_bytes(8193)
    assert plan.chunk_bytes(8192) > 3.9 * plan.chunk_bytes(2048)
    # 31 frames, in chunks, fit where 29 as a whole do not
    total = plan.need(31).total + 10**8
    assert plan.need(29).total > total and plan.most_frames(total=total) >= 31


@pytest.mark.parametrize("folder", ["vila_hd_folder", "vila_u_folder"])
def test_frames_that_cannot_be_streamed_are_all_counted(request, folder):
    checkpoint = Checkpoint(request.getfixturevalue(folder))
    processor = checkpoint.load_processor()
    config = checkpoint.family.config_class.from_pretrained(checkpoint.folder)
    assert not processor.can_stream
    content = [{"type": "video", "video": torch.zeros(3, 40, 40, 3).byte().numpy()}, {"type": "text", "text": "?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": 3},
    )
    pixels = sum(inputs[name].nbytes for name in ("pixel_values", "pixel_values_videos") if name in inputs)
    plan = MemoryPlan(config, 0)
    assert pixels > 0 and plan.need(3).chunk - plan.chunk_bytes(plan.tokens(3)) == pixels


def test_frames_that_can_be_streamed_are_not_counted(converted):
    checkpoint = Checkpoint(converted("nvila_lite_image"))
    plan = MemoryPlan(checkpoint.family.config_class.from_pretrained(checkpoint.folder), 0)
    assert checkpoint.load_processor().can_stream and plan.need(3).chunk == plan.chunk_bytes(plan.tokens(3))


@pytest.mark.parametrize("pools", [None, [[8, 1, 1]], [[1, 2, 2], [4, 1, 1]]], ids=str)
@pytest.mark.parametrize("limits", [{"tokens": 5000}, {"total": 20e9}, {"tokens": 10**6, "total": 17e9}], ids=str)
def test_one_frame_more_than_the_most_does_not_fit(pools, limits):
    config = long_vila()
    config.video_pool_sizes = pools
    plan = MemoryPlan(config, 16 * 10**9)
    most = plan.most_frames(**limits)
    fits, above = plan.need(most), plan.need(most + 1)
    assert fits.tokens <= limits.get("tokens", math.inf) and fits.total <= limits.get("total", math.inf)
    assert above.tokens > limits.get("tokens", math.inf) or above.total > limits.get("total", math.inf)
    assert plan.most_frames(total=1e9) == plan.most_frames(tokens=5) == -1


# ---- the context


ROPES = [
    ({}, 4096),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 4096),
    ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}}, 16384),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}},
        16384,
    ),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
        4096,
    ),
    (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1024,
            }
        },
        4096,
    ),
]


@pytest.mark.parametrize(("rope", "length"), ROPES, ids=[str(number) for number in range(len(ROPES))])
def test_the_context_is_what_the_rope_reaches(rope, length):
    config = VilaConfig(text_config={"model_type": "qwen2", "max_position_embeddings": 4096, **rope})
    assert context_length(config.text_config) == length


CONTRADICTIONS = [
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}},
        "2048 tokens",
    ),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 2, "original_max_position_embeddings": 8192}},
        "original_max",
    ),
    ({"rope_scaling": {"type": "linear"}}, "needs a factor"),
    ({"rope_scaling": {"factor": 4.0}}, "no effect without a rope_type"),
    ({"rope_parameters": {"rope_type": "linear", "factor": -3.0}}, "factor must be"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor must be"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "factor must be"),
    ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta must be"),
    ({"rope_parameters": {"rope_theta": math.nan}}, "rope_theta must be"),
    ({"rope_theta": 0}, "rope_theta must be"),
    ({"rope_parameters": [4]}, "must be a dictionary"),
]


@pytest.mark.parametrize(("rope", "match"), CONTRADICTIONS, ids=[match for _, match in CONTRADICTIONS])
def test_a_rope_that_contradicts_the_context_is_refused(rope, match):
    text = {"model_type": "qwen2", "max_position_embeddings": 4096, **rope}
    with pytest.raises(ValueError, match=match):
        VilaConfig(text_config=text)


def test_a_contradiction_in_a_ready_config_is_refused_too():
    config = VilaConfig().text_config
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    config.rope_parameters["original_max_position_embeddings"] = 16
    with pytest.raises(ValueError, match="64 tokens that rope_parameters reach"):
        VilaConfig(text_config=config)


def test_a_prompt_beyond_the_context_is_refused_with_what_would_fit(converted):
    folder = converted("nvila_lite_image")
    model = AutoModel.from_pretrained(folder, dtype="float32").eval()
    model.config.text_config.max_position_embeddings = 1000
    most = MemoryPlan(model.config, 0).most_frames(1000)
    with pytest.raises(ValueError, match="has 1001 tokens, more than the 1000") as error:
        model.generate(input_ids=torch.ones(1, 1001, dtype=torch.long))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in str(error.value).splitlines()[1:]]
    assert rows[0][:2] == ["frames", "tokens"]
    fitting = {int(row[0]): row[-1] for row in rows[2:]}
    assert fitting[most] == "yes" and fitting[2048] == "no"


# ---- the command


def run(*arguments):
    command = [sys.executable, "-m", "vila.memory", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def answer(capsys, *arguments):
    memory.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_the_command_says_what_is_needed_and_what_fits(converted, capsys):
    folder = converted("nvila_lite_image")
    config, processor = VilaConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    text = answer(capsys, folder, "--frames", 7, "--memory", 2)
    tokens = len(processor.image_block(TileGrid(1, 1))) * 7 + 512
    assert f"| 7 | {tokens} |" in text
    assert f"{config.text_config.max_position_embeddings} tokens of context hold" in text
    assert "2.00 GB of memory hold" in text and "7 frames take" in text
    few = answer(capsys, folder, "--memory", 1e-6)
    assert "do not hold the model" in few


def test_every_option_changes_the_figures(converted, capsys):
    folder = converted("nvila_lite_image")

    def table(*options):
        return answer(capsys, folder, "--frames", 600, "--memory", 1, *options)

    plain = table()
    for options in (
        ["--text-tokens", 0],
        ["--attention", "sdpa_cpu"],
        ["--chunk", 64],
        ["--memory", 2],
        ["--bits", 4],
    ):
        assert table(*options) != plain, options
    assert table("--cache-bits", 2) != table("--cache-bits", 4) != plain
    with pytest.raises(SystemExit, match=f"600 frames take .* more than the 600 of the context: {88 // 5} frames"):
        table("--context", 600)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", 10**6], "of the context"),
        (["--context", 10**9], "the model was made for"),
        (["--frames", "-1"], "less than 0"),
        (["--bits", "5"], "invalid choice"),
        (["--memory", "inf"], "no positive number of GB"),
        (["--memory", "nan"], "no positive number of GB"),
        (["--memory", "-1"], "no positive number of GB"),
    ],
    ids=["frames", "context", "negative", "bits", "infinite", "nan", "less than none"],
)
def test_what_cannot_be_is_one_clear_error(converted, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        memory.main([str(converted("nvila_lite_image")), *map(str, arguments)])
    assert message in f"{error.value}{capsys.readouterr().err}"


def test_a_folder_that_is_no_checkpoint_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        result = run(path)
        assert result.returncode == 1 and result.stdout == ""
        assert result.stderr.startswith("vila-memory: ") and "Traceback" not in result.stderr


def test_stored_bits_are_the_default(converted, tmp_path, capsys):
    folder = shutil.copytree(converted("nvila_lite_image"), tmp_path / "stored")
    plain = answer(capsys, folder, "--memory", 1)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 16}
    (folder / "config.json").write_text(json.dumps(config))
    four = answer(capsys, folder, "--memory", 1)
    assert four != answer(capsys, folder, "--memory", 1, "--bits", 16) == plain
    assert four == answer(capsys, folder, "--memory", 1, "--bits", 4)
