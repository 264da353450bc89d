"""int4: the format, the layer, loading and saving; the search against autoawq's; the command."""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types

import build
import judge
import pytest
import torch
from answering import answer
from conftest import REPOSITORY
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoProcessor
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2DecoderLayer, Qwen2RotaryEmbedding
from vila import VilaForConditionalGeneration
from vila.int4_linear_vila import Int4Linear
from vila.quantization_vila import Int8Embeddings, Int8Head, power_of_two_scales
from vila.quantize import Options, quantize, statistics
from vila.quantize.calibration import calibration_chats, has_media, name_of
from vila.quantize.command import main
from vila.quantize.layers import collect_samples
from vila.quantize.llm_awq import unpack_v2
from vila.quantize.rounding import autoawq_packer, fake_quantize, grid_of, pack
from vila.quantize.search import LINEARS, clip, find_scales, fold, groups_of, loss_of, search_layer
from vila.quantize.statistics import InputStatistics, Sample, observe

GROUP = 32
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """An untrained model with layers that groups of 32 divide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "VISION", {**build.VISION, **SHAPE})
        patch.setattr(build, "TEXT", {**build.TEXT, **SHAPE, "num_key_value_heads": 1})
        return build.build(tmp_path_factory.mktemp("int4") / "source")


@pytest.fixture(scope="session")
def processor(source):
    return AutoProcessor.from_pretrained(source, trust_remote_code=True)


@pytest.fixture(scope="session")
def quantized(source, tmp_path_factory):
    return quantize(source, tmp_path_factory.mktemp("int4") / "awq", Options(group_size=GROUP, samples=6))


def load(folder, dtype="bfloat16"):
    return AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()


def ids(count=24):
    return torch.randint(5, 500, (1, count), generator=torch.Generator().manual_seed(0))


def random_layer(inputs=256, outputs=128, group_size=64, bias=True):
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias)
    return linear, pack(linear, grid_of(linear.weight, group_size, 4), use_autoawq=False)


def test_an_int8_head_is_made_again_from_what_is_saved():
    torch.manual_seed(0)
    linear = nn.Linear(64, 50, bias=False).bfloat16()
    linear.weight.data *= torch.logspace(-3, 3, 50)[:, None].bfloat16()
    head = Int8Head(linear, is_tied=False)
    assert ((head.weight - linear.weight).abs() <= power_of_two_scales(linear.weight) / 2).all()
    saved = nn.Linear(64, 50, bias=False).bfloat16()
    saved.load_state_dict(head.state_dict())
    again = Int8Head(saved, is_tied=False)
    assert torch.equal(again.values, head.values) and torch.equal(again.scales, head.scales)
    for rows in (1, 70):
        hidden = torch.randn(rows, 64).bfloat16()
        exact = hidden.float() @ head.weight.float().t()
        assert ((head(hidden).float() - exact).abs().amax(0) / exact.abs().amax(0).clamp_min(1e-6)).max() < 0.02
    assert not Int8Head(linear, is_tied=True).state_dict()


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_a_quantised_checkpoint_loads_like_any_other(quantized):
    config = json.loads((quantized / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "awq" and config["version"] == "gemm"
    model = load(quantized)
    kinds = {
        name: type(module) for name, module in model.named_modules() if name.endswith(("_proj", "fc1", "lm_head"))
    }
    int4 = {name for name, kind in kinds.items() if issubclass(kind, nn.Module) and kind.__name__ == "Int4Linear"}
    assert int4 == {f"model.language_model.layers.{n}.{name}" for n in range(2) for name in LINEARS}
    assert kinds["lm_head"] is nn.Linear
    files = load_file(quantized / "model.safetensors")
    assert {tensor.dtype for tensor in files.values()} == {torch.int32, torch.float16, torch.bfloat16}
    assert json.loads((quantized / "config.json").read_text())["dtype"] == "bfloat16"
    assert files["llm.model.layers.0.mlp.up_proj.qweight"].dtype == torch.int32
    assert files["llm.model.layers.0.mlp.up_proj.scales"].dtype == torch.float16


@torch.no_grad()
def test_logits_are_near_those_of_the_source(source, quantized):
    whole, model = load(source, "float32")(ids()).logits, load(quantized, "float32")(ids()).logits
    half = load(quantized)(ids()).logits
    assert 0 < (model - whole).abs().max() < 0.2 * whole.abs().max()
    assert (half.float() - model).abs().max() < 0.03 * model.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("grad_first", [False, True])
@pytest.mark.parametrize("forward_first", [False, True])
def test_saving_loses_nothing(quantized, tmp_path, forward_first, grad_first):
    model = load(quantized)
    if forward_first:
        with torch.set_grad_enabled(grad_first):
            model(ids())
            model(ids(4))
    expected = model(ids(4)).logits, model(ids(60)).logits
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(ids(4)).logits, expected[0]) and torch.equal(again(ids(60)).logits, expected[1])
    saved, first = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, quantized))
    assert saved["quantization_config"] == first["quantization_config"]


@torch.no_grad()
def test_a_loaded_file_is_not_written_to(quantized, tmp_path):
    shutil.copytree(quantized, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = load(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    layer = model.model.language_model.layers[0].mlp.up_proj
    assert not torch.equal(layer.qweight, stored["llm.model.layers.0.mlp.up_proj.qweight"])
    assert torch.equal(layer.state_dict()["qweight"], stored["llm.model.layers.0.mlp.up_proj.qweight"])
    model(ids(60))
    assert (tmp_path / "model.safetensors").read_bytes() == before


@torch.no_grad()
def test_it_can_be_dequantised(quantized):
    model = load(quantized, "float32")
    expected = model(ids()).logits
    dense = model.dequantize()
    assert type(dense.model.language_model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.allclose(dense(ids()).logits, expected, atol=1e-4)
    assert getattr(dense.config, "quantization_config", None) is None


def test_a_missing_weight_is_an_error(quantized, tmp_path):
    shutil.copytree(quantized, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["llm.model.layers.1.mlp.up_proj.qzeros"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weight.*layers\.1\.mlp\.up_proj\.qzeros"):
        VilaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [{"bits": 8}, {"zero_point": False}, {"version": "gemv"}, {"head_bits": 4}])
def test_other_formats_are_refused(quantized, tmp_path, change):
    shutil.copytree(quantized, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"4 bits|head_bits|Invalid"):
        VilaForConditionalGeneration.from_pretrained(tmp_path)


def test_options_and_configs_still_work_where_a_class_is_called(quantized):
    model = VilaForConditionalGeneration.from_pretrained(quantized, vision_chunk_size=3, dtype="float32")
    assert model.config.vision_chunk_size == 3 and model.dtype == torch.float32
    assert isinstance(model.model.language_model.layers[0].mlp.up_proj, Int4Linear)


def test_answers_are_the_same_in_a_fresh_process_without_the_package(quantized, processor, tmp_path):
    """Nor gptqmodel or accelerate, which transformers' own way to load such a checkpoint needs."""
    episodes = list(judge.TRIALS["compare"].episodes(2))
    expected = answer(load(quantized), processor, episodes, 8)
    for number, episode in enumerate(episodes):
        for place, block in enumerate(episode.media[0]):
            block["image"].save(tmp_path / f"{number}-{place}.png")
    code = (
        "import sys, json; sys.modules['vila'] = sys.modules['gptqmodel'] = sys.modules['accelerate'] = None\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype='bfloat16').eval()\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "chats = json.loads(sys.argv[2])\n"
        "inputs = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True,\n"
        "    return_tensors='pt')\n"
        "output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs['input_ids'].shape[1]:]\n"
        "print(json.dumps(processor.batch_decode(output, skip_special_tokens=True)))\n"
    )
    chats = []
    for number, episode in enumerate(episodes):
        blocks = [{"type": "image", "path": str(tmp_path / f"{number}-{place}.png")} for place in range(2)]
        chats.append([{"role": "user", "content": [*blocks, {"type": "text", "text": episode.target.question}]}])
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", code, str(quantized), json.dumps(chats)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) == expected


