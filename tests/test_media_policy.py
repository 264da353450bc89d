"""The media policy: which sources are read and how much of them, through every way in."""

import base64
import copy
import dataclasses
import io
import itertools
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from picture_inputs import black_png
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, pipeline
from vila import VilaImageProcessor, VilaProcessor, image_loading_vila, video_processing_vila
from vila.image_loading_vila import open_image
from vila.media_policy_vila import MediaPolicy
from vila.video_processing_vila import load_frames

LITE = "nvila_lite_image"
RED = Image.new("RGB", (20, 10), "red")


def png(picture=RED):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


@pytest.fixture
def server(loopback):
    loopback.content = PNG
    return loopback


@pytest.fixture(scope="module")
def folder(converted):
    return converted(LITE)


@pytest.fixture
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def chat_with(source, key="image"):
    return [{"role": "user", "content": [{"type": "image", key: source}, {"type": "text", "text": "What?"}]}]


def encode(processor, source, key="image", **options):
    return processor.apply_chat_template(
        chat_with(source, key), tokenize=True, return_dict=True, processor_kwargs=options
    )


# ---- the object

NONSENSE = [
    {"urls": 1},
    {"paths": "yes"},
    {"private_addresses": None},
    {"timeout": 0},
    {"timeout": -1.0},
    {"timeout": float("nan")},
    {"timeout": float("inf")},
    {"timeout": True},
    {"max_redirects": -1},
    {"max_bytes": 0},
    {"max_pixels": -5},
    {"max_frames": 2.0},
    {"max_media": "3"},
    {"max_visual_tokens": None},
    {"root": "/no/such/folder"},
    {"root": []},
    {"root": 5},
    {"root": __file__},
]


@pytest.mark.parametrize("fields", NONSENSE, ids=str)
def test_nonsense_is_refused_by_name(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"media policy: {name} must be"):
        MediaPolicy(**fields)
    with pytest.raises(ValueError, match=f"media policy: {name} must be"):
        MediaPolicy().changed(fields)


@pytest.mark.parametrize("change", [5, ["urls"], "open", "", ..., MediaPolicy, {"url": True}, {1: 2}], ids=str)
def test_what_is_no_policy_is_refused_without_showing_it(change):
    with pytest.raises(ValueError, match="media_policy") as caught:
        MediaPolicy().changed(change)
    assert "0x" not in str(caught.value)


def test_a_dictionary_changes_the_policy_in_force():
    server = MediaPolicy.server(max_media=3)
    assert server.changed({"timeout": 2}) == MediaPolicy.server(max_media=3, timeout=2)
    assert server.changed(None) is server
    assert server.changed("notebook") == MediaPolicy()
    assert MediaPolicy().changed("server") == MediaPolicy.server() != MediaPolicy()


def test_a_policy_of_another_copy_of_the_code_is_taken():
    """Modules of remote code live in several namespaces."""
    twin = dataclasses.make_dataclass("MediaPolicy", [(f.name, f.type) for f in dataclasses.fields(MediaPolicy)])
    given = MediaPolicy.server(max_pixels=7)
    assert MediaPolicy().changed(twin(**dataclasses.asdict(given))) == given


def test_no_limit_of_a_server_is_looser_than_that_of_a_notebook():
    server, notebook = MediaPolicy.server(), MediaPolicy()
    assert not server.urls and not server.paths and not server.private_addresses
    for field in dataclasses.fields(MediaPolicy):
        if isinstance(field.default, (int, float)):
            assert getattr(server, field.name) <= getattr(notebook, field.name)


# ---- every way in


WAYS_IN = {
    "from_pretrained": lambda folder, change: AutoProcessor.from_pretrained(folder, media_policy=change),
    "attribute": lambda folder, change: assigned(AutoProcessor.from_pretrained(folder), change),
    "constructor": lambda folder, change: rebuilt(AutoProcessor.from_pretrained(folder), change),
}


def assigned(processor, change):
    processor.media_policy = change
    return processor


def rebuilt(processor, change):
    parts = (processor.image_processor, processor.tokenizer, processor.chat_template)
    return VilaProcessor(*parts, num_tile_tokens=processor.num_tile_tokens, media_policy=change)


