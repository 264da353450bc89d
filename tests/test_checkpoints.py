"""The embedded checkpoints as folders: small, no copies of the code, loadable anywhere, with their scores shown."""

import json
import os
import shutil
import subprocess
import sys

import evaluate_hd
import evaluate_u
import publish
import publish_hd
import publish_u
import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file
from without_package import WITHOUT_PACKAGE

CHECKPOINTS = REPOSITORY / "checkpoints"
# folder -> where its card is written, and what makes a table of its scores
KINDS = {
    "vila-nano": (publish.CARD, publish.scores_table),
    "vila-hd-nano": (publish_hd.CARD, evaluate_hd.table_of),
    "vila-u-nano": (publish_u.CARD, evaluate_u.table_of),
}
MAX_BYTES = 16_000_000


@pytest.fixture(params=KINDS)
def folder(request):
    return CHECKPOINTS / request.param


@pytest.fixture
def report(folder):
    return json.loads((folder / publish.SCORES).read_text())


def test_every_checkpoint_is_looked_at():
    assert {folder.name for folder in CHECKPOINTS.iterdir()} == set(KINDS)


def test_the_folder_is_small_and_has_no_copy_of_the_code(folder):
    (weights,) = folder.glob("*.safetensors")
    assert weights.stat().st_size <= MAX_BYTES
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}
    modules = sorted(folder.glob("*.py"))
    assert modules and all(module.resolve() == REPOSITORY / module.name for module in modules)


def test_links_are_those_that_the_modules_need(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    publish.link_modules(tmp_path)
    assert {link.name for link in tmp_path.glob("*.py")} == {module.name for module in folder.glob("*.py")}


def test_the_card_and_the_readme_show_the_measured_scores(folder, report):
    table = KINDS[folder.name][1](report)
    assert table in (folder / "README.md").read_text()
    assert table in (REPOSITORY / "README.md").read_text()


def test_published_folders_are_those_that_are_here(folder, report, tmp_path):
    target = tmp_path / "checkpoints" / folder.name
    publish.main([str(folder), str(folder / publish.SCORES), "--target", str(target)], folder, *KINDS[folder.name])
    assert {path.name for path in target.iterdir()} == {path.name for path in folder.iterdir()}
    assert (target / "README.md").read_text() == (folder / "README.md").read_text()


def test_it_loads_where_the_package_is_not_installed(folder, tmp_path):
    """In a process of its own, from a copy of the folder."""
    copy = shutil.copytree(folder, tmp_path / folder.name)
    code = WITHOUT_PACKAGE + (
        "from PIL import Image\n"
        "from transformers import pipeline\n"
        "picture = {'type': 'image', 'image': Image.new('RGB', (112, 112), 'white')}\n"
        "content = [picture, {'type': 'text', 'text': 'Is there a star?'}]\n"
        "pipe = pipeline('image-text-to-text', model=sys.argv[1], trust_remote_code=True)\n"
        "print(pipe(text=[{'role': 'user', 'content': content}], max_new_tokens=4)[0]['generated_text'])\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code, str(copy)], check=True, env=environment, cwd=tmp_path)
