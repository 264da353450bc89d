"""What vLLM's and SGLang's backends for transformers models do with a checkpoint, step by step on a CPU.

Neither engine runs here. Every step is done as they do it: the base model built from a config, weights placed by name,
attention of the engine's own, prompts tokenized without the processor, pictures processed one by one.
"""

import json
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from chat_requests import encode
from conftest import COMMITTED_GOLDENS, REPOSITORY, GoldenCase
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AttentionInterface, AutoModel, AutoProcessor
from transformers.conversion_mapping import WeightRenaming, get_model_conversion_mapping
from vila import VilaConfig, VilaForConditionalGeneration, VilaModel
from vila.conversion_vila import convert, to_original
from without_package import WARNINGS_ARE_ERRORS, WITHOUT_PACKAGE

LITE, S2 = "nvila_lite_image", "nvila_dynamic_s2_image"
LLAMAS = ["vila15_image", "vila15_llama3_image"]
SIZES = [(190, 75), (60, 60), (80, 200)]


def pictures(count):
    noise = torch.Generator().manual_seed(count)
    return [
        Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=noise, dtype=torch.uint8).numpy())
        for width, height in SIZES[:count]
    ]


def chat(count):
    content = []
    for number in range(count):
        content += [{"type": "image"}, {"type": "text", "text": f"Picture {number}. "}]
    return [{"role": "user", "content": content}]


def attend(module, query, key, value, attention_mask, attention_instances=None, scaling=None, **kwargs):
    """As an engine's attention: it takes no mask, knows its layer by `layer_idx` and keeps what it needs elsewhere."""
    attention_instances[module.layer_idx].append(kwargs)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


AttentionInterface.register("engine", attend)


def placed(base, weights):
    """Weights by the names of the engine, in which the base model is called `model`; None for those it drops."""
    renamings = [mapping for mapping in get_model_conversion_mapping(base) if isinstance(mapping, WeightRenaming)]
    dropped = [re.compile(pattern) for pattern in base._keys_to_ignore_on_load_unexpected or ()]
    names = {}
    for name in weights:
        new = name
        for renaming in renamings:
            new, _ = renaming.rename_source_key(new)
        names[name] = None if any(pattern.search(new) for pattern in dropped) else new
    return names


def root_weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


class Engine:
    """The steps of vLLM's multimodal backend for transformers models."""

    def __init__(self, folder):
        config = VilaConfig.from_pretrained(folder)
        config.text_config._attn_implementation = "engine"
        self.processor = AutoProcessor.from_pretrained(folder)
        self.base = VilaModel(config).eval()
        weights = root_weights(folder)
        named = {new: weights[name] for name, new in placed(self.base, weights).items() if new}
        self.head = named.pop("lm_head.weight")
        strict = config.vision_config.model_type != "internvl_vision"
        self.base.load_state_dict({name.removeprefix("model."): tensor for name, tensor in named.items()}, strict)

    def process(self, images):
        """Replacement ids of every picture, and its own part of every tensor."""
        text = self.processor.image_token * len(images)
        out = self.processor(
            text=text, images=images, return_text_replacement_offsets=True, truncation=False, return_tensors="pt"
        )
        (offsets,) = out["text_replacement_offsets"]
        assert [entry["type"] for entry in offsets] == ["image"] * len(images)
        plan = self.processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width) for image in images])
        tiles = plan["num_image_patches"]
        assert sum(tiles) == len(out["pixel_values"])
        tensors = {name: out[name].split(tiles) for name in out if name.startswith(("pixel", "image"))}
        ids = [
            self.processor.tokenizer(entry["replacement"], add_special_tokens=False)["input_ids"] for entry in offsets
        ]
        assert [len(own) for own in ids] == plan["num_image_tokens"]
        return [(own, {name: tensors[name][number] for name in tensors}) for number, own in enumerate(ids)]

    @torch.no_grad()
    def logits(self, messages, images):
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        items = [self.process([image])[0] for image in images]
        replacements = iter(ids for ids, _ in items)
        ids = []
        # a request's "add_special_tokens": Qwen2 has none, VILA-1.5 was trained with them
        for token in self.processor.tokenizer(prompt, add_special_tokens=True)["input_ids"]:
            ids += next(replacements) if token == self.processor.image_token_id else [token]
        tensors = {name: torch.cat([item[name] for _, item in items]) for name in items[0][1]}
        features = torch.cat(list(self.base.get_image_features(**tensors).pooler_output))
        ids = torch.tensor([ids])
        is_feature = ids == self.processor.image_token_id
        embeds = self.base.get_input_embeddings()(ids.masked_fill(is_feature, 0))
        embeds = embeds.masked_scatter(is_feature.unsqueeze(-1), features)
        self.seen = {layer: [] for layer in range(self.base.config.text_config.num_hidden_layers)}
        hidden = self.base(
            input_ids=None,
            inputs_embeds=embeds,
            use_cache=False,
            position_ids=torch.arange(ids.shape[1])[None],
            attention_instances=self.seen,
            return_dict=False,
        )[0]
        return hidden[0, -1] @ self.head.T


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    made = {}

    def engine(name):
        if name not in made:
            case = GoldenCase(COMMITTED_GOLDENS / "vila" / name)
            folder = tmp_path_factory.mktemp("engines") / name
            convert(case.folder / "checkpoint", folder, conv_mode=case.prompt["conv_mode"], copy=True)
            made[name] = (Engine(folder), folder)
        return made[name]

    return engine


