"""`vila-infer`: what it writes is what the processor and `generate()` give, and nothing else goes to stdout."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import COMMITTED_GOLDENS, GoldenCase
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor
from vila import VilaForConditionalGeneration, loading_vila
from vila.chat_templates_vila import named_template
from vila.conversion_vila import convert
from vila.frame_stream_vila import FrameStream
from vila.infer import AnswerStreamer, main, media_block, parse_arguments
from vila.media_policy_vila import MediaPolicy
from vila.training_vila import LORA_TARGETS
from vila.video_processing_vila import video_duration

CASE = GoldenCase(COMMITTED_GOLDENS / "vila" / "nvila_lite_image")
PICTURE = str(CASE.folder / "input.png")
LOOPBACK = ["--media-policy", '{"private_addresses": true}']
QUESTION = "Please describe the image."
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}
SCHEMA_CODE = """
from __future__ import annotations
from typing import Annotated, Literal
from pydantic import BaseModel, Field

class Part(BaseModel, extra="forbid"):
    legs: Annotated[int, Field(ge=0, le=9)]

class Main(BaseModel, extra="forbid"):
    kind: Literal["cat", "dog"]
    part: Part
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Where originals are converted into."""
    monkeypatch.setattr(loading_vila, "HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "vila"


@pytest.fixture(scope="session")
def lite(converted):
    return str(converted(CASE))


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Three seconds of 30 frames."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(30):
            pixels = np.full((48, 64, 3), 8 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


@pytest.fixture(scope="session")
def frames(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames")
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 0, 0)).save(folder / f"{number}.png")
    return str(folder)


@pytest.fixture
def web(clip, tmp_path):
    """Address of a server on this machine, and the paths that were asked of it."""
    folder, asked = tmp_path / "web", []
    folder.mkdir()
    for name in ("input.png", "picture", "SHOUTED.PNG"):
        shutil.copy(PICTURE, folder / name)
    for name in ("clip.mp4", "clip"):
        shutil.copy(clip, folder / name)
    (folder / "page").write_text("<html>")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *args):
            asked.append(self.path)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def by_hand(folder, content, model=None, processor=None, **options):
    """The answer of the six lines that the README shows."""
    model = AutoModel.from_pretrained(folder, dtype="auto") if model is None else model
    processor = AutoProcessor.from_pretrained(folder) if processor is None else processor
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **template)
    ids = model.generate(**inputs, max_new_tokens=16, **options)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True)


def infer(capsys, *arguments, tokens=16):
    """What goes to stdout and to stderr."""
    capsys.readouterr()
    main([*map(str, arguments), "--max-new-tokens", str(tokens), "--device", "cpu"])
    return capsys.readouterr()


def fails(capsys, *arguments):
    """The one line that explains the failure."""
    with pytest.raises(SystemExit) as exit:
        main([*map(str, arguments), "--device", "cpu"])
    assert isinstance(exit.value.code, str), "exits with a code other than 1"
    assert exit.value.code.startswith("vila-infer: ") and "\n" not in exit.value.code
    assert capsys.readouterr().out == ""
    return exit.value.code


# ---- the question


@pytest.mark.parametrize("case", ["nvila_lite_image", "vila15_s2_image", "vila15_llama3_image"])
def test_answers_equal_the_golden_ones(case, capsys, cache):
    case = GoldenCase(COMMITTED_GOLDENS / "vila" / case)
    mode, content = case.prompt["conv_mode"], case.chats[0][0]["content"]
    assert [part["type"] for part in content] == ["image", "text"]
    arguments = ["-m", case.folder / "checkpoint", "-c", mode, "--text", content[1]["text"]]
    out = infer(capsys, *arguments, "--media", content[0]["path"]).out
    assert out == case.golden["greedy_text"].strip() + "\n"


@pytest.mark.parametrize(
    "flags",
    [
        ["--model-path", "--conv-mode", "--num-video-frames", "--video-max-tiles"],
        ["--model_path", "--conv_mode", "--num_video_frames", "--video_max_tiles"],
        ["-m", "-c", "-nf", "-vm"],
    ],
)
def test_flags_have_three_spellings(flags, lite, frames, capsys):
    values = [lite, "hermes-2", "2", "3"]
    processor = AutoProcessor.from_pretrained(lite)
    processor.num_video_frames, processor.video_max_tiles = 2, 3
    processor.chat_template = named_template("hermes-2")
    content = [{"type": "video", "path": frames}, {"type": "text", "text": "What_is --this?"}]
    expected = by_hand(lite, content, processor=processor)
    spaced = [part for pair in zip(flags, values) for part in pair]
    joined = [f"{flag}={value}" for flag, value in zip(flags, values)]
    for arguments in (spaced, joined):
        assert infer(capsys, *arguments, "--text", "What_is --this?", "--media", frames).out == expected.strip() + "\n"


def test_the_line_of_the_original_readme(monkeypatch, capsys, tmp_path):
    repository = tmp_path / "hub" / "models--Efficient-Large-Model--NVILA-15B"
    shutil.copytree(CASE.folder / "checkpoint", repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    Image.open(PICTURE).convert("RGB").save(tmp_path / "demo.jpg")
    monkeypatch.chdir(tmp_path)
    line = ["--model-path", "Efficient-Large-Model/NVILA-15B", "--conv-mode", "auto"]
    line += ["--text", "Please describe the image", "--media", "demo.jpg"]
    assert len(infer(capsys, *line).out) > 1
    assert [entry.name[:10] for entry in (tmp_path / "hf" / "vila").iterdir()] == ["NVILA-15B-"]


def test_media_stand_before_the_text_in_their_order(lite, clip, frames, capsys):
    media = [PICTURE, clip, frames, PICTURE]
    kinds = ["image", "video", "video", "image"]
    content = [{"type": kind, "path": path} for kind, path in zip(kinds, media)]
    expected = by_hand(lite, [*content, {"type": "text", "text": QUESTION}])
    assert infer(capsys, "-m", lite, "--media", *media, "--text", QUESTION).out == expected.strip() + "\n"
    split = ["--media", *media[:2], "--text", QUESTION, "--media", *media[2:]]
    assert infer(capsys, "-m", lite, *split).out == expected.strip() + "\n"
    assert by_hand(lite, [*content[::-1], {"type": "text", "text": QUESTION}]) != expected


def test_text_alone_and_media_alone(lite, capsys):
    picture, text = {"type": "image", "path": PICTURE}, {"type": "text", "text": "Describe 42."}
    assert infer(capsys, "-m", lite, "--text", "Describe 42.").out == by_hand(lite, [text]).strip() + "\n"
    expected = by_hand(lite, [picture]).strip() + "\n"
    assert infer(capsys, "-m", lite, "--media", PICTURE).out == expected
    assert infer(capsys, "-m", lite, "--media", PICTURE, "--text", "").out == expected


def test_suffixes_in_any_case(tmp_path, clip):
    for name, kind in [("a.JPG", "image"), ("b.Png", "image"), ("c.MP4", "video"), ("d.MkV", "video")]:
        (tmp_path / name).touch()
        assert media_block(str(tmp_path / name), MediaPolicy()) == {"type": kind, "path": str(tmp_path / name)}
    (tmp_path / "film.jpg").mkdir()
    assert media_block(str(tmp_path / "film.jpg"), MediaPolicy())["type"] == "video"


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("input.png", "picture"),
        ("input.png?width=9&name=a.mp4", "picture"),
        ("SHOUTED.PNG", "picture"),
        ("picture", "picture"),
        ("clip.mp4#t=1", "clip"),
        ("clip?file=a.png", "clip"),
    ],
)
def test_urls_are_fetched_once_whatever_their_names(path, local, web, lite, clip, capsys):
    address, asked = web
    block = {"type": "image", "path": PICTURE} if local == "picture" else {"type": "video", "path": clip}
    expected = by_hand(lite, [block, {"type": "text", "text": QUESTION}])
    out = infer(capsys, "-m", lite, "--text", QUESTION, "--media", f"{address}/{path}", *LOOPBACK).out
    assert out == expected.strip() + "\n"
    assert len(asked) == 1


# ---- generation


def test_sampling_options(lite, capsys):
    arguments = ["-m", lite, "--text", "Describe 42."]
    text = [{"type": "text", "text": "Describe 42."}]
    greedy = infer(capsys, *arguments).out
    assert infer(capsys, *arguments, "--temperature", 0).out == greedy
    for flags, options in [
        (["--temperature", "1.5"], {"temperature": 1.5}),
        (["--top-p", "0.7"], {"top_p": 0.7}),
        (["--temperature", "2", "--top_p", "0.9"], {"temperature": 2.0, "top_p": 0.9}),
    ]:
        torch.manual_seed(7)
        expected = by_hand(lite, text, do_sample=True, **options).strip() + "\n"
        assert infer(capsys, *arguments, *flags, "--seed", 7).out == expected != greedy
    assert infer(capsys, *arguments, "--temperature", 2, "--seed", 8).out != expected


def test_dtype_and_device_reach_the_model(lite, capsys, monkeypatch):
    seen = []
    generate = VilaForConditionalGeneration.generate

    def spy(self, *args, **kwargs):
        seen.append((self.dtype, self.device.type, kwargs["max_new_tokens"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(VilaForConditionalGeneration, "generate", spy)
    infer(capsys, "-m", lite, "--media", PICTURE, "--dtype", "bfloat16", tokens=2)
    infer(capsys, "-m", lite, "--media", PICTURE, tokens=3)
    assert seen == [(torch.bfloat16, "cpu", 2), (torch.float32, "cpu", 3)]


def test_the_best_device_is_the_default(monkeypatch):
    for cuda, mps, expected in [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=cuda: found)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda found=mps: found)
        assert loading_vila.default_device() == expected


def test_the_answer_arrives_in_pieces_before_it_ends(lite, monkeypatch, capsys):
    log, put = [], AnswerStreamer.put
    monkeypatch.setattr(AnswerStreamer, "put", lambda self, value: (log.append("step"), put(self, value))[1])
    monkeypatch.setattr(sys.stdout, "write", lambda text: log.append("piece" if text.strip() else "blank"))
    main(["-m", lite, "--text", "Please describe the image", "--media", PICTURE, "--device", "cpu"])
    last_step = len(log) - log[::-1].index("step")
    assert log[:last_step].count("piece") >= 2


@pytest.mark.parametrize("case", ["nvila_lite_image", "vila15_image", "vila15_llama3_image"])
def test_pieces_add_up_to_the_decoded_answer(case, converted, capsys):
    processor = AutoProcessor.from_pretrained(converted(case))
    text = "  The cat's\n  - first line , and\n    - an indented one. \u732b\u304c\u597d\u304d \U0001f408!\n\n  end \n"
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    streamer = AnswerStreamer(processor)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    assert "\ufffd" not in capsys.readouterr().out
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert streamer.text == processor.decode(ids * 2, skip_special_tokens=True).strip()


def test_times_are_shown_as_seconds_while_they_stream(lite, clip, frames, web, tmp_path, monkeypatch, capsys, caplog):
    processor = AutoProcessor.from_pretrained(lite)
    processor.num_time_tokens = 31
    processor.tokenizer.add_tokens([f"<t{time}>" for time in range(31)])
    timed = shutil.copytree(lite, tmp_path / "timed", symlinks=True)
    processor.save_pretrained(timed)
    ids = processor.tokenizer.encode("from <t5> to <t30>, then <t11>", add_special_tokens=False)

    def generate(self, input_ids, streamer, **kwargs):
        streamer.put(input_ids)
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(VilaForConditionalGeneration, "generate", generate)
    seconds, tokens = "from <0.5> to <3.0>, then <1.1>\n", "from <t5> to <t30>, then <t11>\n"
    assert video_duration(clip) == 3.0
    assert infer(capsys, "-m", timed, "--media", PICTURE, clip).out == seconds
    assert infer(capsys, "-m", timed, "--media", f"{web[0]}/clip.mp4", *LOOPBACK).out == seconds
    assert web[1] == ["/clip.mp4"]
    assert infer(capsys, "-m", timed, "--text", "no video").out == tokens
    for media in ([clip, clip], [frames]):
        assert "exactly one video" not in caplog.text
        assert infer(capsys, "-m", timed, "--media", *media).out == tokens
        assert "exactly one video" in caplog.text
        caplog.clear()


def test_long_videos_show_progress_beside_the_answer(lite, frames, capsys):
    captured = infer(capsys, "-m", lite, "--media", frames, "-nf", 70, tokens=2)
    assert "Decoding frames" in captured.err and "70/70" in captured.err
    assert "frames" not in captured.out and captured.out.count("\n") == 1
    assert "Decoding frames" not in infer(capsys, "-m", lite, "--media", frames, tokens=2).err


@pytest.mark.parametrize(
    ("options", "streams"), [(["-nf", 65], True), (["-nf", 64], False), (["-nf", 65, "-vm", 2], False)], ids=str
)
def test_long_videos_are_decoded_while_the_model_reads_them(options, streams, lite, clip, monkeypatch, capsys):
    given, generate = [], VilaForConditionalGeneration.generate
    monkeypatch.setattr(
        VilaForConditionalGeneration,
        "generate",
        lambda self, *args, **kwargs: given.append(kwargs["pixel_values"]) or generate(self, *args, **kwargs),
    )
    infer(capsys, "-m", lite, "--media", clip, *options, tokens=1)
    assert len(given) == 1 and isinstance(given[0], FrameStream) == streams
    assert len(given[0]) == options[1] or not streams


# ---- checkpoints


def test_originals_are_converted_once(lite, cache, capsys, monkeypatch, tmp_path):
    source = shutil.copytree(CASE.folder / "checkpoint", tmp_path / "NVILA-tiny")
    arguments = ["--text", "Describe 42."]
    expected = infer(capsys, "-m", lite, *arguments).out
    assert not cache.exists()
    assert infer(capsys, "-m", source, *arguments).out == expected
    (folder,) = cache.iterdir()
    assert folder.name.startswith("NVILA-tiny-")

    with monkeypatch.context() as patch:
        patch.setattr(loading_vila, "convert", None)
        patch.chdir(tmp_path)
        assert infer(capsys, "-m", "NVILA-tiny", *arguments).out == expected
        assert infer(capsys, "-m", folder, *arguments).out == expected
    infer(capsys, "-m", source, "-c", "hermes-2", *arguments)
    os.utime(source / "config.json", (1, 1))
    infer(capsys, "-m", source, *arguments)
    monkeypatch.setattr(loading_vila, "version", lambda name: "999")
    infer(capsys, "-m", source, *arguments)
    assert len(list(cache.iterdir())) == 4


def test_an_interrupted_conversion_leaves_nothing(cache, monkeypatch):
    def interrupted(source, target, **options):
        convert(source, target, **options)
        raise KeyboardInterrupt

    source = CASE.folder / "checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(loading_vila, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loading_vila.convert_cached(source, "tiny")
    assert list(cache.iterdir()) == []
    assert (loading_vila.convert_cached(source, "tiny") / "config.json").is_file()


def test_two_processes_may_convert_at_once(cache, monkeypatch):
    source, converters = CASE.folder / "checkpoint", [convert]

    def overtaken(source, target, **options):
        if converters:
            converters.pop()
            loading_vila.convert_cached(source, "tiny")
        return convert(source, target, **options)

    monkeypatch.setattr(loading_vila, "convert", overtaken)
    folder = loading_vila.convert_cached(source, "tiny")
    assert list(cache.iterdir()) == [folder] and (folder / "config.json").is_file()


def test_a_converted_folder_takes_another_chat_template(lite, cache, capsys, monkeypatch):
    """Template and stop tokens are those that a conversion with that mode writes."""
    stops = []
    generate = VilaForConditionalGeneration.generate

    def spy(self, *args, **kwargs):
        stops.append(self.generation_config.eos_token_id)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(VilaForConditionalGeneration, "generate", spy)
    llama_3 = COMMITTED_GOLDENS / "vila" / "vila15_llama3_image" / "checkpoint"
    arguments = ["-m", llama_3, "--text", "Describe 42."]
    own, other = infer(capsys, *arguments).out, infer(capsys, *arguments, "-c", "vicuna_v1").out
    assert own != other
    for folder in cache.iterdir():
        converted = ["-m", folder, "--text", "Describe 42."]
        assert infer(capsys, *converted, "-c", "llama_3").out == own
        assert infer(capsys, *converted, "-c", "vicuna_v1").out == other
    (first, second), rest = stops[:2], stops[2:]
    assert len(first) == 2 and second != first and rest == [first, second] * 2


def test_code_beside_the_weights_is_not_run(lite, capsys, tmp_path):
    folder = shutil.copytree(lite, tmp_path / "hostile", symlinks=True)
    for module in folder.glob("*.py"):
        module.write_text("raise SystemExit('run!')")
    expected = infer(capsys, "-m", lite, "--text", "Describe 42.").out
    assert infer(capsys, "-m", folder, "--text", "Describe 42.").out == expected


# ---- adapters


@pytest.fixture(scope="module")
def adapter(lite, tmp_path_factory):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=LORA_TARGETS, init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(AutoModel.from_pretrained(lite), config).save_pretrained(folder)
    return folder


def merged_answer(lite, adapter, change=lambda model: None):
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModel.from_pretrained(lite), adapter).merge_and_unload()
    change(model)
    return by_hand(lite, [{"type": "image", "path": PICTURE}], model=model).strip() + "\n"


def test_an_adapter_is_merged(lite, adapter, capsys):
    plain = infer(capsys, "-m", lite, "--media", PICTURE).out
    assert infer(capsys, "-m", lite, "--media", PICTURE, "--lora-path", adapter).out == merged_answer(lite, adapter)
    assert merged_answer(lite, adapter) != plain


def in_original_layout(adapter, folder, change=lambda tensors: tensors):
    """The adapter as the original's training writes it: its module names, and the projector in a file of its own."""
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    old, new = "base_model.model.model.language_model.", "base_model.model.llm.model."
    tensors = change({name.replace(old, new): tensor for name, tensor in tensors.items()})
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_of_the_original_is_merged(lite, adapter, tmp_path, capsys):
    folder = in_original_layout(adapter, tmp_path / "original")
    arguments = ["-m", lite, "--media", PICTURE, "--lora_path", folder]
    assert infer(capsys, *arguments).out == merged_answer(lite, adapter)

    projector = {
        f"base_model.model.mm_projector.layers.{name}": tensor
        for name, tensor in AutoModel.from_pretrained(lite).model.multi_modal_projector.layers.state_dict().items()
    }
    last = max(name for name in projector if name.endswith("bias"))
    projector[last] = projector[last] + 3
    torch.save(projector, folder / "non_lora_trainables.bin")

    def change(model):
        with torch.no_grad():
            model.get_parameter("model.multi_modal_projector." + last.split("mm_projector.")[1]).add_(3)

    expected = merged_answer(lite, adapter, change)
    assert infer(capsys, *arguments).out == expected != merged_answer(lite, adapter)


