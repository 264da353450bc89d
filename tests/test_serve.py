"""`vila-serve` over loopback, asked by the real `openai` client: answers are those of `generate()`."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import av
import numpy as np
import openai
import pytest
import torch
import uvicorn
from conftest import COMMITTED_GOLDENS, GoldenCase
from huggingface_hub.utils import httpx
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.cli.serving import model_manager, server
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import Modality
from vila import serve

CASE = GoldenCase(COMMITTED_GOLDENS / "vila" / "nvila_lite_image")
LIMITS = {"max_bytes": 100_000, "max_media": 9}
TOKENS = 12


def data_uri(content, kind):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(colour, size=(70, 50)):
    pixels = np.random.default_rng(sum(map(ord, colour))).integers(0, 60, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels | np.array(Image.new("RGB", size, colour))).save(file, "PNG")
    return {"type": "image_url", "image_url": {"url": data_uri(file.getvalue(), "image/png")}}


def clip(frames):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(frames):
            frame = np.full((48, 64, 3), shade * 255 // frames, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return {"type": "video_url", "video_url": {"url": data_uri(file.getvalue(), "video/mp4")}}


def text(words):
    return {"type": "text", "text": words}


def user(*content):
    return {"role": "user", "content": list(content)}


class Served:
    """A running server and a client of it."""

    def __init__(self, folder, log):
        command = [sys.executable, "-m", "vila.serve", str(folder), "--host", "127.0.0.1", "--port", "0"]
        command += ["--device", "cpu", "--dtype", "float32", "--media-policy", json.dumps(LIMITS)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.model, self.log = str(folder), log
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        deadline = time.monotonic() + 120
        while not (found := re.search(r"running on (http://127.0.0.1:\d+)", log.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        self.url = found[1]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def create(self, *messages, **options):
        options = {"max_tokens": TOKENS, "temperature": 0, **options}
        return self.client.chat.completions.create(model=self.model, messages=messages, **options)

    def ask(self, *content, **options):
        return self.create(user(*content), **options).choices[0].message.content

    def stream(self, *content, **options):
        return list(self.create(user(*content), stream=True, **options))

    def post(self, path, body):
        return self.client.post(path, body=body, cast_to=object)

    def is_up(self):
        return self.process.poll() is None and self.client.get(f"{self.url}/health", cast_to=object) == {
            "status": "ok"
        }


def streamed(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def whole(answer):
    """Without a last character that is not complete: it is streamed when it is."""
    return answer.rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.fixture(scope="module")
def folder(converted):
    return converted(CASE)


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    running = Served(folder, tmp_path_factory.mktemp("served") / "log")
    yield running
    running.process.terminate()
    running.process.wait(30)


@pytest.fixture(scope="module")
def direct(folder):
    """`direct(*messages)`: the answer of processor and `generate()` to what the server would be sent."""
    model = AutoModel.from_pretrained(folder, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(folder)

    def answer(*messages, **options):
        chat = []
        for message in messages:
            parts = message["content"] if isinstance(message["content"], list) else [text(message["content"])]
            chat.append({"role": message["role"], "content": [block(part) for part in parts]})
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
        )
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def block(part):
    kind = part["type"].removesuffix("_url")
    return part if kind == "text" else {"type": kind, "url": part[part["type"]]["url"]}


RED, BLUE, CLIP = picture("red"), picture("blue", (130, 60)), clip(40)
QUESTION = text("What is this?")


# ---------------------------------------------------------------------------------------------------------- answers


def test_answer_is_that_of_the_original(served):
    (chat,) = CASE.chats
    parts = [
        {"type": "image_url", "image_url": {"url": data_uri(Path(part["path"]).read_bytes(), "image/png")}}
        if part["type"] == "image"
        else part
        for part in chat[0]["content"]
    ]
    answer = served.create({"role": "user", "content": parts}, max_tokens=len(CASE.golden["greedy_ids"]))
    assert answer.choices[0].message.content.strip() == CASE.golden["greedy_text"].strip()


CHATS = {
    "text": [user(text("hello"))],
    "picture": [user(RED, QUESTION)],
    "pictures": [user(text("a"), RED, text("b"), BLUE, QUESTION)],
    "video": [user(CLIP, QUESTION)],
    "both": [user(CLIP, BLUE, QUESTION)],
    "turns": [
        {"role": "system", "content": "Be brief."},
        user(RED),
        {"role": "assistant", "content": "x"},
        user(BLUE),
    ],
}


@pytest.mark.parametrize("name", CHATS)
def test_answer_is_that_of_generate_streamed_or_not(name, served, direct):
    expected, answer = direct(*CHATS[name]), served.create(*CHATS[name])
    assert answer.choices[0].message.content == expected
    chunks = list(served.create(*CHATS[name], stream=True))
    assert streamed(chunks) == whole(expected)
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason
    assert chunks[-1].usage == answer.usage


def test_frames_are_the_checkpoints_choice_or_the_requests(served, direct):
    chat, tokens = user(CLIP, QUESTION), {}
    for options in ({}, {"num_frames": 3}, {"fps": 1}, {"num_frames": 32}):
        answer = served.create(chat, extra_body={"chat_template_kwargs": options})
        assert answer.choices[0].message.content == direct(chat, processor_kwargs=options)
        tokens[str(options)] = answer.usage.prompt_tokens
    assert len(set(tokens.values())) == 4


def test_the_answer_depends_on_the_picture(served):
    assert len({served.ask(picture(colour), QUESTION) for colour in ("red", "blue", "white", "black")}) > 1


def test_stop_strings_end_the_answer(served):
    full = served.ask(RED, QUESTION)
    stop = full[len(full) // 2]
    answer = served.ask(RED, QUESTION, stop=[stop])
    assert len(answer) < len(full) and answer == full[: len(answer)] and stop in answer


def test_a_temperature_samples_and_a_seed_repeats(served):
    greedy = served.ask(RED, QUESTION)
    drawn = [served.ask(RED, QUESTION, temperature=1.5, seed=seed) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1] and greedy not in drawn


def test_length_is_what_was_asked_for(served):
    answer = served.create(user(RED), max_tokens=3)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_the_other_two_ways_to_ask(served, direct):
    parts = [
        {"type": "input_image", "image_url": RED["image_url"]["url"]},
        {"type": "input_text", "text": "What is this?"},
    ]
    options = {"model": served.model, "temperature": 0}
    asked = {"input": [{"role": "user", "content": parts}], "max_output_tokens": TOKENS}
    assert served.client.responses.create(**asked, **options, stream=False).output_text == direct(user(RED, QUESTION))
    completion = served.client.completions.create(prompt="hello", max_tokens=4, **options)
    assert completion.usage.completion_tokens == 4


def test_the_model_is_listed_under_the_name_that_was_given(served):
    assert [model.id for model in served.client.models.list()] == [served.model]


# ------------------------------------------------------------------------------------------------- many, and hostile


def test_eight_clients_at_once_get_their_own_answers(served, direct):
    colours = ("red", "blue", "green", "white", "black", "yellow", "purple", "orange")
    questions = [(picture(colour), text(colour)) for colour in colours]
    expected = [whole(direct(user(*question))) for question in questions]

    def ask(number):
        question = questions[number % 8]
        return streamed(served.stream(*question)) if number % 2 else whole(served.ask(*question))

    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(ask, range(16))) == expected * 2
    assert len(set(expected)) > 1


def with_url(url, kind="image_url"):
    return {"messages": [user({"type": kind, kind: {"url": url}}, QUESTION)]}


def with_option(**options):
    return {"messages": [user(text("x"))], **options}


BAD = {
    "path": (with_url(str(CASE.folder / "input.png")), "files are not read here"),
    "file URL": (with_url(f"file://{CASE.folder / 'input.png'}"), "files are not read here"),
    "video path": (with_url(str(CASE.folder / "input.png"), "video_url"), "files are not read here"),
    "URL": (with_url("http://127.0.0.1:9/a.png"), "URLs are not fetched here"),
    "video URL": (with_url("http://169.254.169.254/a.mp4", "video_url"), "URLs are not fetched here"),
    "no base64": (with_url("data:image/png;base64,@@@"), "not valid base64"),
    "no picture": (with_url(data_uri(b"text", "image/png")), "picture 0"),
    "no video": (with_url(data_uri(b"text", "video/mp4"), "video_url"), "video 0"),
    "too large": (with_url(data_uri(bytes(LIMITS["max_bytes"] + 3), "image/png")), "max_bytes"),
    "too many": ({"messages": [user(*[RED] * 10)]}, "max_media"),
    "role": ({"messages": [{"role": "boss", "content": "x"}]}, "role"),
    "no role": ({"messages": [{"content": "x"}]}, "must be an object with a role"),
    "no messages": ({}, "messages must be a list"),
    "empty": ({"messages": []}, "messages must be a list"),
    "message": ({"messages": ["x"]}, "must be an object with a role"),
    "content": ({"messages": [{"role": "user", "content": 5}]}, "content must be"),
    "part": ({"messages": [user("x")]}, "must have the type"),
    "part type": ({"messages": [user({"type": "input_audio"})]}, "must have the type"),
    "no url": ({"messages": [user({"type": "image_url", "image_url": {}})]}, "image_url.url"),
    "bare video": ({"messages": [user({"type": "video_url", "video_url": "data:"})]}, "video_url.url"),
    "no text": ({"messages": [user({"type": "text"})]}, "must hold a text"),
    "long prompt": ({"messages": [user(text("x " * 40_000))]}, "context"),
    "endless": (with_option(max_tokens=10**9), "max_tokens"),
    "nothing": (with_option(max_completion_tokens=0), "max_completion_tokens"),
    "temperature": (with_option(temperature=-1), "temperature"),
    "a list": (with_option(temperature=[1]), "temperature has the wrong type"),
    "stop": (with_option(stop=5), "stop has the wrong type"),
    "beams": (with_option(generation_config='{"num_beams": 10000}'), "generation_config"),
    "no JSON": (with_option(generation_config="{"), "Expecting"),
    "template": (with_option(chat_template_kwargs={"chat_template": "{{ 1 }}"}), "chat_template_kwargs"),
    "policy": (with_option(chat_template_kwargs={"media_policy": "notebook"}), "chat_template_kwargs"),
    "padding": (with_option(chat_template_kwargs={"processor_kwargs": {"padding": "max_length"}}), "chat_template"),
    "frames": (
        {"messages": [user(CLIP)], "chat_template_kwargs": {"num_frames": 10**9}},
        "max_frames",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_request_is_told_what_is_wrong(name, served):
    body, message = BAD[name]
    with pytest.raises(openai.BadRequestError) as refused:
        served.post("/chat/completions", {"max_tokens": 4, **body})
    assert message in refused.value.message
    assert served.is_up()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([user({"type": "input_image"})], "must hold a text as image_url"),
        ([user({"type": "input_file"})], "must have the type"),
        ([{"type": "function_call_output"}], "must be an object with a role"),
        ([user({"type": "input_image", "image_url": "/etc/passwd"})], "picture 0: not an"),
    ],
)
def test_bad_response_is_refused_as_well(given, message, served):
    with pytest.raises(openai.BadRequestError, match=message):
        served.client.responses.create(model=served.model, input=given)


def test_bad_requests_do_not_disturb_the_good_ones_beside_them(served, direct):
    expected = whole(direct(user(BLUE, QUESTION)))
    bad = [body for body, _ in BAD.values()]

    def ask(number):
        if number % 2:
            with pytest.raises(openai.BadRequestError):
                served.post("/chat/completions", {"max_tokens": 4, **bad[number // 2 % len(bad)]})
            return expected
        return streamed(served.stream(BLUE, QUESTION)) if number % 4 else whole(served.ask(BLUE, QUESTION))

    with ThreadPoolExecutor(8) as clients:
        assert set(clients.map(ask, range(32))) == {expected}
    assert served.is_up()


def test_an_error_within_a_stream_is_one_for_the_client(served):
    with pytest.raises(openai.APIError) as told:
        served.stream(text("x " * 40_000))
    assert "context" in str(told.value.body)
    assert served.ask(RED, QUESTION)


def test_request_as_a_whole_is_limited(served):
    body = json.dumps(with_option(user="x" * 2 * LIMITS["max_bytes"])).encode()
    for content in (body, iter([body[:1000], body[1000:]])):  # with and without a length that tells
        answer = httpx.post(f"{served.url}/v1/chat/completions", content=content)
        assert answer.status_code == 413
    assert served.is_up()


def test_a_client_that_goes_away_leaves_the_next_one_its_answer(served, direct):
    with served.create(user(RED, QUESTION), max_tokens=2000, stream=True) as stream:
        next(iter(stream))
    assert served.ask(BLUE, QUESTION) == direct(user(BLUE, QUESTION))


def test_no_other_model_is_loaded_and_none_unloaded(served, folder, tmp_path):
    for name in ("other", str(tmp_path), f"{folder}/"):
        with pytest.raises(openai.BadRequestError):
            served.post("/chat/completions", {"model": name, "messages": [user(text("x"))]})
        answer = served.client.post(f"{served.url}/load_model", body={"model": name}, cast_to=str)
        assert "this server has one model" in answer
    for path in ("/reset", "/v1/systemone", "/v1/audio/transcriptions"):
        with pytest.raises(openai.NotFoundError):
            served.post(served.url + path, {})


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def not_running(monkeypatch, tmp_path):
    """Serves nothing: what would have run is kept."""

    class Kept:
        apps: ClassVar[list] = []

    monkeypatch.setattr(uvicorn.Server, "run", lambda server: Kept.apps.append(server.config))
    monkeypatch.setattr("vila.loading_vila.HF_HOME", str(tmp_path))
    for module, name in ((model_manager, "ModelManager"), (server, "build_server")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    yield Kept
    Kept.apps.clear()


def test_an_original_is_converted_and_served_under_its_own_name(not_running, monkeypatch):
    original = str(CASE.folder / "checkpoint")
    made = []
    monkeypatch.setattr(ModelManager, "__init__", spy(made, ModelManager.__init__))
    with pytest.raises(SystemExit) as exit:
        serve.main([original, "--device", "cpu", "--port", "1234", "--media-policy", '{"urls": true, "max_media": 2}'])
    assert not exit.value.code
    (config,), (manager,) = not_running.apps, made
    assert config.port == 1234
    model, processor = manager.load_model_and_processor(f"{original}@main")
    assert ModelManager.get_model_modality(model, processor) is Modality.VLM
    policy = processor.media_policy
    assert (policy.urls, policy.paths, policy.private_addresses, policy.max_media) == (True, False, False, 2)
    assert not model.training and model.dtype == torch.float32
    manager.shutdown()


def spy(seen, function):
    def call(self, *args, **kwargs):
        seen.append(self)
        function(self, *args, **kwargs)

    return call


def test_every_family_that_answers_is_known_to_the_server(vila_u_model):
    serve.register_with_transformers()
    assert ModelManager.get_model_modality(vila_u_model) is Modality.VLM
    import transformers

    assert transformers.VilaHDForConditionalGeneration.__module__ == "vila.modeling_vila_hd"
    assert not hasattr(transformers, "Ps3Model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: MODEL"),
        (["--port", "80"], "MODEL stands first"),
        (["x", "--media-policy", "{"], "property name"),
        (["x", "--media-policy"], "expected one argument"),
        (["x", "--media-policy=[]"], "must be a JSON object"),
        (["x", '--media-policy={"max": 1}'], "unknown field"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, not_running, capsys):
    with pytest.raises(SystemExit) as exit:
        serve.main(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_what_is_no_checkpoint_ends_in_one_line(not_running, tmp_path):
    for model, message in (
        ("no/folder", "neither a folder nor"),
        (str(tmp_path), "config.json"),
        ("a@b", "neither a"),
    ):
        with pytest.raises(SystemExit) as exit:
            serve.main([model])
        assert exit.value.code.startswith("vila-serve: ") and message in exit.value.code
        assert "\n" not in exit.value.code


def test_unknown_option_is_refused_as_the_stock_server_does(folder, not_running, capsys):
    with pytest.raises(SystemExit) as exit:
        serve.main([str(folder), "--wrong"])
    assert exit.value.code == 2 and "--wrong" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    with pytest.raises(SystemExit, match=r"pip install 'vila-hf\[serve\]'"):
        serve.main(["x"])


def test_help_tells_of_both_kinds_of_options(capsys):
    with pytest.raises(SystemExit) as exit:
        serve.main(["--help"])
    shown = capsys.readouterr().out
    assert not exit.value.code and "--media-policy" in shown and "transformers serve --help" in shown
