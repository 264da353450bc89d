"""The demo page in a real headless browser: what a visitor clicks and sees."""

import os
import re
import shutil
import time
from contextlib import suppress

import pytest
from chat_requests import encode
from conftest import VILA_HD_CASE

gradio = pytest.importorskip("gradio", reason="no gradio: pip install 'vila-hf[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")

from vila.app import DEFAULT_MODEL, EXAMPLES, build_page  # noqa: E402
from vila.demo_vila import Demo  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ANSWER = ".bot.message"
BOX = "textarea"
PICTURES = ".gallery-item img, .grid-container img, .preview img"
LEAST = 3  # tokens: no answer is empty, whatever is asked
PATIENCE = 60_000  # ms; a page is compiled on first sight


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("VILA_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as driver:
        path = path or driver.chromium.executable_path
        if not os.path.exists(path):
            pytest.skip("no browser: apt-get install chromium, playwright install chromium, or set $VILA_BROWSER")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """`serve(folder)`: a page of that checkpoint, and its address."""
    uploads, pages = tmp_path_factory.mktemp("uploads"), []
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)

    def serve(folder, tokens=16):
        demo = Demo(folder, uploads, device="cpu")
        demo.model.generation_config.max_new_tokens = tokens  # what the page's slider starts with
        demo.model.generation_config.min_new_tokens = LEAST
        page = build_page(demo)
        pages.append(page)
        _, url, _ = page.launch(
            prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", allowed_paths=[str(EXAMPLES)]
        )
        return demo, url

    yield serve
    for page in pages:
        page.close(verbose=False)
    os.environ.pop("GRADIO_TEMP_DIR") if before is None else os.environ.update(GRADIO_TEMP_DIR=before)


@pytest.fixture(scope="module")
def nano(serve):
    return serve(DEFAULT_MODEL)


@pytest.fixture
def visit(browser):
    """`visit(url)`: a new visitor's page; at the end it must not have complained."""
    pages, complaints = [], []

    def visit(url):
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        page.locator(BOX).first.wait_for()
        pages.append(page)
        return page

    yield visit
    for page in pages:
        page.close()
    assert not complaints


def upload(page, *files):
    shown = page.locator(".thumbnail-item, .thumbnails img, .thumbnails video").nth(len(files) - 1)
    for _ in range(3):  # a page that is still loading may not listen yet
        page.locator("input[type=file]").first.set_input_files([str(file) for file in files])
        with suppress(playwright.TimeoutError):
            return shown.wait_for(timeout=PATIENCE / 3)
    raise AssertionError("uploaded files are not shown")


def ask(page, text, answers=1):
    """Sends a question; the text of the answer when it is complete."""
    page.locator(BOX).first.fill(text)
    page.locator("button.submit-button").click()
    page.locator(ANSWER).nth(answers - 1).wait_for()
    page.locator("button.submit-button").wait_for()  # takes the place of the stop button
    answer = page.locator(ANSWER).nth(answers - 1).filter(has_not_text="Loading content")
    answer.wait_for()
    return answer.inner_text().strip()


def test_an_uploaded_picture_is_asked_about(visit, nano):
    demo, url = nano
    page = visit(url)
    upload(page, EXAMPLES / "naming_0.jpg")
    seen = ask(page, "Tell me which thing is in the picture.")
    content = [
        {"type": "image", "image": str(EXAMPLES / "naming_0.jpg")},
        {"type": "text", "text": "Tell me which thing is in the picture."},
    ]
    inputs = encode(demo.processor, [{"role": "user", "content": content}], media_policy="notebook")
    ids = demo.model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert seen == demo.processor.decode(ids, skip_special_tokens=True).strip()


