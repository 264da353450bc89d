"""The PS3 encoder: choosing patches, budgets, odd pictures, saving, and what its config and converter refuse."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import COMMITTED_GOLDENS
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel
from vila.configuration_ps3 import Ps3Config, Ps3VisionConfig
from vila.conversion_vila import convert
from vila.modeling_ps3 import Ps3Model
from vila.original_config_vila_hd import to_ps3_vision_config
from vila.selection_ps3 import choose_patches, plan_looks
from vila.vision_ps3 import Ps3Trunk, first_outputs

# the tower of a VILA-HD is an encoder's folder itself
SOURCE = COMMITTED_GOLDENS / "vila_hd" / "vila_hd_vlm" / "checkpoint" / "vision_tower"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return convert(SOURCE, tmp_path_factory.mktemp("ps3") / "tiny-ps3")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModel.from_pretrained(folder, dtype="float32").eval()


def pictures(count=1, height=280, width=280):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def tiny_config(**options):
    return Ps3VisionConfig(
        **{
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 14,
            "position_grid": 2,
            "ps3_scales": [28, 56, 112],
            "select_based_on_layer": [0, 1],
            "max_select_num": 20,
            "highres_selection_module_hidden_dim": 4,
            "highres_selection_module_out_dim": 4,
            "highres_selection_module_depth": 1,
            "pooling_size": 24,
            **options,
        }
    )


# --------------------------------------------------------------------------------------------------------- arithmetic


def test_budgets_of_released_encoders():
    assert Ps3VisionConfig(max_select_num=2560).look_budget == [512, 2048]
    assert Ps3VisionConfig(max_select_num=2560, ps3_scales=[378, 756, 1512, 3780]).look_budget == [85, 341, 2134]


def test_looks_take_what_is_left_and_overflow_upwards():
    assert list(plan_looks([4, 100], [6, 20], 2)) == [[4, 22], [0, 26]]
    assert list(plan_looks([100, 400], [12, 48], None, 75)) == [[12, 48], [3, 12]]
    assert list(plan_looks([100, 400], [12, 48], 0)) == []
    assert [sum(look) for look in plan_looks([4, 8], [0, 5], "all")] == [5, 3]
    assert list(plan_looks([100, 400], [12, 48], None, 0)) == []


def test_all_looks_leave_out_what_the_original_leaves_out_and_all_tokens_nothing():
    patches, budget = [100, 400], [5, 55]
    looks = list(plan_looks(patches, budget, "all"))
    assert len(looks) == 9 and sum(map(sum, looks)) == 445
    tokens = list(plan_looks(patches, budget, None, "all"))
    assert [sum(scale) for scale in zip(*tokens)] == patches
    assert all(sum(look) <= 60 for look in tokens)


def test_looks_never_take_a_patch_twice():
    probs = [torch.rand(2, 4, 4), torch.rand(2, 8, 8)]
    looks = list(choose_patches(probs, plan_looks([16, 64], [4, 16], "all")))
    for scale in range(2):
        taken = torch.cat([look[scale] for look in looks], 1)
        assert taken.sort(1).values.tolist() == [list(range(probs[scale][0].numel()))] * 2


# ------------------------------------------------------------------------------------------------------------ pictures


def test_batch_equals_single_pictures(model):
    both = pictures(2)
    with torch.no_grad():
        together = model(both, num_look_close=2)
        for number in range(2):
            alone = model(both[number : number + 1], num_look_close=2)
            torch.testing.assert_close(
                together.last_hidden_state[number], alone.last_hidden_state[0], atol=1e-4, rtol=0
            )
            for found, expected in zip(together.selection_maps, alone.selection_maps):
                assert torch.equal(found[number], expected[0])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (280, 168), (33, 90)])
def test_pictures_of_any_shape_are_seen(height, width, model):
    with torch.no_grad():
        output = model(pictures(1, height, width), num_token_look_close="all")
    chosen = sum(int(scale.sum()) for scale in output.selection_maps)
    assert chosen == sum(scale[0].numel() for scale in output.selection_maps)
    assert output.last_hidden_state.shape[1] == 25 + chosen
    assert output.last_hidden_state.isfinite().all()


@pytest.mark.parametrize(("height", "width"), [(2, 2), (8, 8), (3, 7), (1, 1)])
@pytest.mark.parametrize("mode", ["interpolate", "crop"])
def test_positions_of_a_few_patches_are_those_of_a_resized_table(mode, height, width):
    side = 2 if mode == "interpolate" else 10
    trunk = Ps3Trunk(tiny_config(position_mode=mode, position_grid=side), False)
    torch.nn.init.normal_(trunk.pos_embed)
    table = trunk.pos_embed.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if mode == "interpolate":
        size = (max(height, width),) * 2
        table = torch.nn.functional.interpolate(table, size=size, mode="bicubic", antialias=True)
    expected = table[0, :, :height, :width].flatten(1).T
    torch.testing.assert_close(trunk.positions(height, width), expected, atol=1e-5, rtol=1e-5)
    some = torch.tensor([[0, height * width - 1]])
    torch.testing.assert_close(trunk.positions(height, width, some), expected[some], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", ["highres_selection_feature", "separate_pos_emb"])
def test_encoders_without_an_option(option):
    model = Ps3Model(Ps3Config(vision_config=tiny_config(**{option: False}))).eval()
    part = {"highres_selection_feature": "highres_selection", "separate_pos_emb": "pos_emb_residual"}[option]
    assert not any(part in name for name in model.state_dict())
    with torch.no_grad():
        assert model(pictures(1, 112, 112), num_look_close=2).last_hidden_state.shape == (1, 4 + 40, 24)


def test_layers_of_another_kind_give_the_same_outputs():
    """Quantised and packed layers have no weight that could be cut."""

    class OtherLinear(torch.nn.Linear):
        pass

    plain, other = torch.nn.Linear(5, 6), OtherLinear(5, 6)
    other.load_state_dict(plain.state_dict())
    features = torch.randn(3, 5)
    torch.testing.assert_close(first_outputs(other, features, 2), first_outputs(plain, features, 2))
    torch.testing.assert_close(first_outputs(plain, features, 2), plain(features)[:, :2])


def test_one_look_is_the_default(model):
    with torch.no_grad():
        output = model(pictures())
    assert [int(scale.sum()) for scale in output.selection_maps] == [12, 48]


def test_bfloat16_and_gradient_checkpointing(folder):
    half = AutoModel.from_pretrained(folder, dtype="bfloat16").eval()
    with torch.no_grad():
        assert half(pictures(), num_look_close=2).last_hidden_state.dtype == torch.bfloat16
    trained = AutoModel.from_pretrained(folder, dtype="float32")
    gradients = []
    for checkpointing in (False, True):
        trained.train()
        if checkpointing:
            trained.activation_checkpointing_enable()
        trained.zero_grad()
        trained(pictures(), num_look_close=2).last_hidden_state.square().mean().backward()
        gradients.append(trained.vision_model.trunk.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_last_look_of_a_small_budget_needs_no_larger_scale(model):
    with torch.no_grad():
        output = model(pictures(), num_look_close=1, select_num_each_scale=[7, 0])
    assert output.last_hidden_state.shape[1] == 25 + 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_look_close": -1}, "num_look_close"),
        ({"num_look_close": True}, "num_look_close"),
        ({"num_token_look_close": 2.0}, "num_token_look_close"),
        ({"num_look_close": 1, "num_token_look_close": 1}, "either"),
        ({"only_select_first_n_scale": 0}, "only_select_first_n_scale"),
        ({"only_select_first_n_scale": 3}, "only_select_first_n_scale"),
        ({"select_num_each_scale": [1, 2, 3]}, "select_num_each_scale"),
        ({"select_num_each_scale": "12+48"}, "select_num_each_scale"),
    ],
)
def test_options_without_sense_are_refused_by_name(options, message, model):
    with pytest.raises(ValueError, match=message):
        model(pictures(), **{"num_look_close": 1, **options} if "num_token_look_close" not in options else options)


def test_a_number_of_patches_is_kept_to_on_the_first_scales():
    assert list(plan_looks([100, 400], [12, 48], None, 30, 1)) == [[12, 0], [12, 0], [6, 0]]
    assert sum(map(sum, plan_looks([100, 400, 900], [12, 48, 60], None, "all", 2))) == 500
    # one patch of each other scale is more than there is left
    assert list(plan_looks([9000, 9000, 9000], [85, 341, 2134], 1, None, 1)) == [[2559, 1, 0]]
    with pytest.raises(ValueError, match="first 1 scales"):
        list(plan_looks([100, 400], [0, 48], 1, None, 1))


def test_unknown_options_and_wrong_shapes_are_refused(model):
    with pytest.raises(TypeError, match="num_look_closs"):
        model(pictures(), num_look_closs=4)
    assert isinstance(model(pictures(), return_dict=False), tuple)
    for shape in ((3, 280, 280), (1, 1, 280, 280), (1, 3, 0, 280)):
        with pytest.raises(ValueError, match="pixel_values"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="prompt must be"):
        model(pictures(), prompt=torch.zeros(1, 3))


def test_both_kinds_of_scores_come_of_one_net(model, monkeypatch):
    calls, net = [], model.vision_model.highres_selection_feature_module
    monkeypatch.setattr(net, "forward", lambda pixels, own=net.forward: calls.append(pixels.shape) or own(pixels))
    with torch.no_grad():
        output = model.get_image_features(pictures(), prompt=torch.ones(1, 48))
    assert len(calls) == 1 and not torch.equal(output.bottomup_selection_probs[0], output.topdown_selection_probs[0])


def test_pooling_of_target_patches_only_and_maps_of_features(model):
    wanted = torch.zeros(2, 280, 280)
    wanted[0, :30, :30] = 1
    with torch.no_grad():
        all_patches = model.get_image_features(pictures(2), gt_selection_maps=wanted).pooler_output
        some = model.get_image_features(pictures(2), gt_selection_maps=wanted, pool_gt_token_only=True).pooler_output
        output = model(pictures(2), num_look_close=1)
        maps = model.feature_maps(output.last_hidden_state, output.selection_maps)
    assert not torch.allclose(all_patches[0], some[0])
    # without a target every patch counts
    torch.testing.assert_close(all_patches[1], some[1])
    assert [tuple(scale.shape) for scale in maps] == [(2, 48, 5, 5), (2, 48, 10, 10), (2, 48, 20, 20)]
    with pytest.raises(ValueError, match="patches"):
        model.feature_maps(output.last_hidden_state[:, 1:], output.selection_maps)


def test_encoder_without_text_or_pooling_says_so():
    model = Ps3Model(Ps3Config(vision_config=tiny_config(pooling_size=0)))
    with pytest.raises(ValueError, match="text tower"):
        model.get_text_features(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="pooling"):
        model.get_image_features(pictures(1, 112, 112))


def test_text_makes_a_prompt_of_the_encoders_width():
    text = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 30, "context_length": 6, "projection_size": 24, "prompt_size": 24}
    for options in ({}, {"is_causal": True, "pool_type": "argmax", "projection_bias": False}):
        model = Ps3Model(Ps3Config(vision_config=tiny_config(), text_config={**text, **options})).eval()
        with torch.no_grad():
            found = model.get_text_features(torch.tensor([[1, 2, 29, 0, 0, 0]]))
            assert found.pooler_output.shape == (1, 24)
            model(pictures(1, 112, 112), prompt=found.last_hidden_state)
    with pytest.raises(ValueError, match="7 ids"):
        model.get_text_features(torch.zeros(1, 7, dtype=torch.long))


def test_radio_adapter_and_pool_of_another_width():
    config = tiny_config(position_mode="crop", position_grid=8, final_norm=False, pooling_size=32)
    config.adapter_size, config.adapter_blocks = 8, 2
    model = Ps3Model(Ps3Config(vision_config=config)).eval()
    names = set(model.state_dict())
    assert {"vision_model.trunk.siglip_proj.blocks.1.2.weight", "vision_model.trunk.siglip_proj.final.2.bias"} <= names
    assert not any(name.startswith("vision_model.trunk.norm.") for name in names)
    with torch.no_grad():
        assert model.get_image_features(pictures(1, 112, 112)).pooler_output.shape == (1, 32)


# ----------------------------------------------------------------------------------------------- saving and converting


def test_saved_encoder_keeps_its_names_and_loads(model, tmp_path):
    saved = tmp_path / "saved-ps3"
    model.save_pretrained(saved)
    again = AutoModel.from_pretrained(saved, dtype="float32").eval()
    assert set(again.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(pictures()).last_hidden_state, model(pictures()).last_hidden_state)


def test_remote_code_of_a_converted_encoder_is_complete(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"modeling_ps3.py", "encoder_ps3.py", "selection_ps3.py", "vision_ps3.py", "text_ps3.py"} <= names
    assert json.loads((folder / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling_ps3.Ps3Model"


@pytest.mark.parametrize("way", ["in_place", "copy"])
def test_every_way_of_converting_gives_the_same_encoder(way, model, tmp_path):
    source = tmp_path / f"original-{way}"
    shutil.copytree(SOURCE, source)
    converted = convert(
        source, **({"in_place": True} if way == "in_place" else {"target": tmp_path / "c", "copy": True})
    )
    again = AutoModel.from_pretrained(converted, dtype="float32").eval()
    with torch.no_grad():
        assert torch.equal(again(pictures()).last_hidden_state, model(pictures()).last_hidden_state)
    with pytest.raises(ValueError, match="already converted"):
        convert(converted, tmp_path / "again")


def test_image_processor_squeezes_into_the_largest_scale(folder):
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor(Image.new("L", (30, 500)), return_tensors="pt")["pixel_values"].shape == (1, 3, 280, 280)


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "L", "1", "CMYK"])
def test_pictures_are_resized_in_their_own_mode(mode, folder):
    """As the original does: what PIL makes of the mode, and RGB behind it."""
    noise = Image.effect_noise((60, 40), 90)
    picture = Image.merge("RGBA", [noise, noise.rotate(90), noise.rotate(180), noise.rotate(270)])
    picture = picture if mode == "RGBA" else picture.convert("RGB").convert(mode)
    expected = np.asarray(picture.resize((280, 280), Image.Resampling.BICUBIC).convert("RGB"), dtype=np.float32)
    found = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found.permute(1, 2, 0), torch.from_numpy((expected / 255 - 0.5) / 0.5))


def test_original_config_asks_for_a_conversion():
    with pytest.raises(ValueError, match="vila-convert"):
        Ps3Config(vision_config={"model_name": "vit_so400m_patch14_siglip_384"})


def test_released_trunks_are_known():
    tower = {"model_name": "vit_so400m_patch14_siglip_384", "hidden_size": 1152, "ps3_scales": [378, 756, 1512, 3780]}
    config = Ps3VisionConfig(**to_ps3_vision_config(tower, {"vision_model.trunk.attn_pool.latent": [1, 1, 1152]}))
    assert (config.num_hidden_layers, config.intermediate_size, config.position_grid) == (27, 4304, 27)
    assert config.pooling_size == 1152
    radio = {
        "model_name": "vit_large_patch16_224",
        "hidden_size": 1024,
        "ps3_scales": [384, 768, 1536],
        "select_based_on_layer": [0, 7, 14, 23],
        "img_size": 4096,
        "radio": True,
        "patch_size": 14,
    }
    config = Ps3VisionConfig(**to_ps3_vision_config(radio, {}))
    assert (config.patch_size, config.position_grid, config.position_mode) == (16, 256, "crop")
    with pytest.raises(ValueError, match="model_name"):
        to_ps3_vision_config({"model_name": "vit_unheard_of"}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"img_size": [70]}, "img_size"),
        ({"ps3_scales": 70}, "ps3_scales"),
        ({"trunk_args": "small"}, "trunk_args"),
        ({"trunk_args": {"patch_size": 0}}, "patch_size"),
        ({"trunk_args": {"depth": -2, "num_heads": 3, "mlp_ratio": 4.0}}, "num_hidden_layers"),
        ({"trunk_args": None, "model_name": None}, "model_name"),
        ({"max_select_num": 0}, "max_select_num"),
        ({"model_type": "ps4"}, "ps4"),
    ],
)
def test_broken_checkpoints_are_refused_by_name_and_leave_nothing(change, message, tmp_path):
    source = tmp_path / "broken"
    shutil.copytree(SOURCE, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_missing_and_misshapen_weights_are_named(tmp_path):
    source = tmp_path / "broken"
    shutil.copytree(SOURCE, source)
    weights = load_file(source / "model.safetensors")
    prompt = weights.pop("vision_model.prior_prompt")
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError, match="prior_prompt"):
        convert(source, tmp_path / "target")
    save_file({**weights, "vision_model.prior_prompt": prompt[1:].clone()}, source / "model.safetensors")
    with pytest.raises(ValueError, match="prior_prompt"):
        convert(source, tmp_path / "target")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ps3_scales": [28]}, "ps3_scales"),
        ({"ps3_scales": [56, 28]}, "ps3_scales"),
        ({"ps3_scales": [28, 28, 56]}, "ps3_scales"),
        ({"ps3_scales": [28, 70]}, "70"),
        ({"ps3_scales": [30, 60]}, "patch size"),
        ({"ps3_scales": [28, 10**7]}, "ps3_scales"),
        ({"ps3_scales": "28,56"}, "ps3_scales"),
        ({"ps3_scales": [0, 0]}, "ps3_scales"),
        ({"select_based_on_layer": [2]}, "select_based_on_layer"),
        ({"max_select_num": 0}, "max_select_num"),
        ({"max_select_num_each_scale": [1]}, "max_select_num_each_scale"),
        ({"max_select_num_each_scale": [0, 0]}, "max_select_num_each_scale"),
        ({"num_attention_heads": 5}, "heads"),
        ({"hidden_size": -24}, "hidden_size"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"position_mode": "crop"}, "position_grid"),
        ({"patch_size": "14"}, "patch_size"),
    ],
)
def test_configs_without_sense_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)
