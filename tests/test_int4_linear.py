"""The int4 layer: its format, its kernels, the order in which a CPU keeps it."""

import copy
import threading

import pytest
import torch
from torch import nn
from vila import int4_linear_vila
from vila.int4_linear_vila import Int4Linear, pack_int4, unpack_int4
from vila.quantize.rounding import fake_quantize, grid_of, pack


def random_layer(inputs=256, outputs=128, group_size=64, bias=True):
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias)
    return linear, pack(linear, grid_of(linear.weight, group_size, 4), use_autoawq=False)


def test_packing_is_undone_by_unpacking():
    values = torch.randint(0, 16, (24, 64))
    assert torch.equal(unpack_int4(pack_int4(values)), values.to(torch.uint8))
    one = torch.zeros(1, 8, dtype=torch.int64)
    one[0, 2] = 15  # the third column is the second nibble
    assert pack_int4(one).item() == 15 << 4


def test_a_packed_layer_multiplies_by_the_rounded_weights():
    linear, layer = random_layer()
    rounded = fake_quantize(linear.weight, 64, 4)
    assert torch.allclose(layer.dequantize().t(), rounded, atol=2e-4)  # scales are stored in half precision
    assert torch.allclose(layer.dequantize(torch.bfloat16).float(), layer.dequantize(), atol=2e-3)
    hidden = torch.randn(2, 3, 256)
    assert torch.allclose(layer(hidden), hidden @ layer.dequantize() + layer.bias, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 8, 48, 49, 200])
@pytest.mark.parametrize("group_size", [32, 64, 128, 16])
def test_few_and_many_rows_multiply_by_the_same_weights(rows, group_size):
    _, layer = random_layer(group_size=group_size)
    hidden = torch.randn(rows, 256).bfloat16()
    exact = hidden.float() @ layer.dequantize() + layer.bias
    assert (layer(hidden).float() - exact).norm() < 5e-3 * exact.norm()


def test_gradients_pass_through_without_changing_what_comes_after():
    _, layer = random_layer()
    hidden = torch.randn(4, 256).bfloat16()
    before = layer(hidden)
    leaf = hidden.clone().requires_grad_()
    layer(leaf).float().sum().backward()
    expected = layer.dequantize(torch.bfloat16).float().sum(1)
    assert torch.allclose(leaf.grad.float(), expected.expand(4, -1), rtol=0.02, atol=0.02)
    assert torch.equal(layer(hidden), before)


def test_a_cast_keeps_the_stored_scales():
    _, layer = random_layer()
    scales = layer.scales.clone()
    layer.to(torch.bfloat16)
    assert layer.scales.dtype == torch.float16 and torch.equal(layer.scales, scales)
    assert layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("inputs, outputs, group_size", [(100, 64, 64), (64, 60, 32), (64, 64, 0)])
def test_shapes_that_do_not_fit_are_named(inputs, outputs, group_size):
    with pytest.raises(ValueError, match=r"\d+ (inputs|outputs)"):
        Int4Linear(inputs, outputs, group_size)


SHAPES = [(256, 128, 64), (96, 200, 32), (2176, 1000, 128), (6, 8, 3)]


def arranged(inputs=256, outputs=128, group_size=64):
    _, layer = random_layer(inputs, outputs, group_size)
    plain = copy.deepcopy(layer)
    layer.arrange()
    assert not torch.equal(layer.qweight, plain.qweight)
    return layer, plain


@pytest.mark.parametrize("inputs, outputs, group_size", SHAPES)
def test_an_arranged_layer_holds_the_same_weights(inputs, outputs, group_size, monkeypatch):
    monkeypatch.setattr(int4_linear_vila, "CACHED_WEIGHTS", 2**16)  # several chunks, the last one shorter
    layer, plain = arranged(inputs, outputs, group_size)
    assert torch.equal(layer.dequantize(), plain.dequantize())
    hidden = torch.randn(60, inputs).bfloat16()
    weight = plain.dequantize().bfloat16()
    assert torch.equal(layer(hidden), nn.functional.linear(hidden, weight.t().contiguous(), layer.bias.bfloat16()))
    assert torch.allclose(layer(hidden[:2]).float(), plain(hidden[:2]).float(), rtol=0.02, atol=0.02)


def test_an_arranged_layer_saves_and_loads_the_format():
    layer, plain = arranged()
    hidden = torch.randn(60, 256).bfloat16()
    outputs = layer(hidden), layer(hidden[:2])
    for state in (layer.state_dict(), copy.deepcopy(layer).state_dict()):
        assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    _, other = random_layer()
    other.scales.mul_(2)
    other.arrange()
    other(hidden), other(hidden[:2])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(hidden[:2]), outputs[1])
    other.arrange()
    assert torch.equal(other(hidden), outputs[0])


def test_an_arranged_layer_that_moves_is_in_the_format_again():
    layer, plain = arranged()
    layer.to("cpu", torch.bfloat16)
    assert not torch.equal(layer.qweight, plain.qweight)
    moved = []
    layer._apply(lambda tensor: moved.append(tensor.clone()) or tensor.to("meta"))
    assert any(tensor.shape == plain.qweight.shape and torch.equal(tensor, plain.qweight) for tensor in moved)


def test_gradients_of_an_arranged_layer_survive_the_next_layer():
    layer, plain = arranged()
    leaf = torch.randn(60, 256).bfloat16().requires_grad_()
    output = layer(leaf)
    with torch.inference_mode():
        arranged(256, 512)[0](leaf.detach())
    with torch.no_grad():
        _, other = random_layer()
        other.scales.mul_(3)
        other.arrange()
        other(leaf)
    output.float().sum().backward()
    assert torch.allclose(leaf.grad.float(), plain.dequantize().sum(1).expand(60, -1), rtol=0.02, atol=0.02)


def test_threads_do_not_share_dequantised_weights():
    layers = [arranged(outputs=128 * n)[0] for n in (1, 2)]
    hidden = torch.randn(60, 256).bfloat16()
    expected, wrong = [layer(hidden) for layer in layers], []

    def work(layer, output):
        wrong.extend(n for n in range(200) if not torch.equal(layer(hidden), output))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(layers, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_compiled_layer_answers_alike():
    layer, _ = arranged()
    hidden = torch.randn(60, 256).bfloat16()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(hidden).float(), layer(hidden).float(), rtol=0.02, atol=0.02)
