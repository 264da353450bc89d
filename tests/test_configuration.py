"""`VilaConfig`: what it holds by default, what it keeps, and what it refuses."""

import math

import pytest
from transformers import AutoConfig
from vila import VilaConfig

SCALES = {"s2": True, "s2_scales": "224,448"}
CLIP = {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 32}


def siglip(**options):
    return {"vision_config": {"model_type": "siglip_vision_model", **options}}


def qwen(**options):
    return {"text_config": {"model_type": "qwen2", **options}}


def test_default_is_a_siglip_tower_without_head_and_a_qwen2():
    config = VilaConfig()
    assert config.vision_config.model_type == "siglip_vision_model"
    assert config.vision_config.vision_use_head is False
    assert config.text_config.model_type == "qwen2"
    assert (config.vision_feature_layer, config.projector_type) == (-2, "mlp_downsample")
    assert (config.s2, config.dynamic_s2, config.dynamic_scales) == (False, False, None)
    assert config.num_vision_layers == config.vision_config.num_hidden_layers - 1


def test_save_and_load_keeps_every_option_and_unknown_keys(tmp_path):
    config = VilaConfig(
        dynamic_s2=True,
        s2_scales="448,224",
        s2_resize_output_to_scale_idx=-1,
        projector_type="mlp_downsample_3x3_fix",
        vision_feature_layer=3,
        image_token_id=7,
        video_token_id=8,
        original_options={"fps": 2.0},
        a_key_of_tomorrow={"nested": [1, 2]},
        **qwen(hidden_size=64, num_attention_heads=4, a_key_of_the_text_model="kept"),
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is VilaConfig
    assert loaded.to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)}
    assert loaded.a_key_of_tomorrow == {"nested": [1, 2]}
    assert loaded.text_config.a_key_of_the_text_model == "kept"
    assert loaded.s2_scales == loaded.dynamic_scales == [224, 448]


def test_tied_embeddings_of_the_language_model_tie_the_whole():
    assert VilaConfig(**qwen(tie_word_embeddings=True)).tie_word_embeddings is True
    assert VilaConfig().tie_word_embeddings is False


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        # NVILA: 32 patches per side -> 16; with 3x3 the map is padded to 33 -> 11
        ({"projector_type": "mlp_downsample_2x2_fix"}, 256),
        ({"projector_type": "mlp_downsample_3x3_fix"}, 121),
        ({"projector_type": "mlp2x_gelu"}, 1024),
        ({"dynamic_s2": True, "s2_scales": "448,896,1344", "s2_resize_output_to_scale_idx": -1}, 256),
        ({"s2": True, "s2_scales": "448,896"}, 256),
        ({"s2": True, "s2_scales": "448,896", "s2_resize_output_to_scale_idx": 1}, 1024),
        ({"s2": True, "s2_scales": "448,896", "s2_resize_output_to_scale_idx": -1, "s2_max_split_size": 448}, 1024),
    ],
)
def test_num_tile_tokens_counts_what_the_projector_leaves(options, tokens):
    assert VilaConfig(**siglip(image_size=448, patch_size=14), **options).num_tile_tokens == tokens


def test_vila15_pads_an_odd_map():
    assert VilaConfig(**siglip(image_size=384, patch_size=14)).num_tile_tokens == 196


@pytest.mark.parametrize(("strategy", "tokens"), [("full", 50), ("default", 49)])
def test_num_tile_tokens_counts_a_kept_class_token(strategy, tokens):
    config = VilaConfig(vision_config=CLIP, projector_type="linear", vision_feature_select_strategy=strategy)
    assert config.num_tile_tokens == tokens


@pytest.mark.parametrize(("options", "scales"), [({}, 1), (SCALES, 2), ({**SCALES, "s2": False}, 1)])
def test_feature_size_grows_with_the_scales_in_use(options, scales):
    config = VilaConfig(**options)
    assert config.feature_size == config.vision_config.hidden_size * scales


