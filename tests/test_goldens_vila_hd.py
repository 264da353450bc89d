"""Every golden case of PS3 and VILA-HD, through `vila-convert` and the public API alone."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from chat_requests import encode
from conftest import GOLDENS, GoldenCase
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor
from vila.conversion_vila import convert

TOLERANCE = 1e-4
FOLDER = GOLDENS / "vila_hd"
CASES = [GoldenCase(path.parent) for path in sorted(FOLDER.glob("*/golden.json"))]
ENCODERS = [case for case in CASES if not (case.folder / "checkpoint" / "llm").is_dir()]
MODELS = [case for case in CASES if case not in ENCODERS]

pytestmark = pytest.mark.skipif(not CASES, reason="no golden cases of VILA-HD (set $VILA_GOLDENS)")


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """`load(case)`: the model of a case, converted once per session, and its folder."""

    @cache
    def load_once(folder):
        converted = convert(folder / "checkpoint", tmp_path_factory.mktemp("hd") / folder.name)
        return AutoModel.from_pretrained(converted, dtype="float32").eval(), converted

    return lambda case: load_once(case.folder)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def pixels(case, names):
    """The pictures as they are, normalised as the case says."""
    options = json.loads((case.folder / "checkpoint" / "preprocessor_config.json").read_text())
    mean, std = (np.array(options.get(name, 0.5), dtype=np.float32) for name in ("mean", "std"))
    arrays = [np.asarray(Image.open(case.folder / name).convert("RGB"), dtype=np.float32) for name in names]
    return torch.stack([torch.from_numpy((array / 255 - mean) / std).permute(2, 0, 1) for array in arrays])


def picture_names(case):
    return sorted(path.name for path in case.folder.glob("input_*.png"))


def case_pixels(case, folder):
    """Pixels as the case stores them, else of its pictures: one through the image processor, others as they are."""
    if "pixel_values" in case.tensors:
        return case.tensors["pixel_values"]
    if (case.folder / "image.png").is_file():
        return AutoImageProcessor.from_pretrained(folder)(Image.open(case.folder / "image.png"))["pixel_values"]
    return pixels(case, picture_names(case))


def encoder_calls(case):
    """`(name, picture names or None for all, options)` of every call that a case describes."""
    golden, tensors = case.golden, case.tensors
    if "call" in golden:
        name = next(key.rsplit(".", 1)[0] for key in tensors if key.endswith(".last_hidden_state"))
        return [(name, None, dict(golden["call"]))]
    calls = []
    for name, call in golden["calls"].items():
        own = picture_names(case)
        if isinstance(call, dict):
            calls.append((name, own, dict(call)))
        elif f"{name}.last_hidden_state" in tensors:
            calls.append((name, [file for file in own if file in call] or own, read_call(call, tensors)))
    return calls


def read_call(text, tensors):
    """The options in a call that is written as a sentence."""
    options = {}
    for part in text.replace(",", " ").split():
        key, equals, value = part.partition("=")
        if equals and key in ("num_look_close", "num_token_look_close", "only_select_first_n_scale"):
            options[key] = value if value == "all" else int(value)
    if "ones(" in text:
        options["prompt"] = "ones"
    elif "prompt=" in text:
        options["prompt"] = text.split("prompt=")[1].split(")")[0].split()[0]
    return options


def encoder_options(case, call, pictures):
    """A described call as arguments of the encoder."""
    names = ("num_look_close", "num_token_look_close", "only_select_first_n_scale", "smooth_selection_prob")
    options = {name: call[name] for name in names if name in call}
    if "prompt" in call:
        width = case.tensors[next(name for name in case.tensors if name.endswith("last_hidden_state"))].shape[-1]
        is_ones = call["prompt"] == "ones"
        options["prompt"] = torch.ones(len(pictures), width) if is_ones else case.tensors[call["prompt"]]
    if "gt_rects" in call:
        options["gt_selection_maps"] = torch.zeros(len(pictures), *pictures.shape[2:])
        for target, (top, bottom, left, right) in zip(options["gt_selection_maps"], call["gt_rects"]):
            target[top:bottom, left:right] = 1
    return options


def check_selection(output, case, name, tensors):
    """Maps and indices equal, probabilities close; without a look there are no maps."""
    probs = [key for key in tensors if key.startswith(f"{name}.selection_probs.")]
    assert len(output.selection_probs) == len(probs)
    for number, found in enumerate(output.selection_probs):
        close(found, tensors[f"{name}.selection_probs.{number}"])
    if f"{name}.selection_maps.0" not in tensors:
        assert output.selection_maps is None
        return
    for number, found in enumerate(output.selection_maps):
        assert torch.equal(found, tensors[f"{name}.selection_maps.{number}"].to(found.dtype))
        indices = tensors.get(f"{name}.selected_indices.{number}")
        if indices is not None:
            assert [row.flatten().nonzero().flatten().tolist() for row in found] == indices.tolist()


def encoder_parameters():
    return [pytest.param(case, call, id=f"{case.name}-{call[0]}") for case in ENCODERS for call in encoder_calls(case)]


@pytest.mark.parametrize(("case", "call"), encoder_parameters())
def test_encoder_equals_the_original(case, call, load):
    model, folder = load(case)
    name, names, described = call
    is_stored = "pixel_values" in case.tensors or names is None
    pictures = case_pixels(case, folder) if is_stored else pixels(case, names)
    tensors = case.tensors
    with torch.no_grad():
        output = model(pictures, **encoder_options(case, described, pictures))
    close(output.last_hidden_state, tensors[f"{name}.last_hidden_state"])
    if f"{name}.hidden_minus2" in tensors:
        close(output.hidden_states[-2], tensors[f"{name}.hidden_minus2"])
    check_selection(output, case, name, tensors)
    for number, look in enumerate(output.look_indices):
        if f"{name}.step{number}.selection_map_flat" not in tensors:
            continue
        flat = [torch.zeros(scale[0].numel()) for scale in output.selection_maps]
        for scale, indices in zip(flat, look):
            scale[indices[0]] = 1
        assert torch.equal(torch.cat(flat), tensors[f"{name}.step{number}.selection_map_flat"].float())


WITH_LOW_RES = [case for case in ENCODERS if "dbg.lowres_hidden.0" in case.tensors]


@pytest.mark.parametrize("case", WITH_LOW_RES, ids=lambda case: case.name)
def test_low_resolution_view_equals_the_original(case, load):
    tensors = case.tensors
    stored = [name for name in tensors if name.startswith("dbg.lowres_hidden.")]
    model, folder = load(case)
    with torch.no_grad():
        output = model(case_pixels(case, folder), num_look_close=0)
    assert len(output.hidden_states) == len(stored)
    for number, found in enumerate(output.hidden_states):
        close(found, tensors[f"dbg.lowres_hidden.{number}"])
    if "dbg.lowres_pooled" in tensors:
        everywhere = torch.ones(len(found), dtype=torch.bool)
        with torch.no_grad():
            pooled = model.get_image_features(case_pixels(case, folder), is_global_text=everywhere)
        close(pooled.pooler_output, tensors["dbg.lowres_pooled"])


@pytest.mark.parametrize("case", [case for case in ENCODERS if (case.folder / "image.png").is_file()])
def test_pixels_equal_the_original(case, load):
    _, folder = load(case)
    found = AutoImageProcessor.from_pretrained(folder)(Image.open(case.folder / "image.png"), return_tensors="pt")
    assert torch.equal(found["pixel_values"], case.tensors["pixel_values"])


def storing(name):
    return pytest.mark.parametrize(
        "case", [case for case in ENCODERS if name in case.tensors], ids=lambda case: case.name
    )


@storing("text.pooled_output")
def test_text_tower_equals_the_original(case, load):
    model, _ = load(case)
    with torch.no_grad():
        text = model.get_text_features(case.tensors["text_ids"])
    close(text.pooler_output, case.tensors["text.pooled_output"])
    close(text.last_hidden_state, case.tensors["text.prompt"])


@storing("pretrain.pooled_output")
def test_pooling_equals_the_original(case, load):
    model, folder = load(case)
    tensors = case.tensors
    described = case.golden["calls"]["pretrain"]
    options = read_call(described, tensors) if isinstance(described, str) else dict(described)
    pictures = case_pixels(case, folder)
    prompt = encoder_options(case, options, pictures).get("prompt")
    with torch.no_grad():
        pooled = model.get_image_features(pictures, prompt=prompt)
    close(pooled.pooler_output, tensors["pretrain.pooled_output"])
    for kind in ("bottomup", "topdown"):
        for number, found in enumerate(pooled[f"{kind}_selection_probs"]):
            close(found, tensors[f"pretrain.{kind}_selection_probs.{number}"])


def feature_map_parameters():
    names = [(case, name) for case in ENCODERS for name in case.tensors if ".feature_map." in name]
    calls = sorted({(case.name, name.split(".")[0]) for case, name in names})
    return [(case, name) for case in ENCODERS for own, name in calls if own == case.name]


@pytest.mark.parametrize(("case", "name"), feature_map_parameters(), ids=lambda part: getattr(part, "name", part))
def test_feature_maps_equal_the_original(case, name, load):
    model, folder = load(case)
    described = next(options for call, _, options in encoder_calls(case) if call == name)
    pictures = case_pixels(case, folder)
    with torch.no_grad():
        output = model(pictures, **encoder_options(case, described, pictures))
        maps = model.feature_maps(output.last_hidden_state, output.selection_maps)
    stored = {key: tensor for key, tensor in case.tensors.items() if key.startswith(f"{name}.feature_map.")}
    for key, tensor in stored.items():
        close(maps[int(key.rsplit(".", 1)[1])], tensor)


def model_parameters(needs=lambda case, name: True):
    pairs = [(case, name) for case in MODELS for name in case.golden["calls"] if needs(case, name)]
    return [pytest.param(case, name, id=f"{case.name}-{name}") for case, name in pairs]


def has_first_pass(case, name):
    return f"{name}.pass1_last_hidden" in case.tensors


def has_loss(case, name):
    return "lm_loss" in case.golden["calls"][name]


def prepare(case, call, folder):
    """A call's prompt as the processor makes it, and its look options."""
    processor = AutoProcessor.from_pretrained(folder)
    content = [
        {"type": "image", "path": str(case.folder / part)} if part.endswith(".png") else {"type": "text", "text": part}
        for part in call["prompt"]
    ]
    inputs = encode(processor, [{"role": "user", "content": content}])
    names = ("num_look_close", "num_token_look_close", "look_close_mode", "smooth_selection_prob")
    return inputs, {name: call[name] for name in names if name in call}


