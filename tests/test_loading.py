"""The ways in: remote code in a process that lacks the package, the installed package, and pipelines."""

import base64
import json
import os
import subprocess
import sys
from io import BytesIO

import pytest
import torch
from chat_requests import encode
from conftest import COMMITTED_GOLDENS, GoldenCase
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    TextStreamer,
    pipeline,
)
from without_package import WARNINGS_ARE_ERRORS, WITHOUT_PACKAGE

CASE = GoldenCase(COMMITTED_GOLDENS / "vila" / "nvila_lite_image")

LOAD_AND_ANSWER = """
import json
import transformers
from transformers import AutoProcessor, pipeline
folder, chat = sys.argv[1], json.loads(sys.argv[2])
classes = ["AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM"]
loaded = {}
for name in classes:
    model, info = getattr(transformers, name).from_pretrained(
        folder, trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    loaded[name] = [type(model).__name__, sorted(info["missing_keys"]), sorted(info["unexpected_keys"])]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
new_ids = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :].tolist()
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True, dtype="float32")
answer = pipe(text=chat, max_new_tokens=16, return_full_text=False)[0]["generated_text"]
strict = AutoProcessor.from_pretrained(folder, trust_remote_code=True, media_policy="server")
strict.media_policy = strict.media_policy.server(max_media=1)
try:
    refused = strict.apply_chat_template(chat, tokenize=True, return_dict=True) and ""
except ValueError as error:
    refused = str(error)
again = strict.apply_chat_template(
    chat, tokenize=True, return_dict=True, processor_kwargs={"media_policy": processor.media_policy}
)
assert again["input_ids"][0] == inputs["input_ids"][0, : len(again["input_ids"][0])].tolist()
if len(sys.argv) > 3:
    model.save_pretrained(sys.argv[3])
    processor.save_pretrained(sys.argv[3])
module = type(model).__module__
json.dump({"loaded": loaded, "ids": new_ids, "answer": answer, "module": module, "refused": refused}, sys.stdout)
"""


def run_without_package(script, folder, *arguments, cache):
    code = WITHOUT_PACKAGE + WARNINGS_ARE_ERRORS + script
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder), json.dumps(CASE.chats[0]), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cache,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def test_remote_code_answers_without_the_package_and_so_does_what_it_saves(converted, tmp_path):
    saved = tmp_path / "saved_model"
    first, log = run_without_package(LOAD_AND_ANSWER, converted(CASE), saved, cache=tmp_path)
    assert first["module"].startswith("transformers_modules.")
    assert set(map(tuple, (v[1] + v[2] for v in first["loaded"].values()))) == {()}
    assert {v[0] for v in first["loaded"].values()} == {"VilaForConditionalGeneration"}
    assert first["ids"] == CASE.golden["greedy_ids"]
    assert first["answer"] == CASE.golden["greedy_text"]
    assert first["refused"].startswith("prompt 0: picture 0: files are not read here")
    assert "warning" not in log.lower()

    again, _ = run_without_package(LOAD_AND_ANSWER, saved, cache=tmp_path)
    assert again["ids"] == first["ids"]
    assert again["answer"] == first["answer"]


def test_remote_code_imports_nothing_beyond_the_hard_requirements(converted):
    """A module beside the weights may import its siblings, the standard library and what every install has."""
    from transformers.dynamic_module_utils import get_imports

    allowed = {"torch", "transformers", "safetensors", "huggingface_hub", "tokenizers", "PIL", "av", "numpy", "jinja2"}
    modules = sorted(converted(CASE).glob("*.py"))
    assert modules
    for module in modules:
        assert set(get_imports(module)) - set(sys.stdlib_module_names) <= allowed, module.name


@pytest.mark.parametrize(
    "auto_class", [AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM]
)
def test_installed_package_needs_no_trust(auto_class, converted, tmp_path):
    folder = converted(CASE)
    config = json.loads((folder / "config.json").read_text())
    config.pop("auto_map")
    plain = tmp_path / "without_auto_map"
    plain.mkdir()
    for entry in folder.iterdir():
        if entry.suffix != ".py" and entry.name != "config.json":
            (plain / entry.name).symlink_to(entry)
    (plain / "config.json").write_text(json.dumps(config))
    model = auto_class.from_pretrained(plain)
    assert type(model).__module__ == "vila.modeling_vila"