# ------------------------------------------------------------------------------------------------------ the search


def decoder_layer(heads=4, kv_heads=4, lengths=(20, 33)):
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=1,
    )
    config._attn_implementation = "sdpa"
    layer = Qwen2DecoderLayer(config, 0).eval()
    for weight in layer.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    rotary, samples = Qwen2RotaryEmbedding(config), []
    outliers = torch.ones(64)
    outliers[5] = 20
    for length in lengths:
        hidden = torch.randn(1, length, 64) * outliers
        positions = rotary(hidden, torch.arange(length)[None])
        samples.append(Sample(hidden, {"position_embeddings": positions, "attention_mask": None}))
    return layer, samples


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_folding_changes_nothing(kv_heads):
    layer, samples = decoder_layer(kv_heads=kv_heads)
    before = [sample.run(layer) for sample in samples]
    groups = list(groups_of(layer))
    assert len(groups) == (4 if kv_heads == 4 else 3)
    for group in groups:
        fold(group, torch.rand(group.linears[0].in_features) + 0.5)
    for sample, expected in zip(samples, before):
        assert torch.allclose(sample.run(layer), expected, atol=1e-4 * expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("bits", [3, 4])
def test_no_group_is_worse_than_plain_rounding(bits):
    layer, samples = decoder_layer()
    expected = [sample.run(layer) for sample in samples]
    plain = copy.deepcopy(layer)
    found = search_layer(layer, samples, GROUP, bits, duo=True, clips=True)
    assert set(found) == {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}
    assert all(one.loss <= one.plain_loss for one in found.values())
    assert any(one.loss < 0.9 * one.plain_loss for one in found.values())
    errors = []
    for each in (layer, plain):
        for name in LINEARS:
            linear = each.get_submodule(name)
            linear.weight.data = fake_quantize(linear.weight, GROUP, bits)
        errors.append(sum((sample.run(each) - one).square().mean() for sample, one in zip(samples, expected)))
    assert errors[0] < errors[1]


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_losses_of_linear_groups_are_the_errors_of_the_outputs(count):
    """With fewer tokens than features, and with more."""
    layer, samples = decoder_layer(lengths=(20, 200))
    watched = {name: layer.get_submodule(name) for name in dict.fromkeys(LINEARS.values())}
    known, inputs = observe(layer, samples[:count], watched, GROUP)
    assert (known["mlp.down_proj"].gram is None) == (count == 1)
    (group,) = [group for group in groups_of(layer) if group.name == "mlp.down_proj"]
    (linear,) = group.linears
    changed = fake_quantize(linear.weight, GROUP, 3)
    found = loss_of(layer, group, samples, inputs, known)([changed])
    rows = torch.cat([one["mlp.down_proj"].flatten(0, 1) for one in inputs])
    exact = (rows @ (changed - linear.weight).t()).square().mean().item()
    assert found == pytest.approx(exact, rel=1e-4)
    best = find_scales(group, known[group.name], loss_of(layer, group, samples, inputs, known), GROUP, 3, True)
    assert best.plain_loss == pytest.approx(exact, rel=1e-4) and best.loss <= best.plain_loss


@torch.no_grad()
def test_what_judges_an_mlp_is_spread_over_all_samples(monkeypatch):
    monkeypatch.setattr(statistics, "JUDGED_TOKENS", 40)
    layer, samples = decoder_layer(lengths=(60, 60, 80))
    watched = {name: layer.get_submodule(name) for name in dict.fromkeys(LINEARS.values())}
    known, inputs = observe(layer, samples, watched, GROUP)
    assert ["self_attn.q_proj" in one for one in inputs] == [True, False, False]
    assert [one["mlp.gate_proj"].shape[1] for one in inputs] == [12, 12, 16]
    (group,) = [group for group in groups_of(layer) if group.name == "mlp.gate_proj"]
    rows = torch.cat([one["mlp.gate_proj"][0] for one in inputs])
    expected = layer.mlp(rows)
    rounded = [fake_quantize(linear.weight, GROUP, 3) for linear in group.linears]
    found = loss_of(layer, group, samples, inputs, known)(rounded)
    for linear, weight in zip(group.linears, rounded):
        linear.weight.data = weight
    assert found == pytest.approx((layer.mlp(rows) - expected).square().mean().item(), rel=1e-4)


@torch.no_grad()
def test_media_are_part_of_the_calibration(source, processor):
    model = load(source, "float32")
    chats = calibration_chats(None, 8, media_share=1.0)
    assert all(map(has_media, chats))
    samples = collect_samples(model, processor, chats, max_tokens=40)
    assert all(sample.hidden.shape[1] <= 40 for sample in samples)
    whole = collect_samples(model, processor, chats[:1], max_tokens=10_000)[0]
    inputs = processor.apply_chat_template(chats[0], tokenize=True, return_dict=True, return_tensors="pt")
    assert whole.hidden.shape[1] == inputs["input_ids"].shape[1]
    placeholders = inputs["input_ids"][0] != model.config.image_token_id
    plain = model.get_input_embeddings()(inputs["input_ids"].clamp_max(model.config.text_config.vocab_size - 1))
    changed = (whole.hidden[0] != plain[0]).any(-1)
    assert changed.any() and not changed[placeholders & (inputs["input_ids"][0] != model.config.video_token_id)].any()
    outputs = whole.run(model.model.language_model.layers[0])
    hidden = model(**inputs, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(outputs, hidden, atol=1e-4)
    cut = collect_samples(model, processor, chats[:1], max_tokens=12)[0]
    assert torch.allclose(cut.run(model.model.language_model.layers[0]), hidden[:, :12], atol=1e-4)


# ---------------------------------------------------------------------------------------------- autoawq, the oracle


@pytest.fixture(scope="module")
def autoawq():
    """autoawq with the bug of its search on CPUs mended: what it restores are the weights that it changed."""
    if importlib.util.find_spec("awq") is None:
        pytest.skip("autoawq is not installed")
    if importlib.util.find_spec("datasets") is None:  # only its own calibration sets need it
        stub = types.ModuleType("datasets")
        stub.load_dataset = None
        sys.modules["datasets"] = stub
    autoawq_packer.cache_clear()
    from awq.quantize.quantizer import AwqQuantizer

    quantizer = AwqQuantizer.__new__(AwqQuantizer)
    quantizer.w_bit, quantizer.group_size, quantizer.zero_point = 4, GROUP, True
    quantizer.max_chunk_memory, quantizer.n_parallel_calib_samples = 2**30, None
    return quantizer


@pytest.mark.parametrize("bias", [False, True])
def test_packing_is_bit_equal_to_autoawqs(autoawq, bias):
    torch.manual_seed(0)
    linear = nn.Linear(256, 128, bias)
    linear.weight.data[0] = 0  # a row without any range
    grid = grid_of(linear.weight, GROUP, 4)
    own, theirs = pack(linear, grid, use_autoawq=False), pack(linear, grid, use_autoawq=True)
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


@torch.no_grad()
@pytest.mark.parametrize("duo", [False, True])
def test_scales_are_those_of_autoawq(autoawq, duo):
    autoawq.duo_scaling = duo
    layer, samples = decoder_layer()
    samples = samples[:1]
    watched = {name: layer.get_submodule(name) for name in dict.fromkeys(LINEARS.values())}
    known, inputs = observe(layer, samples, watched, GROUP)
    inspected = {"self_attn.q_proj": layer.self_attn, "mlp.gate_proj": layer.mlp}
    for group in groups_of(layer):
        loss = loss_of(layer, group, samples, inputs, known)
        own = find_scales(group, known[group.name], loss, GROUP, 4, duo)
        module = inspected.get(group.name, group.linears[0])
        options = samples[0].options if module is layer.self_attn else {}
        x = inputs[0][group.name]
        weights = torch.cat([linear.weight for linear in group.linears])
        grouped = weights.abs().view(-1, GROUP)
        share = (grouped / (grouped.amax(1, keepdim=True) + 1e-6)).view(weights.shape).mean(0)
        state = module.state_dict
        module.state_dict = lambda state=state: {name: value.clone() for name, value in state().items()}
        reference = autoawq._module_forward(x, module, options)
        found = autoawq._compute_best_scale(
            x, share, x.abs().view(-1, x.shape[-1]).mean(0), module, list(group.linears), reference, options
        )
        del module.state_dict
        if own.loss < own.plain_loss:
            assert torch.allclose(own.scales, found, rtol=1e-4), group.name


@torch.no_grad()
def test_clipping_is_that_of_autoawq(autoawq):
    torch.manual_seed(0)
    weight, rows = torch.randn(64, 96) ** 3, torch.randn(200, 96)
    found = autoawq._compute_best_clip(weight.clone(), rows)
    statistics = InputStatistics(96, len(rows), GROUP, rows.device)
    statistics.add(rows)
    own = clip(weight, statistics.blocks, 4)
    assert torch.allclose(own, found.view(64, -1), rtol=1e-4)


# -------------------------------------------------------------------------------------------- files of llm-awq, v2


@pytest.mark.parametrize("shape", [(128, 128), (256, 64), (64, 384)])
def test_the_v2_layout_is_that_of_autoawqs_fast_kernel(autoawq, shape):
    """autoawq knows the layout as `gemv_fast`."""
    from awq.modules.linear.gemv_fast import pack_intweight

    values = torch.randint(0, 16, shape, dtype=torch.int32)
    assert torch.equal(unpack_v2(pack_intweight(values, interleave=4, kstride=64)), values.to(torch.uint8))


@pytest.fixture
def published(source, autoawq, tmp_path):
    """A file as llm-awq writes it, with the layers of `source` rounded, and one changed norm."""
    from awq.modules.linear.gemv_fast import WQLinear_GEMVFast

    model, tensors = load(source, "float32"), {}
    for name, tensor in model.model.language_model.state_dict().items():
        tensors[f"model.{name}"] = tensor
    for number, layer in enumerate(model.model.language_model.layers):
        for name in LINEARS:
            linear, full = layer.get_submodule(name), f"model.layers.{number}.{name}"
            grid = grid_of(linear.weight, GROUP, 4)
            linear.weight.data = grid.round(linear.weight)
            packed = WQLinear_GEMVFast.from_linear(linear, 4, GROUP, scales=grid.scales, zeros=grid.zeros)
            del tensors[f"{full}.weight"]
            tensors[f"{full}.qweight"], tensors[f"{full}.scales"] = packed.qweight, packed.scales
            tensors[f"{full}.scaled_zeros"] = packed.qzeros
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    tensors["lm_head.weight"] = model.lm_head.weight.data
    torch.save(tensors, tmp_path / "model-v2.pt")
    return tmp_path / "model-v2.pt"


@torch.no_grad()
def test_published_weights_become_a_checkpoint(source, published, tmp_path):
    options = ["--group-size", str(GROUP), "--dtype", "float32"]
    main([str(source), str(tmp_path / "out"), "--from-llm-awq", str(published), *options])
    model, expected = load(tmp_path / "out", "float32"), load(source, "float32")
    for layer in expected.model.language_model.layers:
        for name in LINEARS:
            linear = layer.get_submodule(name)
            linear.weight.data = fake_quantize(linear.weight, GROUP, 4)
    expected.model.language_model.norm.weight.mul_(1.5)
    assert torch.allclose(model(ids()).logits, expected(ids()).logits, atol=2e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda tensors: tensors.pop("model.layers.0.input_layernorm.weight"),
            "lacks 1 tensor.*layers.0.input_layernorm",
        ),
        (lambda tensors: [tensors.pop(name) for name in [*tensors] if "scaled_zeros" in name], "no int4 layers"),
        (
            lambda tensors: tensors.update(
                {
                    "model.layers.7.mlp.up_proj.qweight": tensors["model.layers.0.mlp.up_proj.qweight"],
                    "model.layers.7.mlp.up_proj.scales": tensors["model.layers.0.mlp.up_proj.scales"],
                    "model.layers.7.mlp.up_proj.scaled_zeros": tensors["model.layers.0.mlp.up_proj.scaled_zeros"],
                }
            ),
            "layers.7.mlp.up_proj",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.scales": torch.ones(1, 128)}),
            "layers.0.mlp.up_proj",
        ),
    ],
)
def test_published_weights_that_do_not_fit_are_named(source, published, tmp_path, change, message):
    tensors = torch.load(published, weights_only=True)
    change(tensors)
    torch.save(tensors, published)
    with pytest.raises(SystemExit, match=message):
        main([str(source), str(tmp_path / "out"), "--from-llm-awq", str(published), "--group-size", str(GROUP)])
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_runs_code_is_refused(source, tmp_path):
    torch.save({"model": os.getcwd}, tmp_path / "v2.pt")
    with pytest.raises(SystemExit, match="holds more than tensors"):
        main([str(source), str(tmp_path / "out"), "--from-llm-awq", str(tmp_path / "v2.pt")])