# ------------------------------------------------------------------------------------------------------------- vLLM


def documented_overrides():
    # the same in every command
    (override,) = set(re.findall(r"--hf-overrides '(.*)'", (REPOSITORY / "README.md").read_text()))
    return json.loads(override)


def test_documented_override_builds_the_base_model_from_the_code_beside_the_weights(engines):
    _, folder = engines(LITE)
    script = (
        "import json\n"
        "import torch\n"
        "from transformers import AutoConfig, AutoModel\n"
        f"config = AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"config.update(json.loads({json.dumps(json.dumps(documented_overrides()))}))\n"
        "with torch.device('meta'):\n"
        "    model = AutoModel.from_config(config, dtype=torch.bfloat16, trust_remote_code=True)\n"
        "module = type(model).__module__.split('.')[0]\n"
        "print(type(model).__name__, module, model.is_backend_compatible(), model.dtype)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE + WARNINGS_ARE_ERRORS + script],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["VilaModel", "transformers_modules", "True", "torch.bfloat16"], done.stderr


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", [LITE, S2, *LLAMAS])
def test_engine_gets_the_logits_of_the_whole_model(name, count, engines):
    engine, folder = engines(name)
    model = AutoModel.from_pretrained(folder, dtype="float32").eval()
    messages, images = chat(count), pictures(count)
    shown = [dict(part) for part in messages[0]["content"]]
    for part, image in zip((part for part in shown if part["type"] == "image"), images):
        part["image"] = image
    inputs = encode(engine.processor, [{"role": "user", "content": shown}], tile_multiple_images=True)
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1]
    torch.testing.assert_close(engine.logits(messages, images), expected, atol=1e-4, rtol=1e-4)


def test_attention_options_reach_every_layer(engines):
    engine, _ = engines(LITE)
    engine.logits(chat(1), pictures(1))
    assert len(engine.seen) > 1 and all(len(calls) == 1 for calls in engine.seen.values())


