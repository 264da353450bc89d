"""The cache that grows in place holds what transformers' cache holds, whatever is done to it."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chat_requests import NEW_TOKENS, logits
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModel, AutoProcessor, Cache, DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer
from vila import VilaConfig
from vila.cache_vila import ROOM, GrowingLayer, expect_tokens, grow_in_place

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 3)),
        st.tuples(st.just("update"), st.sampled_from([ROOM - 1, ROOM, ROOM + 1])),
        st.tuples(st.just("crop"), st.integers(1, 5)),
        st.tuples(st.just("reorder"), st.permutations([0, 1])),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("copy"), st.none()),
        st.tuples(st.just("reset"), st.none()),
    ),
    max_size=12,
)


def new_states(tokens, batch=2):
    return torch.randn(batch, 2, tokens, 4), torch.randn(batch, 2, tokens, 4)


def apply(cache, step, argument, states):
    if step == "update":
        cache.update(*states, layer_idx=0)
    elif step == "crop" and cache.get_seq_length() > argument:
        cache.crop(-argument)
    elif step == "reorder":
        cache.reorder_cache(torch.tensor([argument[row % 2] for row in range(len(states[0]))]))
    elif step == "repeat" and cache.get_seq_length() and len(states[0]) < 8:
        cache.batch_repeat_interleave(argument)
    elif step == "copy":
        return copy.deepcopy(cache)
    elif step == "reset":
        cache.reset()
    return cache


@given(STEPS)
@settings(deadline=None)
def test_any_history_leaves_what_transformers_cache_holds(steps):
    plain, grown = DynamicCache(), DynamicCache()
    grow_in_place(grown)
    for step, argument in [("update", 5), *steps]:
        batch = len(plain.layers[0].keys) if plain.get_seq_length() else 2
        states = new_states(argument if step == "update" else 1, batch)
        plain, grown = apply(plain, step, argument, states), apply(grown, step, argument, states)
        assert grown.get_seq_length() == plain.get_seq_length()
        if plain.get_seq_length():
            assert torch.equal(grown.layers[0].keys, plain.layers[0].keys)
            assert torch.equal(grown.layers[0].values, plain.layers[0].values)


def test_new_tokens_are_written_behind_the_old_ones():
    layer = GrowingLayer()
    layer.update(*new_states(10))
    start = layer.keys.data_ptr()
    for _ in range(ROOM):
        layer.update(*new_states(1))
        assert layer.keys.data_ptr() == start
    layer.update(*new_states(1))
    assert layer.keys.data_ptr() != start and layer.keys.shape[2] == 10 + ROOM + 1


def test_a_copy_does_not_write_into_the_original():
    cache = DynamicCache()
    grow_in_place(cache)
    cache.update(*new_states(3), layer_idx=0)
    branch = copy.deepcopy(cache)
    first, second = new_states(1), new_states(1)
    cache.update(*first, layer_idx=0)
    branch.update(*second, layer_idx=0)
    assert torch.equal(cache.layers[0].keys[:, :, 3:], first[0])
    assert torch.equal(branch.layers[0].keys[:, :, 3:], second[0])


def test_a_cache_made_in_inference_mode_goes_on_outside_of_it():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*new_states(3))
    keys, values = new_states(1)
    layer.update(keys, values)
    assert torch.equal(layer.keys[:, :, 3:], keys)


def test_gradients_reach_all_tokens():
    layer = GrowingLayer()
    states = [state.requires_grad_() for _ in range(2) for state in new_states(2)]
    layer.update(*states[:2])
    layer.update(*states[2:])
    (layer.keys.sum() + layer.values.sum()).backward()
    assert all(torch.equal(state.grad, torch.ones_like(state)) for state in states)


@pytest.mark.parametrize("cache", [DynamicCache(offloading=True), StaticCache(VilaConfig(), max_cache_len=8), None])
def test_other_caches_are_left_alone(cache):
    before = None if cache is None else [type(layer) for layer in cache.layers]
    grow_in_place(cache)
    assert cache is None or [type(layer) for layer in cache.layers] == before


def test_a_filled_cache_is_left_alone():
    cache = DynamicCache()
    cache.update(*new_states(3), layer_idx=0)
    keys = cache.layers[0].keys
    grow_in_place(cache)
    assert cache.layers[0].keys is keys


def test_room_for_a_long_prompt_is_made_once():
    cache = DynamicCache()
    grow_in_place(cache)
    cache.update(*new_states(3), layer_idx=0)
    expect_tokens(cache, 5 * ROOM)
    cache.update(*new_states(ROOM + 1), layer_idx=0)
    start = cache.layers[0].keys.data_ptr()
    for _ in range(4):
        cache.update(*new_states(ROOM), layer_idx=0)
        assert cache.layers[0].keys.data_ptr() == start
    cache.reset()
    assert cache.layers[0].expected == 0
    expect_tokens(DynamicCache(offloading=True), 5)  # others have no room to make


# ---- transformers' own caches, filled chunk by chunk


class NoStream:
    """What an offloaded cache waits for on a GPU: here copies are done when they return."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


