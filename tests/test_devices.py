"""More than one device: layers placed by accelerate, and layers shared out among processes, answer like one device."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import COMMITTED_GOLDENS, REPOSITORY, GoldenCase
from transformers import AutoModel, AutoProcessor

LITE, S2, LLAMA = "nvila_lite_image", "nvila_dynamic_s2_image", "vila15_llama3_image"
TIMEOUT = 300  # seconds, after which two processes that wait for each other are ended
PARTS = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")


def load(folder, **options):
    return AutoModel.from_pretrained(folder, dtype="float32", **options).eval()


@torch.no_grad()
def ask(model, inputs):
    return model(**inputs).logits, model.generate(**inputs, max_new_tokens=8, do_sample=False)


@pytest.fixture(scope="module")
def asked(converted):
    """`asked(name)`: a folder, what is asked of it, and the logits and ids of the model on one device."""
    known = {}

    def ask_once(name):
        if name not in known:
            folder, case = converted(name), GoldenCase(COMMITTED_GOLDENS / "vila" / name)
            inputs = AutoProcessor.from_pretrained(folder).apply_chat_template(
                case.chats[0], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            known[name] = (folder, inputs, *ask(load(folder), inputs))
        return known[name]

    return ask_once


def same(found, logits, ids):
    torch.testing.assert_close(found[0], logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[1], ids)


# --------------------------------------------------------------------------------------------------------- accelerate


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("name", [LITE, S2])
def test_small_devices_hold_whole_layers_and_answer_alike(name, share, asked, tmp_path):
    """What a device has no room for is offloaded to the disk; while a layer runs, its weights are fetched."""
    folder, inputs, *expected = asked(name)
    total = sum(weight.numel() * weight.element_size() for weight in load(folder).parameters())
    model = load(folder, device_map="auto", max_memory={"cpu": int(share * total)}, offload_folder=tmp_path)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert any(weight.is_meta for weight in model.parameters())
    assert not [name for name in model.hf_device_map if re.search(r"layers\.\d+\.", name)]
    same(ask(model, inputs), *expected)


@pytest.mark.parametrize("offloaded", PARTS)
def test_any_part_may_lie_elsewhere(offloaded, asked, tmp_path):
    folder, inputs, *expected = asked(LITE)
    places = {part: "disk" if part == offloaded else "cpu" for part in PARTS}
    model = load(folder, device_map=places, offload_folder=tmp_path)
    assert all(weight.is_meta for name, weight in model.named_parameters() if name.startswith(offloaded))
    same(ask(model, inputs), *expected)


# --------------------------------------------------------------------------------------------------- tensor parallel


@pytest.fixture(scope="module")
def shared_out(asked, tmp_path_factory):
    """Answers of two processes, each of which holds half of every layer of the language model."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    requests, answers = folder / "requests.pt", folder / "answers.pt"
    torch.save(
        {name: {"folder": str(asked(name)[0]), "inputs": dict(asked(name)[1])} for name in (LITE, LLAMA)}, requests
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, REPOSITORY / "tests" / "tensor_parallel.py", requests, answers],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    return torch.load(answers, weights_only=True)


@pytest.mark.slow  # three processes start
@pytest.mark.parametrize("name", [LITE, LLAMA])
def test_two_processes_answer_like_one(name, shared_out, asked):
    folder, _, *expected = asked(name)
    found = shared_out[name]
    same((found["logits"], found["ids"]), *expected)
    whole = load(folder).model.language_model.layers[0].mlp.gate_proj.weight
    assert 2 * found["rows"] == len(whole)