@pytest.mark.parametrize(
    "change", ["server", MediaPolicy(paths=False), {"paths": False}], ids=["name", "object", "dict"]
)
@pytest.mark.parametrize("way", WAYS_IN)
def test_a_policy_can_be_given_to_the_processor(way, change, folder, tmp_path):
    (tmp_path / "red.png").write_bytes(PNG)
    processor = WAYS_IN[way](folder, change)
    for given in (processor, copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        with pytest.raises(ValueError, match="prompt 0: picture 0: files are not read here"):
            encode(given, str(tmp_path / "red.png"), "path")
        with pytest.raises(ValueError, match="files are not read here"):
            given.image_processor(str(tmp_path / "red.png"))
    assert encode(processor, PNG)["input_ids"]


@pytest.mark.parametrize("change", ["server", {"paths": False}], ids=["name", "dict"])
def test_a_policy_can_be_given_for_one_call(change, processor, tmp_path):
    (tmp_path / "red.png").write_bytes(PNG)
    path = str(tmp_path / "red.png")
    expected = encode(processor, path)["input_ids"]
    with pytest.raises(ValueError, match="files are not read here"):
        encode(processor, path, media_policy=change)
    assert encode(processor, path)["input_ids"] == expected
    processor.media_policy = "server"
    assert encode(processor, path, media_policy={"paths": True})["input_ids"] == expected
    with pytest.raises(ValueError, match="files are not read here"):
        encode(processor, path, media_policy={"timeout": 3})


@pytest.mark.parametrize("part", ["images_kwargs", "videos_kwargs"])
def test_a_policy_of_one_modality_is_refused(part, processor):
    with pytest.raises(ValueError, match="one for pictures and videos"):
        encode(processor, PNG, **{part: {"media_policy": "server"}})


def test_the_image_processor_alone_has_one_too(folder, tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(PNG)
    for strict in (
        VilaImageProcessor(media_policy="server"),
        AutoImageProcessor.from_pretrained(folder, media_policy="server"),
    ):
        with pytest.raises(ValueError, match="files are not read here"):
            strict(path)
        assert len(strict(PNG)["pixel_values"]) == len(strict(path, media_policy="notebook")["pixel_values"])


@pytest.fixture(scope="module")
def pipe(folder):
    processor = AutoProcessor.from_pretrained(folder, media_policy="server")
    return pipeline("image-text-to-text", model=str(folder), processor=processor, dtype="float32")


def test_a_pipeline_keeps_the_policy_of_its_processor(pipe, tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(PNG)
    options = {"max_new_tokens": 1, "return_full_text": False}
    with pytest.raises(ValueError, match="files are not read here"):
        pipe(text=chat_with(str(path)), **options)
    allowed = pipe(text=chat_with(str(path)), processor_kwargs={"media_policy": {"paths": True}}, **options)
    assert allowed == [{**allowed[0], "generated_text": pipe(text=chat_with(RED), **options)[0]["generated_text"]}]


# ---- the policy is not of the checkpoint


def test_a_policy_is_never_saved(processor, tmp_path):
    processor.media_policy = MediaPolicy.server(max_media=3)
    processor.save_pretrained(tmp_path / "processor")
    processor.image_processor.save_pretrained(tmp_path / "pictures")
    texts = [file.read_text() for file in tmp_path.rglob("*.json")]
    assert texts and not any("media_policy" in text or "max_media" in text for text in texts)
    assert AutoProcessor.from_pretrained(tmp_path / "processor").media_policy == MediaPolicy()
    assert "media_policy" not in processor.to_dict() and "media_policy" not in repr(processor)


LOOSE = {"private_addresses": True, "max_pixels": 10**12}


@pytest.mark.parametrize("key", ["media_policy", "_media_policy"])
def test_files_of_a_checkpoint_do_not_set_the_policy(key, folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / f"loose{key}", symlinks=True)
    for name, part in (("processor_config.json", None), ("processor_config.json", "image_processor")):
        content = json.loads((copied / name).read_text())
        (content[part] if part else content)[key] = LOOSE
        (copied / name).write_text(json.dumps(content))
    content = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps({**content, key: LOOSE}))
    for options in ({}, {"media_policy": "server"}):
        processor = AutoProcessor.from_pretrained(copied, **options)
        assert processor.media_policy == MediaPolicy().changed(options.get("media_policy"))
        pictures = AutoImageProcessor.from_pretrained(copied, **options)
        assert pictures.media_policy == processor.media_policy
        with pytest.raises(ValueError, match=r"private, loopback|urls=False"):
            encode(processor, "http://127.0.0.1/a.png", "url")
    (copied / "pictures.json").write_text(json.dumps({key: LOOSE}))
    assert VilaImageProcessor.from_json_file(copied / "pictures.json").media_policy == MediaPolicy()


# ---- sizes

BIG = base64.b64encode(bytes(1200)).decode()
TOO_LARGE = {
    "bytes": lambda folder: bytes(1001),
    "base64": lambda folder: BIG,
    "data URI": lambda folder: f"data:{{kind}}/x;base64,{BIG}",
    "file": lambda folder: sparse_file(folder / "large.bin", 2**33),
}


def sparse_file(path, size):
    with open(path, "wb") as file:
        file.truncate(size)
    return str(path)


@pytest.mark.parametrize(
    ("form", "kind"),
    [*itertools.product(TOO_LARGE, ["image"]), *itertools.product(["bytes", "data URI", "file"], ["video"])],
)
def test_a_source_larger_than_the_byte_limit_is_refused_before_it_is_read(form, kind, tmp_path, monkeypatch):
    source = TOO_LARGE[form](tmp_path)
    source = source.format(kind=kind) if form == "data URI" else source
    monkeypatch.setattr(base64, "b64decode", None)
    monkeypatch.setattr("builtins.open", None)
    monkeypatch.setattr(video_processing_vila.av, "open", None)
    with pytest.raises(ValueError, match=r"max_bytes=1000 of the media policy.*media_policy=\{'max_bytes'"):
        policy = MediaPolicy(max_bytes=1000)
        open_image(source, policy) if kind == "image" else load_frames(source, policy=policy)


@pytest.fixture
def no_decoding(monkeypatch):
    def refuse(*args):
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(image_loading_vila.EncodedPicture, "to_image", refuse)
    monkeypatch.setattr(image_loading_vila, "array_to_image", refuse)
    monkeypatch.setattr(video_processing_vila, "frames_at", refuse)


def user(*content):
    blocks = [c if isinstance(c, dict) else {"type": "image", "image": c} for c in content]
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": "What?"}]}]


def encode_chats(processor, *chats, **options):
    return processor.apply_chat_template(list(chats), tokenize=True, return_dict=True, processor_kwargs=options)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_no_picture_is_decoded_if_a_later_one_is_too_large(processor, no_decoding):
    huge = black_png(12_000, 12_000)
    with pytest.raises(
        ValueError, match=r"^prompt 1: picture 1: .* 12000x12000 pixels, more than the limit max_pixels="
    ):
        encode_chats(processor, user(PNG), user(PNG, huge))


def test_an_array_is_measured_before_it_is_converted(no_decoding):
    array = np.broadcast_to(np.float64(0.5), (20_000, 20_000, 3))
    with pytest.raises(ValueError, match="20000x20000 pixels"):
        VilaImageProcessor()(array)


def test_media_are_counted_before_any_is_fetched(processor, server, no_decoding):
    urls = [f"{server.url}/{number}.png" for number in range(3)]
    policy = {"max_media": 2, "private_addresses": True}
    with pytest.raises(ValueError, match=r"3 pictures and videos .* limit max_media=2"):
        encode_chats(processor, user(*urls[:2]), user(urls[2]), media_policy=policy)
    with pytest.raises(ValueError, match="max_media=2"):
        processor.image_processor(urls, media_policy=policy)
    with pytest.raises(ValueError, match=r"1 <image> token.* 3 picture"):
        processor(text="<image>", images=urls, media_policy={"private_addresses": True})
    assert server.asked == []


def rows_of(processor, data):
    return sum(ids.count(processor.image_token_id) + ids.count(processor.video_token_id) for ids in data["input_ids"])


WIDE = png(Image.new("RGB", (280, 70)))
CLIP = np.zeros((5, 20, 20, 3), np.uint8)


@pytest.mark.parametrize("as_images", [True, False])
@pytest.mark.parametrize(
    ("chats", "last"),
    [
        ([user(WIDE)], "prompt 0: picture 0"),
        ([user(WIDE), user(PNG, WIDE)], "prompt 1: picture 1"),
        ([user(PNG), user({"type": "video", "video": CLIP})], "prompt 1: video 0"),
        ([user({"type": "video", "video": CLIP}, PNG)], "prompt 0: picture 0"),
    ],
    ids=["tiled", "several", "clip", "both"],
)
def test_visual_tokens_are_counted_exactly_before_decoding(chats, last, as_images, processor, monkeypatch):
    processor.video_as_images = as_images
    exact = rows_of(processor, encode_chats(processor, *chats))
    assert exact > 0
    encode_chats(processor, *chats, media_policy={"max_visual_tokens": exact})
    monkeypatch.setattr(VilaImageProcessor, "_picture_views", None)
    monkeypatch.setattr(VilaImageProcessor, "frame_views", None)
    with pytest.raises(ValueError, match=f"^{last}: {exact} or more tokens .* limit max_visual_tokens={exact - 1}"):
        encode_chats(processor, *chats, media_policy={"max_visual_tokens": exact - 1})


def test_tiles_of_frames_are_counted_before_decoding(processor, no_decoding):
    clip = {"type": "video", "video": CLIP}
    rows = 5 * 13 * processor.num_tile_tokens
    with pytest.raises(ValueError, match=f"video 0: {rows} or more tokens"):
        encode_chats(processor, user(clip), video_max_tiles=12, media_policy={"max_visual_tokens": rows - 1})


def test_a_single_frame_is_counted_as_if_cut_to_the_utmost(processor, monkeypatch):
    clip, limit = {"type": "video", "video": CLIP[:1]}, 13 * processor.num_tile_tokens
    encode_chats(processor, user(clip), media_policy={"max_visual_tokens": limit})
    monkeypatch.setattr(VilaImageProcessor, "_picture_views", None)
    with pytest.raises(ValueError, match=f"max_visual_tokens={limit - 1}"):
        encode_chats(processor, user(clip), media_policy={"max_visual_tokens": limit - 1})


def test_huge_pictures_are_in_memory_one_at_a_time(processor):
    """Each takes 120 MB, and once more while it is turned upright."""
    resource = pytest.importorskip("resource")
    huge = black_png(6_000, 5_000, channels=3)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + (500 << 20), limits[1]))
    try:
        data = encode_chats(processor, user(*[huge] * 8))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert len(data["pixel_values"]) == 8


