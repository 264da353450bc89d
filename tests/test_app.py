"""The demo page: its answers are those of `generate()`, Stop ends it, and nothing a visitor does breaks it."""

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from contextlib import aclosing
from itertools import pairwise

import pytest
import torch
from chat_requests import encode
from conftest import REPOSITORY
from PIL import Image
from transformers import AutoModel, AutoProcessor
from vila.app import DEFAULT_MODEL, EXAMPLES, main, read_examples
from vila.demo_vila import Demo, StopWhen, to_chat
from vila.video_processing_vila import load_frames

QUESTION = "Tell me which thing is in the picture."
LEAST, TOKENS = 3, 16  # no answer is empty, whatever is asked


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def collect(generator):
    """Everything that one of the page's events shows."""

    async def run():
        return [shown async for shown in generator]

    return asyncio.run(run())


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uploads")
    for path in EXAMPLES.glob("*.*"):
        shutil.copy(path, folder)
    (folder / "broken.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def demo(uploads):
    demo = Demo(DEFAULT_MODEL, uploads, device="cpu", dtype="float32")
    demo.model.generation_config.min_new_tokens = LEAST
    return demo


@pytest.fixture(scope="module")
def hd(uploads, vila_hd_folder):
    return Demo(vila_hd_folder, uploads, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def drawer(uploads, vila_u_folder):
    return Demo(vila_u_folder, uploads, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def ask(demo, uploads):
    """`ask(text, files, history)`: all that is shown."""

    def ask(text=QUESTION, files=("naming_0.jpg",), history=(), tokens=TOKENS, temperature=0):
        message = {"text": text, "files": [str(uploads / name) for name in files]}
        return collect(demo.answer(message, list(history), tokens, temperature))

    return ask


def by_hand(content):
    """The answer of the README's lines."""
    model = AutoModel.from_pretrained(DEFAULT_MODEL, trust_remote_code=True, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(DEFAULT_MODEL, trust_remote_code=True)
    inputs = encode(processor, [{"role": "user", "content": content}])
    ids = model.generate(**inputs, min_new_tokens=LEAST, max_new_tokens=TOKENS)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------- what is answered


def test_answers_are_those_of_generate(ask, demo, uploads):
    content = [{"type": "image", "path": str(uploads / "naming_0.jpg")}, {"type": "text", "text": QUESTION}]
    shown = ask()
    assert shown[-1].strip() == by_hand(content).strip() != ""
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))


def test_pictures_and_a_video_of_one_message_come_in_their_order(ask, demo, uploads):
    files = ["compare_0.jpg", "direction_0.mp4", "compare_1.jpg"]
    kinds = ["image", "video", "image"]
    content = [{"type": kind, "path": str(uploads / name)} for kind, name in zip(kinds, files)]
    content.append({"type": "text", "text": "What happens?"})
    assert ask("What happens?", files)[-1].strip() == by_hand(content).strip()


def test_an_answer_grows_while_it_is_made(demo, uploads):
    """The first words are shown before the last token is made."""

    async def run():
        made, message = [], {"text": "Describe the picture.", "files": [str(uploads / "compare_1.jpg")]}
        hook = demo.model.register_forward_hook(lambda *_: made.append(1))
        try:
            async with aclosing(demo.answer(message, [], 64, 0)) as shown:
                return [(len(made), text) async for text in shown]
        finally:
            hook.remove()

    demo.model.generation_config.min_new_tokens = 60
    try:
        shown = asyncio.run(run())
    finally:
        demo.model.generation_config.min_new_tokens = LEAST
    assert shown[0][0] < 30 < shown[-1][0] and len(shown[0][1]) < len(shown[-1][1])


def test_temperature_samples(ask):
    torch.manual_seed(0)
    assert len({ask(temperature=2)[-1] for _ in range(4)} | {ask()[-1]}) > 1


def test_examples_are_chats_that_can_be_asked(demo, uploads):
    examples = read_examples()
    assert max(len(history) for history, _ in examples.values()) == 8
    for history, message in examples.values():
        for part in [part for turn in history for part in turn["content"] if isinstance(part, dict)]:
            part["path"] = str(uploads / os.path.basename(part["path"]))
        files = [str(uploads / os.path.basename(path)) for path in message["files"]]
        shown = collect(demo.answer({**message, "files": files}, history, TOKENS, 0))
        assert isinstance(shown[-1], str) and shown[-1].strip()


def test_a_corrected_answer_teaches_the_next(ask):
    """Few-shot: the same question about the same picture follows what the chat was taught."""
    picture = {"path": str(EXAMPLES / "fewshot_4_0.jpg")}
    taught = to_chat([user(picture, "What is it?"), assistant("MOP")], {"text": "And this?", "files": []})
    assert [turn["role"] for turn in taught] == ["user", "assistant", "user"]
    assert taught[1]["content"] == [{"type": "text", "text": "MOP"}]


# ------------------------------------------------------------------------------------------------- gradio's messages


@pytest.mark.parametrize(
    "part", [{"path": "/up/a.png"}, {"type": "file", "file": {"path": "/up/a.png", "mime_type": "image/png"}}]
)
def test_files_come_in_any_of_gradios_forms(part):
    chat = to_chat(
        [user(part, {"type": "text", "text": "first"}), assistant("yes")], {"text": "then", "files": [part]}
    )
    picture = {"type": "image", "path": "/up/a.png"}
    assert chat[0]["content"] == [picture, {"type": "text", "text": "first"}]
    assert chat[2]["content"] == [picture, {"type": "text", "text": "then"}]


def test_videos_are_told_by_their_names():
    chat = to_chat([], {"text": "", "files": ["/up/CLIP.MP4", "/up/a.gif"]})
    assert [block["type"] for block in chat[0]["content"]] == ["video", "image"]


def test_text_that_looks_like_a_path_stays_text():
    assert to_chat([], {"text": "/etc/passwd"})[0]["content"] == [{"type": "text", "text": "/etc/passwd"}]


def test_failed_turns_are_forgotten():
    failed = {"role": "assistant", "content": "broken", "metadata": {"title": "Not answered: ValueError"}}
    history = [user("one"), assistant("1"), user({"path": "/up/broken.png"}, "two"), failed]
    chat = to_chat(history, {"text": "three"})
    assert [block["text"] for turn in chat for block in turn["content"]] == ["one", "1", "three"]


def test_a_question_whose_answer_was_stopped_belongs_to_the_next():
    chat = to_chat([user({"path": "/up/a.png"})], {"text": "what is it?"})
    assert [(turn["role"], len(turn["content"])) for turn in chat] == [("user", 2)]


# ------------------------------------------------------------------------------------------------- bad visitors


@pytest.mark.parametrize(
    "file",
    [
        "broken.png",
        "missing.png",
        "outside.png",
        "link.png",
        "http://127.0.0.1/a.png",
        "file:///etc/passwd",
        "clip.mp4",
    ],
)
def test_what_cannot_be_read_is_told_and_the_next_question_is_answered(file, ask, uploads, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    if file == "link.png" and not (uploads / file).is_symlink():
        (uploads / file).symlink_to(tmp_path / "outside.png")
    if file == "clip.mp4":
        (uploads / file).write_bytes(b"no clip")
    paths = {"outside.png": str(tmp_path / "outside.png")}
    (shown,) = ask(files=[paths.get(file, file if ":" in file else str(uploads / file))])
    assert shown["metadata"]["title"] == "Not answered: ValueError" and shown["content"]
    assert str(tmp_path) not in shown["content"] and str(uploads) not in shown["content"]
    history = [user({"path": str(uploads / "broken.png")}, QUESTION), shown]
    assert ask(history=history)[-1] == ask()[-1]


def test_an_empty_message_is_told(ask):
    (shown,) = ask(" ", files=())
    assert "empty" in shown["content"]


def test_a_chat_that_is_too_long_is_told(ask):
    (shown,) = ask("word " * 3000)
    assert "context" in shown["content"]


def test_too_many_pictures_are_told(ask):
    (shown,) = ask(files=["naming_0.jpg"] * 33)
    assert "max_media=32" in shown["content"]


def test_limits_can_be_changed(uploads):
    small = Demo(DEFAULT_MODEL, uploads, device="cpu", policy_changes={"max_pixels": 100})
    message = {"text": QUESTION, "files": [str(uploads / "naming_0.jpg")]}
    (shown,) = collect(small.answer(message, [], TOKENS, 0))
    assert "max_pixels=100" in shown["content"]


def test_an_error_of_ours_is_logged_and_shown_by_its_name_alone(ask, demo, monkeypatch):
    monkeypatch.setattr(demo.model, "generate", lambda **_: {}["secret"])
    (shown,) = ask()
    assert shown["metadata"]["title"].endswith("KeyError") and "secret" not in shown["content"]


# ------------------------------------------------------------------------------------------------- stop


def test_leaving_stops_generate(demo, uploads):
    """Closing what gradio iterates over, as Stop and a closed tab do, ends `generate()` before it is done."""
    made = []
    demo.model.generation_config.min_new_tokens = 1500
    hook = demo.model.register_forward_hook(lambda *_: made.append(1))
    message = {"text": QUESTION, "files": [str(uploads / "naming_0.jpg")]}

    async def ask(until_first):
        async with aclosing(demo.answer(message, [], 1500, 0)) as shown:
            async for _ in shown:
                if until_first:
                    return

    def ask_and_leave():
        return ask(until_first=True)

    async def ask_and_cancel():
        task = asyncio.create_task(ask(until_first=False))
        while not made:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    try:
        for leave in (ask_and_leave, ask_and_cancel):
            made.clear()
            asyncio.run(leave())
            demo.worker.submit(int).result()  # runs when `generate()` has ended
            assert 0 < len(made) < 1000
    finally:
        hook.remove()
        demo.model.generation_config.min_new_tokens = LEAST


def test_who_leaves_before_his_turn_costs_nothing(demo, uploads):
    busy, made = threading.Event(), []
    demo.worker.submit(busy.wait)
    hook = demo.model.register_forward_hook(lambda *_: made.append(1))

    async def ask_and_leave():
        answer = demo.answer({"text": "Hello", "files": []}, [], TOKENS, 0)
        task = asyncio.create_task(anext(answer))
        await asyncio.sleep(0.1)
        task.cancel()
        busy_is_over = asyncio.gather(task, return_exceptions=True)
        await busy_is_over
        busy.set()

    asyncio.run(ask_and_leave())
    demo.worker.submit(int).result()
    hook.remove()
    assert not made


def test_the_criterion_says_stop_for_every_row():
    event = threading.Event()
    assert StopWhen(event)(torch.zeros(3, 2), None).tolist() == [False] * 3
    event.set()
    assert StopWhen(event)(torch.zeros(3, 2), None).tolist() == [True] * 3


def test_two_visitors_get_their_own_answers(demo, uploads, ask):
    alone = [ask(files=[name])[-1] for name in ("naming_0.jpg", "fewshot_4_2.jpg")]

    async def both():
        async def one(name):
            message = {"text": QUESTION, "files": [str(uploads / name)]}
            return [shown async for shown in demo.answer(message, [], TOKENS, 0)][-1]

        return await asyncio.gather(one("naming_0.jpg"), one("fewshot_4_2.jpg"))

    assert asyncio.run(both()) == alone


# ------------------------------------------------------------------------------------------------- VILA-HD, VILA-U


def test_overlays_show_where_vila_hd_looked(hd, uploads):
    files = [str(uploads / name) for name in ("compare_0.jpg", "receipt_steps_0.jpg")]
    shown = collect(hd.answer({"text": "What is it?", "files": files}, [], 4, 0, 2))
    text, overlays = shown[-1]
    assert text and [overlay.size for overlay in overlays] == [Image.open(path).size for path in files]
    chat = to_chat([], {"text": "What is it?", "files": files})
    output = hd.model.generate(**hd.encode(chat), max_new_tokens=4, num_look_close=2, output_selection_maps=True)
    for index, (path, overlay) in enumerate(zip(files, overlays)):
        expected = hd.processor.draw_selection(Image.open(path), output.selection_maps, index=index)
        assert overlay.tobytes() == expected.tobytes()


def test_without_a_close_look_there_are_no_overlays(hd, uploads):
    message = {"text": "What is it?", "files": [str(uploads / "compare_0.jpg")]}
    assert collect(hd.answer(message, [], 4, 0, 0))[-1][1] == []


def test_overlays_end_at_a_video(hd, uploads):
    files = [str(uploads / name) for name in ("compare_0.jpg", "direction_0.mp4", "compare_1.jpg")]
    hd.processor.num_video_frames = 2
    _, overlays = collect(hd.answer({"text": "What is it?", "files": files}, [], 2, 0, 1))[-1]
    assert len(overlays) == 1


def test_errors_of_vila_hd_are_shown_too(hd, uploads):
    ((shown, overlays),) = collect(hd.answer({"text": "?", "files": [str(uploads / "broken.png")]}, [], 4, 0, 1))
    assert shown["metadata"]["title"] and overlays == []


def draw(drawer, mode="image", count=2, frames=2, seed="7", prompt="Fireworks."):
    return collect(drawer.draw(prompt, "", mode, count, frames, 3.0, seed))


def test_drawn_pictures_are_those_of_generate(drawer, vila_u_model, vila_u_processor):
    shown = draw(drawer)
    inputs = vila_u_processor(text=["Fireworks."], generation_mode="image", return_tensors="pt")
    output = vila_u_model.generate(
        **inputs,
        generation_mode="image",
        num_return_sequences=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(7),
    )
    expected = vila_u_processor.post_process_multimodal_output(output.pixel_values, generation_mode="image")
    pictures, video = shown[-1]
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in expected]
    assert video is None and all(len(pictures) == 2 for pictures, _ in shown)
    heights = [pictures[0].height for pictures, _ in shown]
    assert heights == sorted(heights)


def test_a_drawn_video_is_a_file(drawer):
    frames, path = draw(drawer, mode="video", frames=3)[-1]
    assert len(frames) == 3
    assert len(list(load_frames(path, num_frames=3))) == 3


def test_another_picture_without_a_seed(drawer):
    first, second = (draw(drawer, count=1, seed="")[-1][0][0].tobytes() for _ in range(2))
    assert first != second


@pytest.mark.parametrize(("options", "words"), [({"seed": "x"}, "seed"), ({"prompt": "word " * 9000}, "token")])
def test_what_cannot_be_drawn_is_an_error_in_words(drawer, options, words):
    with pytest.raises(ValueError, match=words):
        draw(drawer, **options)


def test_leaving_stops_drawing(drawer):
    rows = []
    original = drawer.model.model.decode_features

    def counted(*arguments):
        rows.append(1)
        return original(*arguments)

    async def draw_and_leave():
        async with aclosing(drawer.draw("Fireworks.", "", "video", 1, 8, 3.0, "")) as shown:
            async for _ in shown:
                return

    drawer.model.model.decode_features = counted
    try:
        asyncio.run(draw_and_leave())
        drawer.worker.submit(int).result()
    finally:
        del drawer.model.model.decode_features
    assert len(rows) < 8 * drawer.model.config.code_grid[0]


# ------------------------------------------------------------------------------------------------- the command


def test_a_missing_model_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as exit:
        main(["--model-path", str(tmp_path / "nowhere")])
    assert str(exit.value.code).startswith("vila-demo: ") and "\n" not in str(exit.value.code)


def test_a_missing_gradio_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="vila-hf\\[demo\\]"):
        main([])


def test_it_runs_as_a_script_from_a_folder_of_any_name(tmp_path):
    """As a Space does: nothing is installed, and the clone is not called vila."""
    clone = tmp_path / "my-space"
    clone.mkdir()
    for module in REPOSITORY.glob("*.py"):
        shutil.copy(module, clone)
    script = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
        "finally: print(sys.modules['vila'].__file__)"
    )
    arguments = [sys.executable, "-c", script, str(clone / "app.py"), "--help"]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert "vila-demo" in result.stdout, result.stderr
    assert result.stdout.splitlines()[-1] == str(clone / "__init__.py")
