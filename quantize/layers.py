"""Quantises the decoder layers of a model, one after the other; what is done is kept on disk."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from ..int4_linear_vila import Int4Linear, check_shape
from .gptq import search_gptq
from .options import Options
from .rounding import Grid, grid_of, pack
from .search import LINEARS, Found, search_layer
from .statistics import Sample, first_layer_sample

Losses = dict[str, list[float]]


def check_layers(model: Any, options: Options) -> None:
    """
    Raises:
        ValueError: naming a layer that is not of the Llama form, or that groups of that size do not divide.
    """
    for number, layer in enumerate(model.model.language_model.layers):
        named = dict(layer.named_modules())
        for name in LINEARS:
            if type(named.get(name)) is not nn.Linear:
                raise ValueError(f"layer {number} of the language model has no linear layer {name!r}")
            linear = named[name]
            check_shape(f"layers.{number}.{name}", linear.in_features, linear.out_features, options.group_size)


def collect_samples(model: Any, processor: Any, chats: list[Any], max_tokens: int) -> list[Sample]:
    """Inputs of the first decoder layer, each conversation with its own positions."""
    samples = []
    for chat in tqdm(chats, desc="calibrate", unit="chat"):
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        samples.append(first_layer_sample(model, inputs, max_tokens))
    return samples


@torch.no_grad()
def quantize_layers(
    model: Any, samples: list[Sample], options: Options, folder: Path, device: torch.device
) -> dict[str, Losses]:
    """Quantises all decoder layers in place; layers whose files are in `folder` are taken from there.

    Args:
        samples: inputs of the first layer; none are needed for plain rounding.
        folder: gets a file per layer.

    Returns:
        by layer and group, the mean squared error of the outputs and that of plain rounding.
    """
    losses = {}
    for number, layer in enumerate(tqdm(model.model.language_model.layers, desc="quantise", unit="layer")):
        file, dtype = folder / f"{number:03}.safetensors", layer.input_layernorm.weight.dtype
        layer.to(device, torch.float32)
        # AWQ searches on what the layers gave before, GPTQ on what they give now, to make up for earlier errors
        outputs = [sample.run(layer) for sample in samples] if options.method == "awq" else []
        if not file.is_file():
            found, grids = dict[str, Found](), dict[str, Grid]()
            if options.method == "awq":
                found = search_layer(layer, samples, options.group_size, options.bits, options.duo, options.clips)
            elif options.method == "gptq":
                grids = search_gptq(layer, samples, options.group_size, options.bits)
            report = {name: [one.loss, one.plain_loss] for name, one in found.items()}
            file.with_suffix(".json").write_text(json.dumps(report), encoding="utf-8")
            save_layer(layer, grids, options, dtype, file)
        load_layer(layer, options.group_size, dtype, file)
        if options.method == "gptq":
            outputs = [sample.run(layer.to(device, torch.float32)) for sample in samples]
            layer.to("cpu", dtype)
        samples = [Sample(output.to("cpu", dtype), one.options) for output, one in zip(outputs, samples)]
        losses[str(number)] = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    return losses


def save_layer(layer: Any, grids: dict[str, Grid], options: Options, dtype: torch.dtype, file: Path) -> None:
    """Packs the linear layers into a file, with what else the search has changed; it is there as a whole or not.

    Args:
        grids: of layers whose grid is not that from their least to their largest weights.
    """
    tensors = {name: tensor.to(dtype) for name, tensor in layer.state_dict().items()}
    named = dict(layer.named_modules())
    for name in LINEARS:
        linear = named[name]
        packed = pack(linear, grids.get(name) or grid_of(linear.weight, options.group_size, options.bits))
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed.state_dict().items() if part != "bias"}
    unfinished = file.with_suffix(".unfinished")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
    os.replace(unfinished, file)


def load_layer(layer: Any, group_size: int, dtype: torch.dtype, file: Path) -> None:
    """Puts what `save_layer` wrote in the place of the layer's weights."""
    layer.to("cpu", dtype)
    named = dict(layer.named_modules())
    for name in LINEARS:
        linear = named[name]
        packed = Int4Linear(linear.in_features, linear.out_features, group_size, linear.bias is not None)
        layer.set_submodule(name, packed)
    layer.load_state_dict(load_file(file), assign=True)