def test_an_answer_is_seen_growing(visit, nano):
    demo, url = nano
    demo.model.generation_config.min_new_tokens = 16
    try:
        page = visit(url)
        page.evaluate(
            """() => { window.seen = new Set(); new MutationObserver(() => document.querySelectorAll('.bot.message')
            .forEach(answer => window.seen.add(answer.innerText.trim())))
            .observe(document.body, {childList: true, subtree: true, characterData: true}) }"""
        )
        answer = ask(page, "Hello there.")
        seen = [text for text in page.evaluate("() => [...window.seen]") if text and answer.startswith(text)]
        assert len(seen) > 2 and seen[-1] == answer
    finally:
        demo.model.generation_config.min_new_tokens = LEAST


def test_stop_gives_the_box_back(visit, serve):
    slow, url = serve(DEFAULT_MODEL, tokens=1900)
    slow.model.generation_config.min_new_tokens = 1900
    made = []

    def take_time(*_):
        """A second click, where the page moved under the first, still finds an answer to stop."""
        made.append(1)
        time.sleep(0.02)

    slow.model.register_forward_hook(take_time)
    page = visit(url)
    page.locator(BOX).first.fill("Hello there.")
    page.locator("button.submit-button").click()
    page.locator(ANSWER, has_text=re.compile(r"(\w+\W+){8}")).first.wait_for()
    page.locator("button.stop-button").click()
    page.locator("button.submit-button").wait_for()
    slow.worker.submit(int).result()
    assert len(made) < 1900
    slow.model.generation_config.min_new_tokens = LEAST
    assert ask(page, "And now?", answers=2)


def test_a_bad_file_is_told_and_the_chat_goes_on(visit, nano, tmp_path):
    _, url = nano
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    page = visit(url)
    upload(page, broken)
    assert "broken.png" in ask(page, "What is it?")
    upload(page, EXAMPLES / "naming_0.jpg")
    assert "broken.png" not in ask(page, "Tell me which thing is in the picture.", answers=2)


@pytest.mark.slow
def test_the_few_shot_example_is_a_chat_to_go_on_with(visit, nano):
    _, url = nano
    page = visit(url)
    page.get_by_text("Learn names from four pictures").click()
    page.locator(ANSWER).nth(3).wait_for()
    page.locator(".thumbnail-item, .thumbnails img").first.wait_for()
    assert [answer.strip() for answer in page.locator(ANSWER).all_inner_texts()] == ["MOP", "XED", "FOV", "RIF"]
    page.locator("button.submit-button").click()
    page.locator(ANSWER).nth(4).wait_for()


@pytest.mark.slow
def test_an_edited_answer_is_what_the_chat_goes_on_with(visit, nano, monkeypatch):
    demo, url = nano
    asked = []
    encode = demo.encode
    monkeypatch.setattr(demo, "encode", lambda chat: asked.append(chat) or encode(chat))
    page = visit(url)
    ask(page, "Hello there.")
    page.get_by_label("Edit").last.click()
    page.locator(f"{ANSWER} textarea, .bot textarea").first.fill("General Kenobi")
    page.get_by_label("Submit").first.click()
    page.get_by_text("General Kenobi").wait_for()
    ask(page, "Again.", answers=2)
    for _ in range(PATIENCE // 100):
        if len(asked) > 1:
            break
        page.wait_for_timeout(100)
    assert [block["text"] for turn in asked[-1] for block in turn["content"]] == [
        "Hello there.",
        "General Kenobi",
        "Again.",
    ]


@pytest.mark.slow
def test_a_vila_u_draws(visit, serve, vila_u_folder):
    _, url = serve(vila_u_folder)
    page = visit(url)
    page.get_by_role("tab", name="Draw").click()
    page.get_by_label("What to draw").fill("Fireworks.")
    page.get_by_role("button", name="Draw").click()
    page.locator(PICTURES).first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_label("Seed").fill("x")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("The seed must be a whole number").wait_for()


@pytest.mark.slow
def test_a_vila_hd_shows_where_it_looked(visit, serve, vila_hd_folder):
    _, url = serve(vila_hd_folder, tokens=3)
    page = visit(url)
    upload(page, VILA_HD_CASE / "input_0.png")
    ask(page, "What is it?")
    page.locator(PICTURES).first.wait_for()