def block_spans(call):
    """`(first, end)` of every picture's features in the sequence."""
    spans, low = [], None
    for block in call["image_blocks"]:
        if "low_res" in block:
            low = block["low_res"]
        elif "span" in block:
            spans.append((low[0], block["span"][1]))
    return spans


@pytest.mark.parametrize(("case", "name"), model_parameters())
def test_model_equals_the_original(case, name, load):
    model, folder = load(case)
    call, tensors = case.golden["calls"][name], case.tensors
    inputs, options = prepare(case, call, folder)
    sequences = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: sequences.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        output = model(**inputs, **options)
    hook.remove()

    assert output.logits.shape[1] == call["sequence_length"]
    close(sequences[-1], tensors[f"{name}.inputs_embeds"])  # text and pictures in their places
    check_selection(output, case, name, tensors)
    for number, counts in enumerate(call["patches_selected_per_scale"]):
        assert output.selection_maps[number].sum((1, 2)).tolist() == counts
    if f"{name}.top_down_prompt" in tensors:
        close(output.top_down_prompt, tensors[f"{name}.top_down_prompt"])
    else:
        assert output.top_down_prompt is None
    expected = torch.cat([tensors[f"{name}.inputs_embeds"][0, start:end] for start, end in block_spans(call)])
    close(torch.cat(list(output.image_hidden_states)), expected)
    if f"{name}.prefill_logits" in tensors:
        close(output.logits, tensors[f"{name}.prefill_logits"])
    if f"{name}.prefill_logits_last" in tensors:
        close(output.logits[:, -1], tensors[f"{name}.prefill_logits_last"])