def data_uri(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


@pytest.fixture(scope="module")
def pipe(converted):
    return pipeline("image-text-to-text", model=str(converted(CASE)), dtype="float32")


PICTURE = CASE.folder / "input.png"
SOURCES = {
    "pil": lambda: {"image": Image.open(PICTURE)},
    "path": lambda: {"path": str(PICTURE)},
    "url_key_with_path": lambda: {"url": str(PICTURE)},
    "data_uri": lambda: {"url": data_uri(PICTURE)},
    "base64": lambda: {"base64": base64.b64encode(PICTURE.read_bytes()).decode()},
}


def chat_with(**source):
    content = [{"type": "image", **source}, {"type": "text", "text": "Please describe the image."}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("source", SOURCES)
def test_pipeline_answers_whatever_the_picture_comes_from(source, pipe):
    output = pipe(text=chat_with(**SOURCES[source]()), max_new_tokens=16, return_full_text=False)
    assert output[0]["generated_text"] == CASE.golden["greedy_text"]


def test_pipeline_takes_openai_image_url(pipe):
    content = [
        {"type": "image_url", "image_url": {"url": data_uri(PICTURE)}},
        {"type": "text", "text": "Please describe the image."},
    ]
    output = pipe(text=[{"role": "user", "content": content}], max_new_tokens=16, return_full_text=False)
    assert output[0]["generated_text"] == CASE.golden["greedy_text"]


TEXT_CHAT = [{"role": "user", "content": [{"type": "text", "text": "Describe 42."}]}]
SQUARE_CHAT = chat_with(image=Image.new("RGB", (20, 20), "red"))


@pytest.mark.parametrize(
    ("chats", "batch_size"), [([chat_with(path=str(PICTURE)), SQUARE_CHAT], 2), ([TEXT_CHAT, SQUARE_CHAT], None)]
)
def test_pipeline_batch_equals_single_calls(chats, batch_size, pipe):
    """With a `batch_size` the pipeline itself collates, which it does for rows of the same kind only."""
    single = [pipe(text=chat, max_new_tokens=8, return_full_text=False)[0]["generated_text"] for chat in chats]
    batched = pipe(text=chats, max_new_tokens=8, return_full_text=False, batch_size=batch_size)
    assert [row[0]["generated_text"] for row in batched] == single


def test_pipeline_takes_pictures_beside_a_prompt(pipe):
    prompt = pipe.processor.apply_chat_template(chat_with(path=str(PICTURE)), add_generation_prompt=True)
    output = pipe(images=Image.open(PICTURE), text=prompt, max_new_tokens=16, return_full_text=False)
    assert output[0]["generated_text"] == CASE.golden["greedy_text"]


def test_pipeline_streams_what_it_returns(pipe, capsys):
    streamer = TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = pipe(
        text=chat_with(path=str(PICTURE)),
        max_new_tokens=16,
        return_full_text=False,
        generate_kwargs={"streamer": streamer},
    )
    assert capsys.readouterr().out.strip("\n") == output[0]["generated_text"]


def test_every_photo_goes_through_the_pipeline(pipe, photos):
    for photo in photos:
        output = pipe(text=chat_with(path=str(photo)), max_new_tokens=4, return_full_text=False)
        assert isinstance(output[0]["generated_text"], str), photo.name


def test_black_and_white_pictures_give_different_logits(converted):
    """Guards against a library upgrade that silently drops the picture."""
    model = AutoModel.from_pretrained(converted(CASE), dtype="float32")
    processor = AutoProcessor.from_pretrained(converted(CASE))
    logits = []
    for color in ("black", "white"):
        inputs = encode(processor, chat_with(image=Image.new("RGB", (90, 90), color)))
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_png_bytes_equal_the_path(converted):
    processor = AutoProcessor.from_pretrained(converted(CASE))
    buffer = BytesIO(PICTURE.read_bytes())
    chats = [chat_with(image=buffer.getvalue()), chat_with(path=str(PICTURE))]
    first, second = (
        processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt") for chat in chats
    )
    assert torch.equal(first["pixel_values"], second["pixel_values"])