# ---- what a pipeline does before the processor

FORMS = {
    "image": lambda url: {"type": "image", "image": url},
    "url": lambda url: {"type": "image", "url": url},
    "path": lambda url: {"type": "image", "path": url},
    "base64": lambda url: {"type": "image", "base64": url},
    "image_url": lambda url: {"type": "image_url", "image_url": {"url": url}},
    "video": lambda url: {"type": "video", "video": url},
    "video url": lambda url: {"type": "video", "url": url},
    "video path": lambda url: {"type": "video", "path": url},
}


@pytest.mark.parametrize("policy", ["server", "notebook"])
@pytest.mark.parametrize("form", FORMS)
def test_a_pipeline_fetches_no_media_of_a_chat_by_itself(form, policy, pipe, server):
    with pytest.raises(ValueError, match=r"prompt 0: \w+ 0: (URLs are not fetched here|.* leads to a private)"):
        pipe(
            text=user(FORMS[form](f"{server.url}/a.png")),
            max_new_tokens=1,
            processor_kwargs={"media_policy": policy},
        )
    assert server.asked == []


def test_the_sound_of_a_video_is_not_fetched(pipe, server):
    with pytest.raises(ValueError, match="no audio"):
        pipe(text=user(FORMS["video"](f"{server.url}/a.mp4")), max_new_tokens=1, load_audio_from_video=True)
    assert server.asked == []


@pytest.mark.xfail(strict=True, reason="transformers fetches the strings in `images=` before it calls the processor")
def test_a_pipeline_fetches_no_pictures_beside_a_prompt_by_itself(pipe, server):
    with pytest.raises(ValueError):
        pipe(images=f"{server.url}/a.png", text="<image> What?", max_new_tokens=1)
    assert server.asked == []
