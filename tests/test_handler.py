"""The entry of Inference Endpoints: loaded by its path, as they load it, from a folder that is ready for the Hub."""

import base64
import importlib.util
import io

import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from vila.staging_vila import stage

NANO = REPOSITORY / "checkpoints" / "vila-nano"


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = stage(NANO, tmp_path_factory.mktemp("endpoint")).folder
    specification = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    found = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(found)
    found.folder = folder
    return found


@pytest.fixture(scope="module")
def handler(module):
    return module.EndpointHandler(str(module.folder))


def data_uri(picture):
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def chat(*blocks):
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": "Which shapes are there?"}]}]


def picture_block(picture):
    return {"type": "image_url", "image_url": {"url": data_uri(picture)}}


RED, BLUE = (Image.new("RGB", (120, 80), colour) for colour in ("red", "blue"))


def test_a_chat_with_a_picture_is_answered(handler):
    (answer,) = handler({"inputs": chat(picture_block(RED)), "parameters": {"max_new_tokens": 8}})
    assert answer.keys() == {"generated_text"} and isinstance(answer["generated_text"], str)


def test_the_answer_is_that_of_the_pipeline_and_its_options_count(handler):
    request = {"inputs": chat(picture_block(RED), picture_block(BLUE)), "parameters": {"max_new_tokens": 8}}
    inputs = handler.pipeline.processor.apply_chat_template(
        request["inputs"], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = handler.pipeline.model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert handler(request)[0]["generated_text"] == handler.pipeline.processor.decode(ids, skip_special_tokens=True)
    request["parameters"]["max_new_tokens"] = 1
    (short,) = handler(request)
    assert len(handler.pipeline.tokenizer(short["generated_text"])["input_ids"]) <= 1


def test_messages_and_a_plain_text_are_requests_too(handler):
    parameters = {"max_new_tokens": 4}
    text = handler({"inputs": "Which shapes are there?", "parameters": parameters})
    assert text == handler({"messages": chat(), "parameters": parameters})


def test_sampling_is_turned_on_by_its_options(module):
    assert module.as_options({"temperature": 1})["do_sample"] is True
    assert module.as_options({"top_p": 0.5, "do_sample": False})["do_sample"] is False
    assert module.as_options(None) == {"max_new_tokens": module.DEFAULT_MAX_NEW_TOKENS}


@pytest.mark.parametrize(
    "request_",
    [
        None,
        [],
        {},
        {"inputs": None},
        {"inputs": ""},
        {"inputs": []},
        {"inputs": ["text"]},
        {"inputs": [{"role": "user"}]},
        {"inputs": [{"role": 1, "content": "x"}]},
        {"inputs": "x", "parameters": []},
        {"inputs": "x", "parameters": {"max_new_tokens": 0}},
        {"inputs": "x", "parameters": {"max_new_tokens": 10**9}},
        {"inputs": "x", "parameters": {"max_new_tokens": True}},
        {"inputs": "x", "parameters": {"max_new_tokens": "8"}},
        {"inputs": "x", "parameters": {"temperature": float("nan")}},
        {"inputs": "x", "parameters": {"custom_generate": "somebody/code"}},
        {"inputs": chat({"type": "image", "path": "/etc/passwd"})},
        {"inputs": chat({"type": "image", "url": "http://127.0.0.1:1/x.png"})},
        {"inputs": chat({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})},
        {"inputs": chat({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}})},
        {"inputs": chat({"type": "video", "path": "/etc"})},
        {"inputs": chat(*[picture_block(Image.new("RGB", (1, 1)))] * 33)},
    ],
)  # fmt: skip
def test_a_bad_request_is_refused_and_the_next_one_is_served(handler, request_):
    with pytest.raises(ValueError):
        handler(request_)
    assert handler({"inputs": "Which shapes are there?", "parameters": {"max_new_tokens": 1}})


def test_the_handler_needs_nothing_of_the_package(module):
    source = (module.folder / "handler.py").read_text()
    assert "vila" not in {
        line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("from ", "import "))
    }
    requirements = (module.folder / "requirements.txt").read_text().split()
    assert requirements == ["transformers>=5.23", "av"]


def test_weights_keep_the_checkpoints_format(handler):
    assert handler.pipeline.model.dtype is torch.bfloat16