@pytest.mark.parametrize(("case", "name"), model_parameters())
@pytest.mark.parametrize("reuse", [True, False], ids=["prefix from cache", "prefix computed again"])
def test_generated_ids_equal_the_original(case, name, reuse, load):
    """Other caches than the ordinary one cannot give tokens back: the prefix is then computed a second time."""
    model, folder = load(case)
    call, tensors = case.golden["calls"][name], case.tensors
    inputs, options = prepare(case, call, folder)
    other_cache = {} if reuse else {"cache_implementation": "static"}
    output = model.generate(
        **inputs, **options, **other_cache, max_new_tokens=16, min_new_tokens=16, output_selection_maps=True
    )
    length = inputs["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, :length], inputs["input_ids"])
    assert output.sequences[0, length:].tolist() == tensors[f"{name}.generated_ids"][0].tolist()
    check_selection(output, case, name, tensors)


@pytest.mark.parametrize(("case", "name"), model_parameters(has_first_pass))
def test_first_pass_equals_the_original(case, name, load):
    """What the prompt is made of: the beginning of the sequence, pictures at low resolution."""
    model, folder = load(case)
    call, tensors = case.golden["calls"][name], case.tensors
    inputs, _ = prepare(case, call, folder)
    expected = tensors[f"{name}.pass1_last_hidden"]
    with torch.no_grad():
        output = model.model(
            input_ids=inputs["input_ids"][:, : expected.shape[1]], pixel_values=inputs["pixel_values"]
        )
    close(output.last_hidden_state, expected)


@pytest.mark.parametrize(("case", "name"), model_parameters(has_loss))
def test_language_model_loss_equals_the_original(case, name, load):
    call = case.golden["calls"][name]
    model, folder = load(case)
    inputs, options = prepare(case, call, folder)
    kept = int(json.dumps(call["lm_loss"]).split("last ")[1].split()[0])
    labels = inputs["input_ids"].clone()
    labels[:, :-kept] = -100
    with torch.no_grad():
        loss = model(**inputs, **options, labels=labels).loss
    assert abs(loss.item() - call["lm_loss"]["value"]) <= TOLERANCE


@pytest.mark.parametrize(
    "case", [case for case in MODELS if "selection_loss" in case.golden], ids=lambda case: case.name
)
def test_selection_loss_equals_the_original(case, load):
    model, folder = load(case)
    golden = case.golden["selection_loss"]
    inputs, options = prepare(case, case.golden["calls"][golden["of"].split(".")[0]], folder)
    top, bottom, left, right = golden["gt_rect_y0y1x0x1"]
    target = torch.zeros(len(inputs["pixel_values"]), *inputs["pixel_values"].shape[2:])
    target[:, top:bottom, left:right] = 1
    with torch.no_grad():
        loss = model(**inputs, **options, gt_selection_maps=target).selection_loss
    assert abs(loss.item() - golden["value"]) <= TOLERANCE


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_tokens_around_media_equal_the_original(case, load):
    model, _ = load(case)
    assert model.config.image_token_id == case.golden["media_token_ids"]["image"]
    assert model.config.video_token_id == case.golden["media_token_ids"]["video"]
    assert model.generation_config.eos_token_id == case.golden["stop_token_ids"]
