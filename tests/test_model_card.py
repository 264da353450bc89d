"""Model cards: front matter of every kind, facts that are measured, and snippets that run as they stand."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import COMMITTED_GOLDENS, REPOSITORY
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel, AutoProcessor
from vila.conversion_vila import convert
from vila.hub_upload import notes, prepare
from vila.model_card_vila import WIDEST, CardOptions, kv_bytes_per_token, memory_table, model_card
from vila.quantize.checkpoint import quantize
from vila.quantize.options import Options
from vila.staging_vila import check_loads, stage
from without_package import WITHOUT_PACKAGE

NANO = REPOSITORY / "checkpoints" / "vila-nano"
REPO = "org/some-model"
NVILA = CardOptions(license="cc-by-nc-4.0", base_model=("Efficient-Large-Model/NVILA-Lite-2B",))
GOLDENS = {
    "vila15": "vila/vila15_image",
    "llama3": "vila/vila15_llama3_image",
    "s2": "vila/vila15_s2_image",
    "nvila": "vila/nvila_lite_image",
    "vila_u": "vila_u/image_generation",
    "vila_hd": "vila_hd/vila_hd_vlm",
}


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """`staged(kind)`: a tiny checkpoint of that kind, staged without a card, once."""
    found = {}

    def stage_once(kind):
        if kind not in found:
            folder = tmp_path_factory.mktemp(kind)
            if kind == "int4":
                source = quantize(NANO, folder / "quantised", Options(method="rtn", group_size=64))
            else:
                source = NANO if kind == "nano" else COMMITTED_GOLDENS / GOLDENS[kind] / "checkpoint"
            (folder / "staging").mkdir()
            found[kind] = stage(source, folder / "staging")
        return found[kind]

    return stage_once


def snippets(card):
    return re.findall(r"```python\n(.*?)```", str(card), re.DOTALL)


# ------------------------------------------------------------------------------------------------------ front matter


@pytest.mark.parametrize("kind", ["nano", "int4", *GOLDENS])
def test_the_front_matter_is_right_for_every_kind(staged, kind):
    card = model_card(staged(kind), REPO, NVILA)
    data = ModelCard(str(card)).data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == ("any-to-any" if kind == "vila_u" else "image-text-to-text")
    assert {"custom_code", "vila"} <= set(data["tags"])
    assert data["license"] == "cc-by-nc-4.0"
    assert data["base_model"] == list(NVILA.base_model)
    assert data.get("base_model_relation") == ("quantized" if kind == "int4" else None)
    for example in data["widget"]:
        (message,) = example["messages"]
        assert [block["type"] for block in message["content"]] == ["image_url", "text"]
        assert message["content"][0]["image_url"]["url"].startswith("https://")
    assert "&id" not in str(card)


@pytest.mark.parametrize("kind", ["nano", "int4", *GOLDENS])
def test_every_card_has_the_sections_and_says_both_licences(staged, kind):
    text = str(model_card(staged(kind), REPO, NVILA))
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert sections == [
        "Use", "Model details", "Architecture", "Input", "Output", "Memory", "Intended use",
        "Training and evaluation data", "Hardware", "Limits", "Ethical considerations", "Citation",
    ]  # fmt: skip
    assert "weights: cc-by-nc-4.0; code in this repository: [Apache-2.0](LICENSE-CODE)" in text
    assert "hosted inference does not run code of a\nrepository" in text
    assert f"https://huggingface.co/{REPO}/blob/main/handler.py" in text
    assert "{{" not in text and "{%" not in text and "None" not in text
    assert not re.search(r"[ \t]+$", text, re.MULTILINE) and "\n\n\n" not in text


def test_a_llama_3_says_what_it_was_built_with(staged):
    for kind, expected in {"llama3": True, "vila15": False, "nano": False}.items():
        text = str(model_card(staged(kind), REPO, NVILA))
        assert ("Built with Meta Llama 3" in text) is expected


def test_the_name_that_the_licence_of_llama_3_wants_is_asked_for(tmp_path):
    source = COMMITTED_GOLDENS / GOLDENS["llama3"] / "checkpoint"
    staged = prepare(source, REPO, tmp_path, NVILA)
    (note,) = notes(staged, REPO)
    assert 'begin with "Llama-3"' in note
    assert notes(staged, "org/Llama-3-VILA") == []


def test_rounding_is_described_as_its_report_says(staged, tmp_path):
    folder = staged("int4").folder
    found = []
    for report in ({"method": "gptq"}, {"llm_awq": "file.pt"}, {"method": "awq"}):
        (tmp_path / str(len(found))).mkdir()
        shutil.copytree(folder, tmp_path / str(len(found)), dirs_exist_ok=True)
        (tmp_path / str(len(found)) / "quantization_report.json").write_text(json.dumps(report))
        found.append(str(model_card(staged("int4")._replace(folder=tmp_path / str(len(found))), REPO, NVILA)))
    gptq, llm_awq, awq = found
    assert "2210.17323" in gptq and "2306.00978" not in gptq and "- gptq" in gptq
    assert "2306.00978" in llm_awq and "calibration data" not in llm_awq
    assert "2306.00978" in awq and "Rounding looked at calibration data" in awq
    assert all("rounded to 4 bits" in text for text in found)


@pytest.mark.parametrize(
    ("kind", "papers"),
    [
        ("vila15", ["2312.07533"]),
        ("nano", ["2312.07533", "2412.04468"]),
        ("vila_u", ["2312.07533", "2409.04429"]),
        ("vila_hd", ["2312.07533", "2503.19903"]),
        ("int4", ["2312.07533", "2412.04468"]),
    ],
)
def test_papers_are_those_of_what_the_config_uses(staged, kind, papers):
    assert re.findall(r"eprint = \{([\d.]+)\}", str(model_card(staged(kind), REPO, NVILA))) == papers


def test_options_of_the_card_are_written(staged):
    options = CardOptions(
        license="other",
        license_name="own-licence",
        license_link="LICENSE",
        datasets=("org/pictures",),
        language=("en", "de"),
        date="May 2024",
        space="org/demo",
    )
    card = model_card(staged("nano"), REPO, options)
    assert card.data.license_name == "own-licence" and card.data.language == ["en", "de"]
    assert card.data.base_model is None
    for text in (
        "weights: [own-licence](LICENSE)",
        "(https://huggingface.co/datasets/org/pictures)",
        "| Model date | May 2024 |",
        "[Space](https://huggingface.co/spaces/org/demo)",
    ):
        assert text in str(card)


# ------------------------------------------------------------------------------------------------ cards that there are

WRITTEN = """---
license: apache-2.0
pipeline_tag: text-generation
tags: [mine]
model_name: Mine
inference: false
model-index:
- name: Mine
  results:
  - task: {type: visual-question-answering}
    dataset: {name: Own, type: org/own}
    metrics: [{type: accuracy, value: 0.5}]