# ------------------------------------------------------------------------------------------------------ the command


def test_a_run_that_was_stopped_goes_on_with_the_same_result(source, quantized, tmp_path, monkeypatch):
    import vila.quantize.layers as layers

    options, searched = Options(group_size=GROUP, samples=6), []

    def search(*arguments):
        searched.append(arguments)
        if len(searched) == 2:
            raise KeyboardInterrupt
        return search_layer(*arguments)

    monkeypatch.setattr(layers, "search_layer", search)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", options)
    with pytest.raises(FileExistsError, match="other options"):
        quantize(source, tmp_path / "out", Options(group_size=GROUP, samples=5))
    quantize(source, tmp_path / "out", options)
    assert len(searched) == 3
    one, two = (load_file(folder / "model.safetensors") for folder in (quantized, tmp_path / "out"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items()) and one.keys() == two.keys()
    assert {path.name for path in quantized.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.slow
def test_gptq_is_an_int4_variant_too(source, tmp_path):
    """In a process of its own, with packages from a folder of their own."""
    packages = REPOSITORY / ".venv" / "gptq"
    if not packages.is_dir() and importlib.util.find_spec("optimum") is None:
        pytest.skip("optimum and gptqmodel are not installed")
    path = os.pathsep.join(filter(None, (str(packages), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "vila.quantize", str(source), str(tmp_path / "out"), "--method", "gptq"]
    command += ["--group-size", str(GROUP), "--samples", "6"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
    main([str(source), str(tmp_path / "rtn"), "--group-size", str(GROUP), "--method", "rtn"])
    model, plain, whole = (load(folder, "float32") for folder in (tmp_path / "out", tmp_path / "rtn", source))
    with torch.no_grad():
        assert type(model.model.language_model.layers[1].mlp.up_proj).__name__ == "Int4Linear"
        processor = AutoProcessor.from_pretrained(source)
        chats = calibration_chats(None, 6)
        errors = [0.0, 0.0]
        for chat in chats:
            inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
            expected = whole(**inputs).logits
            for number, each in enumerate((model, plain)):
                errors[number] += (each(**inputs).logits - expected).square().mean().item()
        assert errors[0] < errors[1]


def test_gptq_without_its_packages_says_what_to_install(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optimum.gptq", None)
    with pytest.raises(SystemExit, match=r"vila-hf\[quantize\]"):
        main([str(source), str(tmp_path / "out"), "--group-size", str(GROUP), "--method", "gptq"])
    assert not (tmp_path / "out").exists()


def test_the_report_tells_losses_and_options(quantized):
    report = json.loads((quantized / "quantization_report.json").read_text())
    assert report["method"] == "awq" and report["group_size"] == GROUP and list(report["losses"]) == ["0", "1"]
    for groups in report["losses"].values():
        assert len(groups) == 3 and all(loss <= plain for loss, plain in groups.values())


def test_calibration_data_of_ones_own(source, processor, tmp_path):
    picture = judge.episode_of("naming", "train", 0, 0).media[0][0]["image"]
    (tmp_path / "data").mkdir()
    picture.save(tmp_path / "data" / "one.png")
    (tmp_path / "data" / "two.txt").write_text("Some text. " * 300)
    rows = [{"text": "Hello"}, {"messages": [{"role": "user", "content": [{"type": "image", "path": "one.png"}]}]}]
    (tmp_path / "data" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chats = calibration_chats(tmp_path / "data", 100)
    assert sum(map(has_media, chats)) == 2 and len(chats) >= 4
    assert len(calibration_chats(tmp_path / "data" / "rows.jsonl", 1, media_share=1.0)) == 1
    assert has_media(calibration_chats(tmp_path / "data" / "rows.jsonl", 1, media_share=1.0)[0])
    options = ["--group-size", str(GROUP), "--samples", "4", "--calibration", str(tmp_path / "data")]
    main([str(source), str(tmp_path / "out"), *options, "--max-tokens", "50", "--head-bits", "8"])
    model = load(tmp_path / "out")
    assert type(model.lm_head).__name__ == "Int8Head" and model.lm_head.is_tied
    embeddings = model.get_input_embeddings()
    assert embeddings.head is model.lm_head and type(embeddings).__name__ == "Int8Embeddings"
    model(ids())
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(ids()).logits, model(ids()).logits)
        # one weight, in eight bits, for both: an ordinary model of these rounded weights says the same
        precise = load(tmp_path / "out", "float32")
        expected = precise(ids()).logits
        dense = precise.dequantize()
        assert type(dense.lm_head) is nn.Linear and dense.lm_head.weight is dense.get_input_embeddings().weight
        assert torch.allclose(dense(ids()).logits, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_embeddings_that_share_an_int8_head_are_its_rows(dtype):
    torch.manual_seed(0)
    table = nn.Embedding(50, 64, dtype=dtype)
    head = nn.Linear(64, 50, bias=False, dtype=dtype)
    head.weight = table.weight
    rounded = Int8Head(head, is_tied=True)
    embeddings = Int8Embeddings(rounded)
    found = embeddings(torch.tensor([[3, 49], [0, 3]]))
    assert found.dtype == dtype and torch.equal(found[0, 1], rounded.weight[49])
    step = power_of_two_scales(table.weight)
    assert ((embeddings.weight - table.weight).abs() <= step / 2).all()
    assert torch.equal(embeddings.state_dict()["weight"], embeddings.weight) and not rounded.state_dict()


def test_chats_are_the_same_for_the_same_seed():
    one, two, other = (calibration_chats(None, 6, seed=seed) for seed in (0, 0, 1))
    assert repr_of(one) == repr_of(two) != repr_of(other)
    assert sum(map(has_media, one)) == 4


def test_conversations_are_a_source_and_told_from_each_other(source, tmp_path):
    chats = calibration_chats(None, 4)
    assert sorted(map(str, repr_of(calibration_chats(chats, 4)))) == sorted(map(str, repr_of(chats)))
    with pytest.raises(ValueError, match="the calibration holds no conversations"):
        calibration_chats([], 4)
    others = copy.deepcopy(chats)
    block = next(block for chat in others for message in chat for block in message["content"] if "image" in block)
    block["image"].putpixel((0, 0), (1, 2, 3))
    assert name_of(chats) == name_of(copy.deepcopy(chats)) != name_of(others)
    quantize(source, tmp_path / "out", Options(group_size=GROUP, samples=2, max_tokens=64), chats[:2])
    assert load(tmp_path / "out") is not None


def repr_of(chats):
    return [[(block["type"], block.get("text")) for message in chat for block in message["content"]] for chat in chats]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--group-size", "96"], "self_attn.q_proj has 64 inputs, which groups of 96 do not divide"),
        (["--calibration", "nowhere"], "no calibration data at nowhere"),
        (["--samples", "0"], "at least 1"),
        (["--media-share", "2"], "between 0 and 1"),
    ],
)
def test_bad_options_leave_nothing_behind(source, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        main([str(source), str(tmp_path / "out"), "--group-size", str(GROUP), *options])
    assert not (tmp_path / "out").exists()


def test_quantised_and_foreign_folders_are_refused(source, quantized, tmp_path):
    with pytest.raises(SystemExit, match="quantised already"):
        main([str(quantized), str(tmp_path / "out"), "--group-size", str(GROUP), "--method", "rtn"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit, match="not empty"):
        main([str(source), str(tmp_path / "full"), "--group-size", str(GROUP), "--method", "rtn"])


@pytest.mark.parametrize("row, message", [("{", "no JSON"), ("{}", 'neither "messages" nor "text"')])
def test_bad_rows_are_named(tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' + row)
    with pytest.raises(ValueError, match=f"line 2 of .*{message}"):
        calibration_chats(tmp_path / "rows.jsonl", 4)


def test_the_module_runs_as_a_command(source, tmp_path):
    command = [sys.executable, "-m", "vila.quantize", str(source), str(tmp_path / "out"), "--method", "rtn"]
    done = subprocess.run([*command, "--group-size", str(GROUP)], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "out")
    assert (REPOSITORY / "quantize" / "__main__.py").is_file() and load(tmp_path / "out") is not None