@pytest.mark.parametrize("name", [LITE, S2])
def test_pictures_processed_alone_equal_those_processed_together(name, engines):
    """An engine keeps what a picture became, and puts it beside others later."""
    engine, _ = engines(name)
    together = engine.process(pictures(3))
    for (ids, tensors), picture in zip(together, pictures(3)):
        ((own_ids, own_tensors),) = engine.process([picture])
        assert own_ids == ids and own_tensors.keys() == tensors.keys()
        assert all(torch.equal(own_tensors[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("name", [LITE, S2])
def test_replacement_is_one_token_repeated_as_often_as_there_are_rows(name, engines):
    engine, _ = engines(name)
    for ids, tensors in engine.process(pictures(3)):
        (rows,) = engine.base.get_image_features(**tensors).pooler_output
        assert set(ids) == {engine.processor.image_token_id} and len(ids) == len(rows)


def test_engine_is_not_given_the_frames_of_a_video(engines):
    engine, _ = engines(LITE)
    with pytest.raises(ValueError, match="pictures only"):
        engine.processor(text=engine.processor.video_token, videos=[pictures(1)], return_text_replacement_offsets=True)


@pytest.mark.parametrize("name", [LITE, S2])
def test_every_weight_has_its_place_and_the_head_is_kept(name, engines):
    engine, folder = engines(name)
    names = placed(engine.base, root_weights(folder))
    expected = {f"model.{name}" for name in engine.base.state_dict()} | {"lm_head.weight"}
    assert {new for new in names.values() if new} == expected


def test_weights_of_internvit_have_their_place_once_they_are_saved_split(engines, tmp_path):
    """An engine renames weights and splits none: in the original's files, one weight holds three."""
    engine, folder = engines("vila15_intern_image")
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path, save_original_format=False)
    names = placed(engine.base, root_weights(tmp_path))
    expected = {f"model.{name}" for name in engine.base.state_dict()} | {"lm_head.weight"}
    assert set(names.values()) == expected


def test_picture_that_engines_plan_with_has_the_most_tokens_and_is_bounded(engines):
    for name in (LITE, S2):
        engine, _ = engines(name)
        images = engine.processor.image_processor
        size = images.size.get("height")

        def tokens(height, width, engine=engine):
            return engine.processor._get_num_multimodal_tokens(image_sizes=([height, width],))["num_image_tokens"][0]

        sizes = [(size * rows, size * cols) for rows in range(1, 14) for cols in range(1, 14)]
        assert tokens(size, size) <= tokens(10_000, 10_000) <= max(tokens(*each) for each in sizes)


def test_parts_are_where_engines_look(engines):
    engine, _ = engines(LITE)
    config = engine.base.config
    assert config.get_text_config() is config.text_config is not config
    assert engine.base.get_encoder(modality="image") is engine.base.vision_tower
    assert engine.base.get_decoder() is engine.base.language_model
    assert engine.base.base_model_prefix == VilaForConditionalGeneration.base_model_prefix == "model"
    assert engine.processor.tokenizer.convert_tokens_to_ids(engine.processor.image_token) == config.image_token_id


def test_tensor_parallel_plan_names_every_linear_layer_of_the_language_model_alone(engines):
    engine, _ = engines(LITE)
    plan = engine.base.tp_plan
    styles = {"colwise", "rowwise"}
    for name, module in engine.base.named_modules():
        if isinstance(module, nn.Linear):
            found = [style for pattern, style in plan.items() if re.fullmatch(pattern.replace("*", r"\d+"), name)]
            assert len(found) == name.startswith("language_model.layers.") and styles.issuperset(found), name


def test_pipeline_parallel_plan_names_the_layers_once(engines):
    engine, _ = engines(LITE)
    assert engine.base.supports_pp_plan
    modules = [engine.base.get_submodule(name) for name in engine.base._pp_plan]
    assert [isinstance(module, nn.ModuleList) for module in modules].count(True) == 1
    assert modules[0] is engine.base.get_input_embeddings()


# ------------------------------------------------------------------------------------------------------------ SGLang


def test_sglang_finds_runs_of_placeholders_as_long_as_the_features(engines):
    for name in (LITE, S2):
        engine, _ = engines(name)
        prompt = engine.processor.apply_chat_template(chat(2), add_generation_prompt=True)
        out = engine.processor(text=prompt, images=pictures(2), return_tensors="pt")
        features = engine.base.get_image_features(out["pixel_values"], out["image_grid_thw"]).pooler_output
        assert (out["input_ids"] == engine.base.config.image_token_id).sum() == sum(map(len, features))


@pytest.mark.parametrize("name", [LITE, S2])
def test_original_layout_has_the_weight_names_of_sglangs_own_classes(name, engines, tmp_path):
    """`llm` is a Qwen2ForCausalLM, `vision_tower` a SiglipVisionModel, `mm_projector` a sequence of `layers`."""
    _, folder = engines(name)
    layout = to_original(folder, tmp_path / "original")
    names = {part: set(root_weights(layout / part)) for part in ("llm", "vision_tower", "mm_projector")}
    assert all(re.match(r"(model\.(embed_tokens|layers|norm)|lm_head)\.", name) for name in names["llm"])
    assert all(name.startswith("vision_model.") for name in names["vision_tower"])
    assert all(re.match(r"layers\.\d+\.", name) for name in names["mm_projector"])
    layers = {name.split(".")[3] for name in names["vision_tower"] if ".encoder.layers." in name}
    assert len(layers) == json.loads((layout / "vision_tower" / "config.json").read_text())["num_hidden_layers"]