NONSENSE = [
    *(("vision_chunk_size", {"vision_chunk_size": value}) for value in (0, -1, math.nan, "8", True, 2.5)),
    *(("image_token_id", {"image_token_id": value}) for value in (-1, math.nan, "5", None, True)),
    ("video_token_id", {"video_token_id": -1}),
    ("video_token_id", {"image_token_id": 5, "video_token_id": 5}),
    *(("projector_type", {"projector_type": value}) for value in ("conv", "", "mlp0x_gelu", "linear\n", 2, None)),
    *(("vision_feature_layer", {"vision_feature_layer": value}) for value in (13, -14, "-2", math.nan, None)),
    *(("vision_feature_select_strategy", {"vision_feature_select_strategy": value}) for value in ("cls", None)),
    ("vision_feature_select_strategy", {"vision_config": CLIP}),
    *(("s2", {"s2": value}) for value in ("yes", 1, None)),
    ("s2_scales", {"s2": True}),
    ("s2_scales", {"dynamic_s2": True}),
    ("exclude each other", {**SCALES, "dynamic_s2": True}),
    *(("s2_scales", {"s2_scales": value}) for value in ("a,b", "", "224,,448", "nan", [], [224, -1], [0], [7, 7], 5)),
    *(("s2_scales", {"s2_scales": value}) for value in ([224.5], [math.nan], [True, 2], [None], {"a": 1})),
    *(("scale_idx", {**SCALES, "s2_resize_output_to_scale_idx": value}) for value in (2, -3, "0", math.nan)),
    *(("s2_max_split_size", {**SCALES, "s2_max_split_size": value}) for value in (0, -224, "224", math.nan)),
    ("s2_max_split_size", {"s2_max_split_size": -1}),
    *(("vision_config", {"vision_config": value}) for value in (5, "siglip", [])),
    *(("image_size", siglip(image_size=value)) for value in (0, -14, "224", math.nan, (), (224, 448), 8)),
    *(("patch_size", siglip(patch_size=value)) for value in (0, -14, "14", math.nan)),
    ("vision_config.num_hidden_layers", siglip(num_hidden_layers=0)),
    ("vision_config.image_size", {"vision_config": {"model_type": "bert"}}),
    *(("text_config", {"text_config": value}) for value in (5, "qwen2", [])),
    *(("hidden_size", qwen(hidden_size=value)) for value in (0, -4, "64", math.nan)),
    ("text_config.vocab_size", qwen(vocab_size=0)),
    ("text_config.num_attention_heads", qwen(num_attention_heads=-1)),
    ("text_config", {"text_config": {"model_type": "siglip_vision_model"}}),
    ("text_config", {"text_config": {"model_type": "vila"}}),
    ("tie_word_embeddings", {"tie_word_embeddings": "no"}),
    # what a damaged file may ask for, and nobody can build
    ("text_config.num_hidden_layers", qwen(num_hidden_layers=10**9)),
    ("num_hidden_layers", qwen(num_hidden_layers="2")),
    ("vision_config.num_hidden_layers", siglip(num_hidden_layers=10**6)),
    ("text_config.hidden_size", qwen(hidden_size=2**40)),
    ("text_config.vocab_size", qwen(vocab_size=10**30)),
    ("vision_config.image_size", siglip(image_size=10**9)),
    ("vision_config.intermediate_size", siglip(intermediate_size=10**9)),
    ("image_token_id", {"image_token_id": 2**70}),
    ("s2_scales", {"s2_scales": [224, 10**9], "dynamic_s2": True}),
    ("original_options", {"original_options": 3}),
]


@pytest.mark.parametrize(("name", "options"), NONSENSE, ids=[f"{name}-{i}" for i, (name, _) in enumerate(NONSENSE)])
def test_nonsense_is_a_value_error_that_names_the_option(name, options):
    with pytest.raises(ValueError, match=name):
        VilaConfig(**options)


def test_nonsense_in_a_file_is_the_same_value_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vila", "vision_chunk_size": -1}')
    with pytest.raises(ValueError, match="vision_chunk_size"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["llm_cfg", "vision_tower_cfg", "mm_projector_cfg"])
def test_an_original_config_is_refused_with_the_command_that_converts_it(key):
    with pytest.raises(ValueError, match="vila-convert"):
        VilaConfig(**{key: {}})
