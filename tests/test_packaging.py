"""What a wheel holds, and that it works from anywhere."""

import re
import subprocess
import sys
import zipfile
from importlib.metadata import requires

import pytest
from conftest import COMMITTED_GOLDENS, REPOSITORY

HARD_REQUIREMENTS = {"torch", "transformers", "safetensors", "huggingface_hub", "tokenizers", "pillow", "av"}


def test_hard_requirements_stay_few():
    requirements = [requirement for requirement in requires("vila-hf") if "extra ==" not in requirement]
    assert {
        re.match(r"[\w.-]+", requirement)[0].replace("-", "_") for requirement in requirements
    } == HARD_REQUIREMENTS


def test_committed_goldens_stay_small():
    assert sum(path.stat().st_size for path in COMMITTED_GOLDENS.rglob("*") if path.is_file()) < 12 * 2**20


@pytest.mark.slow
def test_wheel_is_complete_and_converts_without_the_clone(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, REPOSITORY]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("vila_hf-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert {"vila/chat_templates/vicuna_v1.jinja", "vila/model_cards/model_card.md.jinja", "vila/LICENSE"} <= set(
        names
    )
    modules = {f"vila/{path.name}" for path in REPOSITORY.glob("*.py")}
    assert modules <= set(names)
    assert not [name for name in names if "tests/" in name or "examples/" in name]

    source = COMMITTED_GOLDENS / "vila" / "nvila_lite_image" / "checkpoint"
    script = "import vila, sys; from vila.conversion_vila import main; print(vila.__file__); main(sys.argv[1:])"
    result = subprocess.run(
        [sys.executable, "-c", script, source, tmp_path / "converted"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path / "installed"))
    assert (tmp_path / "converted" / "modeling_vila.py").is_file()