---

# My words
"""


def test_a_written_card_keeps_its_words_and_gets_right_front_matter(staged):
    card = model_card(staged("nano"), REPO, CardOptions(), WRITTEN)
    assert str(card).endswith("# My words\n")
    data = ModelCard(str(card)).data
    assert (data.license, data.pipeline_tag, data.library_name) == ("apache-2.0", "image-text-to-text", "transformers")
    assert data.model_name == "Mine" and data.tags[:2] == ["mine", "custom_code"] and data.inference is False
    assert [result.metric_value for result in data.eval_results] == [0.5]
    again = model_card(staged("nano"), REPO, CardOptions(), str(card))
    assert str(again) == str(card)


def test_a_card_in_the_folder_goes_before_that_of_the_repository(tmp_path):
    staged = prepare(NANO, REPO, tmp_path, CardOptions(), previous=WRITTEN)
    assert "My words" not in (staged.folder / "README.md").read_text()
    assert notes(staged, REPO) == []


def test_a_card_without_a_way_to_load_is_told(tmp_path, staged):
    source = convert(COMMITTED_GOLDENS / GOLDENS["nvila"] / "checkpoint", tmp_path / "converted")
    (source / "README.md").write_text(WRITTEN)
    (tmp_path / "staging").mkdir()
    (note,) = notes(prepare(source, REPO, tmp_path / "staging", CardOptions()), REPO)
    assert "trust_remote_code" in note and "--new-card" in note


@pytest.mark.parametrize(
    ("kind", "options", "previous", "message"),
    [
        ("nano", CardOptions(), None, "name it with --license"),
        ("nano", CardOptions(license="other", license_name="x"), None, "--license other needs"),
        ("int4", CardOptions(license="mit"), None, "needs --base-model"),
        ("nano", CardOptions(license="mit"), "---\n: [\n---\n", "front matter of README.md cannot be read"),
    ],
)
def test_what_nobody_said_is_asked_for(staged, kind, options, previous, message):
    with pytest.raises(ValueError, match=message):
        model_card(staged(kind), REPO, options, previous)


# ---------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("kind", ["nano", "nvila", "s2"])
def test_the_memory_table_is_what_a_prompt_takes(staged, kind):
    folder = staged(kind).folder
    model = AutoModel.from_pretrained(folder, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": Image.new("RGB", WIDEST[::-1])}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cached == kv_bytes_per_token(model.config) * inputs["input_ids"].shape[1]

    text = str(model_card(staged(kind), REPO, NVILA))
    last = re.findall(r"^\| ([\d,]+) \| (\d+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", text, re.MULTILINE)[-1]
    tokens, pictures, *sizes = [float(cell.replace(",", "")) for cell in last]
    pixels = inputs["pixel_values"].to(model.dtype).nbytes
    weights = sum(parameter.nbytes for parameter in model.parameters())
    expected = [weights, kv_bytes_per_token(model.config) * tokens, pixels * pictures]
    assert tokens == model.config.text_config.max_position_embeddings
    for written, found in zip(sizes, [*expected, sum(expected)]):
        # three digits; the tower's weights that are not used are stored all the same
        assert written == pytest.approx(found / 1e9, rel=0.06)


def test_the_looks_of_a_vila_hd_are_counted(staged):
    folder = staged("vila_hd").folder
    model = AutoModel.from_pretrained(folder, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": Image.linear_gradient("L").convert("RGB")}, {"type": "text", "text": "x"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    lengths = []
    for looks in (0, 1):
        with torch.no_grad():
            output = model(**inputs, num_look_close=looks, use_cache=True)
        lengths.append(output.past_key_values.get_seq_length())
    text = str(model_card(staged("vila_hd"), REPO, NVILA))
    per_picture, per_look = map(
        int, re.search(r"takes up to (\d+) tokens, and a look up to (\d+) more", text).groups()
    )
    assert 0 < lengths[1] - lengths[0] <= per_look
    tokens, pictures = re.findall(r"^\| ([\d,]+) \| (\d+) ", text, re.MULTILINE)[-1]
    assert int(pictures) == int(tokens.replace(",", "")) // (per_picture + model.config.num_look_close * per_look)


def test_contexts_beyond_the_models_own_are_not_listed(staged):
    config = staged("nano").family.config_class.from_pretrained(staged("nano").folder)
    assert [row["tokens"] for row in memory_table(config, 10**9, 100, 10**6)] == [2048]
    config.text_config.max_position_embeddings = 2**20
    rows = memory_table(config, 10**9, 100, 10**6)
    assert [row["tokens"] for row in rows] == [4096, 32768, 2**20]
    assert [row["pictures"] for row in rows] == [40, 327, 10485]
    assert rows[0]["total"] == pytest.approx(1 + 4096 * 3072 / 1e9 + 0.04)


# --------------------------------------------------------------------------------------------------------- snippets


def picture_of(folder):
    """A picture under the name that the snippets read."""
    Image.linear_gradient("L").convert("RGB").save(folder / "picture.jpg")


def test_the_snippets_run_as_they_stand_in_a_process_without_the_package(staged, tmp_path):
    code = snippets(model_card(staged("nano"), REPO, NVILA))
    assert len(code) == 2
    picture_of(tmp_path)
    # the staged folder under the repository's name: what a relative path and a Hub id have in common
    (tmp_path / "org").mkdir()
    (tmp_path / REPO).symlink_to(staged("nano").folder)
    result = subprocess.run(
        [sys.executable, "-c", "\n".join([WITHOUT_PACKAGE, *code])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 2


@pytest.mark.parametrize(("kind", "count"), [("vila_u", 3), ("vila_hd", 3)])
def test_the_snippets_of_other_families_run(staged, kind, count, tmp_path, monkeypatch, capsys):
    code = snippets(model_card(staged(kind), REPO, NVILA))
    assert len(code) == count
    picture_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    for snippet in code:
        exec(compile(snippet.replace(REPO, str(staged(kind).folder)), "snippet", "exec"), {})
    assert capsys.readouterr().out
    if kind == "vila_u":
        assert Image.open("mountain.png").size[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4", "vila_u", "vila_hd", "vila15"])
def test_every_kind_loads_from_its_staged_folder_alone(staged, kind):
    assert isinstance(check_loads(staged(kind).folder), str)