def test_adapters_that_do_not_fit(lite, adapter, tmp_path, capsys):
    def refusal(name, change=lambda tensors: tensors, **extra):
        folder = in_original_layout(adapter, tmp_path / name, change)
        if extra:
            torch.save(extra["whole"], folder / "non_lora_trainables.bin")
        return fails(capsys, "-m", lite, "--text", "x", "-l", folder)

    first = "base_model.model.llm.model.layers.0.mlp.down_proj.lora_A.weight"
    renamed = {"base_model.model.llm.model.layers.99.mlp.down_proj.lora_A.weight": torch.zeros(4, 4)}
    assert "layers.99.mlp.down_proj.lora_A.weight" in refusal("unknown", lambda tensors: tensors | renamed)
    assert "down_proj.lora_A.default.weight' has the shape" in refusal(
        "shape", lambda tensors: tensors | {first: tensors[first][:, :3].contiguous()}
    )
    assert "lacks the tensor" in refusal(
        "missing", lambda tensors: {name: tensor for name, tensor in tensors.items() if name != first}
    )
    fused = "vision_tower.vision_tower.vision_model.encoder.layers.0.attn.qkv.lora_A.weight"
    assert fused in refusal("fused", lambda tensors: tensors | {"base_model.model." + fused: torch.ones(1)})
    assert "'something.weight'" in refusal("whole", whole={"something.weight": torch.zeros(1)})
    assert "more than tensors" in refusal("code", whole={"a": Path("/")})
    assert "adapter_config.json is missing" in fails(capsys, "-m", lite, "--text", "x", "-l", tmp_path)