class RoundedLayer(QuantizedLayer):
    """`QuantizedLayer` with the plainest rounding: 8 bits for each vector."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, tensor):
        values, scale = tensor
        return values * scale


@pytest.fixture(scope="module")
def chat(converted):
    """A model, and a chat about pictures for it."""
    folder = converted("nvila_lite_image")
    model = AutoModel.from_pretrained(folder, dtype="float32").eval()
    pictures = [Image.fromarray(torch.randint(0, 256, (60, 90, 3)).byte().numpy()) for _ in range(3)]
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": "What?"}]
    processor = AutoProcessor.from_pretrained(folder)
    ways = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return model, processor.apply_chat_template([{"role": "user", "content": content}], **ways)


@pytest.mark.parametrize("own_cache", [False, True])
def test_a_long_text_is_not_copied_for_every_chunk(chat, own_cache, monkeypatch):
    model, rooms = chat[0], []
    append = GrowingLayer._append
    monkeypatch.setattr(
        GrowingLayer,
        "_append",
        lambda layer, name, *states: [append(layer, name, *states), rooms.append(layer.rooms[name].data_ptr())][0],
    )
    ids = torch.arange(4 * ROOM).unsqueeze(0) % 50 + 5
    mask = torch.ones_like(ids)
    mask[:, :10] = 0
    options = {"past_key_values": DynamicCache()} if own_cache else {}
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = logits(model, inputs)
    rooms.clear()
    chunked = logits(model, inputs, prefill_chunk_size=100, **options)
    torch.testing.assert_close(chunked, expected, atol=1e-4, rtol=1e-4)
    # keys and values of every layer, once; behind the first chunk where the caller's cache had no layers yet
    assert len(set(rooms)) <= 2 * model.config.text_config.num_hidden_layers * (2 if own_cache else 1)


@pytest.mark.parametrize("chunk", [None, 7])
def test_an_offloaded_cache_gives_the_same_answer(chat, chunk, monkeypatch):
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", NoStream)
    model, inputs = chat
    expected = logits(model, inputs)
    torch.testing.assert_close(
        logits(model, inputs, cache_implementation="offloaded", prefill_chunk_size=chunk), expected
    )
    cache = DynamicCache(config=model.config.text_config, offloading=True)
    logits(model, inputs, past_key_values=cache, prefill_chunk_size=chunk)
    assert not any(isinstance(layer, GrowingLayer) for layer in cache.layers)


@pytest.mark.parametrize("chunk", [None, 7])
def test_a_quantised_cache_holds_a_prompt_that_comes_in_chunks(chat, chunk):
    model, inputs = chat
    layers = model.config.text_config.num_hidden_layers
    cache = Cache(layers=[RoundedLayer(residual_length=16) for _ in range(layers)])
    rounded = logits(model, inputs, past_key_values=cache, prefill_chunk_size=chunk)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + NEW_TOKENS - 1
    assert cache.layers[0]._quantized_keys[0].dtype == torch.int8
    torch.testing.assert_close(rounded[:, 0], logits(model, inputs)[:, 0], atol=0.2, rtol=0.2)


@pytest.mark.slow
def test_quanto_holds_the_cache_in_four_bits():
    """Its kernels are compiled on first use: in a process of its own, with packages from a folder of their own."""
    packages = REPOSITORY / ".venv" / "gptq"
    if not packages.is_dir() and importlib.util.find_spec("optimum") is None:
        pytest.skip("optimum-quanto is not installed")
    code = (
        "import json, sys\n"
        "from PIL import Image, ImageDraw\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype='float32').eval()\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "picture = Image.new('RGB', (112, 112), (230, 230, 230))\n"
        "ImageDraw.Draw(picture).ellipse((30, 30, 80, 80), fill=(214, 38, 38))\n"
        "content = [{'type': 'image', 'image': picture}, {'type': 'text', 'text': 'What is in the picture?'}]\n"
        "inputs = processor.apply_chat_template([{'role': 'user', 'content': content}], tokenize=True,\n"
        "    add_generation_prompt=True, return_dict=True, return_tensors='pt')\n"
        "quantised = {'cache_implementation': 'quantized', 'cache_config': {'backend': 'quanto', 'nbits': 4}}\n"
        "found = []\n"
        "for options in ({}, quantised, {**quantised, 'prefill_chunk_size': 11}):\n"
        "    options |= {'max_new_tokens': 6, 'do_sample': False, 'return_dict_in_generate': True}\n"
        "    output = model.generate(**inputs, **options)\n"
        "    cache = type(output.past_key_values.layers[0]).__name__\n"
        "    found.append([cache, processor.decode(output.sequences[0], skip_special_tokens=True)])\n"
        "print(json.dumps(found))\n"
    )
    path = os.pathsep.join(filter(None, (str(packages), os.environ.get("PYTHONPATH"))))
    tools = os.pathsep.join((str(packages / "bin"), os.environ["PATH"]))
    command = [sys.executable, "-c", code, str(REPOSITORY / "checkpoints" / "vila-nano")]
    environment = {**os.environ, "PYTHONPATH": path, "PATH": tools}
    run = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    plain, at_once, in_chunks = json.loads(run.stdout.splitlines()[-1])
    assert "red circle" in plain[1] and "Quant" not in plain[0]
    assert at_once == in_chunks == ["QuantoQuantizedLayer", plain[1]]