def test_a_missing_peft_is_named(lite, adapter, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "vila-hf[train]" in fails(capsys, "-m", lite, "--text", "x", "-l", adapter)


# ---- JSON


def test_json_answers(lite, tmp_path, capsys):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "schema.py").write_text(SCHEMA_CODE)
    arguments = ["-m", lite, "--media", PICTURE]
    plain = json.loads(infer(capsys, *arguments, "--json-schema", tmp_path / "schema.json", tokens=200).out)
    assert plain["kind"] in ("cat", "dog") and 0 <= plain["legs"] <= 9
    nested = json.loads(infer(capsys, *arguments, "--json_schema", tmp_path / "schema.py", tokens=200).out)
    assert set(nested) == {"kind", "part"} and 0 <= nested["part"]["legs"] <= 9
    sampled = ["--json-mode", "--temperature", "1", "--seed", "1"]
    assert isinstance(json.loads(infer(capsys, *arguments, *sampled, tokens=400).out), (dict, list))


def test_json_that_is_cut_is_an_error(lite, tmp_path, capsys):
    with pytest.raises(SystemExit, match="raise --max-new-tokens"):
        main(["-m", lite, "--text", "x", "--json-mode", "--max-new-tokens", "3", "--device", "cpu"])


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "nowhere", "--text", "x"], "'nowhere' is neither a folder nor a repository"),
        (["-m", "LITE", "--media", "no.png"], "no.png does not exist"),
        (["-m", "LITE", "--media", "TMP/notes.txt"], "neither a picture nor a video by its name"),
        (["-m", "LITE", "--media", "TMP/broken.png"], "'broken.png' holds no picture"),
        (["-m", "LITE", "--media", "TMP/broken.mp4"], "video 0: the video 'broken.mp4' is broken or no video"),
        (["-m", "LITE", "--media", "TMP/empty"], "holds no frames"),
        (["-m", "LITE", "--media", "http://127.0.0.1:9/a.png"], "private, loopback or otherwise reserved address"),
        (["-m", "LITE", "--media", "http://127.0.0.1:9/a.png", *LOOPBACK], "could not be fetched"),
        (["-m", "LITE", "--media", "http://127.0.0.1:9/a.mp4", *LOOPBACK], "could not be fetched"),
        (["-m", "LITE", "--media", "http://127.0.0.1:9/a", *LOOPBACK], "could not be fetched"),
        (["-m", "LITE", "--text", "x", "--json-schema", "no.json"], "no.json"),
        (["-m", "LITE", "--text", "x", "--json-schema", "no.py"], "no.py does not exist"),
        (["-m", "LITE", "--text", "x", "--json-schema", "TMP/notes.txt"], "is no valid JSON"),
        (["-m", "LITE", "--text", "x", "--json-schema", "TMP/bad.json"], "nonsense"),
        (["-m", "LITE", "--text", "x", "--json-schema", "TMP/list.json"], "must be a dictionary"),
        (["-m", "LITE", "--text", "x", "--json-schema", "TMP/raises.py"], "ZeroDivisionError"),
        (["-m", "LITE", "--text", "x", "--json-schema", "TMP/none.py"], "no class Main"),
        (["-m", "TMP", "--text", "x"], "config.json is missing"),
        (["-m", "TMP/other", "--text", "x"], "'qwen2_vl', no VILA checkpoint"),
        (["-m", "TMP/cut", "--text", "x"], "a weight file of the checkpoint is damaged"),
    ],
)
def test_failures_are_one_line(arguments, message, lite, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "qwen2_vl", "text_config": {}}')
    for name in ("notes.txt", "broken.png", "broken.mp4"):
        (tmp_path / name).write_text("some notes")
    (tmp_path / "bad.json").write_text('{"type": "nonsense"}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "raises.py").write_text("1 / 0")
    (tmp_path / "none.py").write_text("main = 3")
    if "TMP/cut" in arguments:
        folder = shutil.copytree(lite, tmp_path / "cut")
        for file in folder.glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:1000])
    filled = [part.replace("LITE", lite).replace("TMP", str(tmp_path)) for part in arguments]
    assert message in fails(capsys, *filled)


def test_pages_and_missing_files_of_a_server(web, lite, capsys):
    assert "broken or no video" in fails(capsys, "-m", lite, "--media", f"{web[0]}/page", *LOOPBACK)
    assert "could not be fetched" in fails(capsys, "-m", lite, "--media", f"{web[0]}/missing.png", *LOOPBACK)


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_devices_that_are_not_there(device, lite):
    with pytest.raises(SystemExit, match=f"vila-infer: the device '{device}' cannot be used here"):
        main(["-m", lite, "--text", "x", "--device", device])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--text, --media or both"),
        (["--text", "x", "--temp", "1"], "unrecognized arguments: --temp"),
        (["--text", "x", "-nf", "0"], "0 is out of range"),
        (["--text", "x", "-vm", "-2"], "-2 is out of range"),
        (["--text", "x", "--top-p", "1.5"], "1.5 is out of range"),
        (["--text", "x", "--temperature", "nan"], "nan is out of range"),
        (["--text", "x", "--temperature", "0", "--top-p", "0.5"], "needs a --temperature above 0"),
        (["--prompt", "x", "--num-look-close", "1"], "--prompt draws, without --num-look-close"),
        (["--prompt", "x", "--max-new-tokens", "9", "--json-mode"], "without --json-mode, --max-new-tokens"),
        (["--text", "x", "--cfg", "3", "--generation_nums", "2"], "--text asks, without --generation-nums, --cfg"),
        (["--text", "x", "--max-new-tokens", "many"], "invalid int value"),
        (["--text", "x", "-c", "v9"], "invalid choice"),
    ],
)
def test_options_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_arguments(["-m", "somewhere", *arguments])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_defaults_of_the_original():
    options = parse_arguments(["-m", "a", "--text", "b", "-nf", "-1", "-vm=-1"])
    assert (options.conv_mode, options.num_video_frames, options.video_max_tiles) == ("auto", -1, -1)


def test_an_interrupt_ends_with_130(lite, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(VilaForConditionalGeneration, "generate", interrupted)
    with pytest.raises(SystemExit) as exit:
        main(["-m", lite, "--text", "x", "--device", "cpu"])
    assert exit.value.code == 130


# ---- processes


def start(command, **options):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)


def test_the_installed_command(lite, tmp_path):
    command = [Path(sys.executable).with_name("vila-infer"), "-m", lite, "--media", PICTURE, "--text", QUESTION]
    process = start([*command, "--max-new-tokens", "16", "--device", "cpu"], stdout=subprocess.PIPE, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, CASE.golden["greedy_text"].strip() + "\n"), err


def test_a_closed_pipe_is_no_error(lite, tmp_path):
    reader, writer = os.pipe()
    process = start([sys.executable, "-m", "vila.infer", "-m", lite, "--text", "x"], stdout=writer, cwd=tmp_path)
    os.close(writer)
    os.close(reader)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 141 and "Error" not in err
