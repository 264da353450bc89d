"""The embedded checkpoint: what it answers, and everything that shows it (demo, notebook, LoRA)."""

import json
import os
import random
import subprocess
import sys

import demo
import evaluate
import judge
import nbformat
import publish
import pytest
from answering import answer, score
from conftest import REPOSITORY
from episodes import image_block
from nbclient import NotebookClient
from PIL import Image
from transformers import AutoModel, AutoProcessor
from without_package import WITHOUT_PACKAGE

FOLDER = evaluate.DEFAULT_MODEL
SCORES = {row["trial"]: row for row in json.loads((FOLDER / publish.SCORES).read_text())["scores"]}
GOALS = [trial for trial, row in SCORES.items() if row["goal"]]
NANO = REPOSITORY / "examples" / "nano"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(FOLDER, trust_remote_code=True, dtype="float32").eval()


def episodes_of(trial, count, seed=1):
    return list(judge.TRIALS[trial].episodes(count, seed))


def accuracy(model, processor, episodes, max_new_tokens=16):
    answers = answer(model, processor, episodes, max_new_tokens)
    return sum(map(judge.is_right, episodes, answers)) / len(episodes)


# ----------------------------------------------------------------------------------------------------- it sees


@pytest.mark.parametrize("colour", ["black", "white"])
def test_without_its_picture_an_answer_is_a_guess(model, processor, colour):
    episodes = episodes_of("naming", 40)
    blind = [episode.with_media((image_block(Image.new("RGB", (112, 112), colour)),)) for episode in episodes]
    seeing = answer(model, processor, episodes, 16)
    guessed = answer(model, processor, blind, 16)
    assert sum(one != other for one, other in zip(seeing, guessed)) >= 20
    assert accuracy(model, processor, blind) < 0.5 < accuracy(model, processor, episodes)


@pytest.fixture(scope="module")
def permuted(model, processor):
    """`(names, answer, answer where the pictures in front have changed places, what is right there)` per episode."""
    rows = []
    for episode in episodes_of("fewshot_4", 24):
        *shots, last = episode.media
        names = [turn.answer for turn in episode.turns[:-1]]
        other = episode.with_media(*shots[1:], shots[0], last)
        answers = [answer(model, processor, [one], 8)[0].strip() for one in (episode, other)]
        rows.append((names, *answers, names[names.index(episode.target.answer) - 1]))
    return rows


def test_few_shot_answers_are_names_of_the_conversation(permuted):
    assert sum(first in names and second in names for names, first, second, _ in permuted) >= 20


def test_few_shot_answers_follow_the_pictures(permuted):
    assert sum(first != second for _, first, second, _ in permuted) > len(permuted) / 2
    assert sum(second == right for *_, second, right in permuted) > len(permuted) / 2


def test_answers_in_a_batch_equal_single_ones(model, processor):
    trials = ("naming", "compare", "tiles_on", "direction", "receipt_steps", "fewshot_2", "text")
    episodes = [episode for trial in trials for episode in episodes_of(trial, 2)]
    together = answer(model, processor, episodes, 96)
    assert together == [answer(model, processor, [episode], 96)[0] for episode in episodes]


def test_a_hundred_answers_are_as_good_as_the_measured_scores(model, processor):
    """Questions that were not measured; of every kind equally many."""
    trials = [trial for trial in SCORES if "shuffled" not in trial and trial not in ("tiles_off", "fewshot_0")]
    right = total = expected = 0
    while total < 100:
        for trial in trials:
            found = score(model, processor, trial, 1, seed=100 + total)
            right, total, expected = right + found.right, total + 1, expected + SCORES[trial]["accuracy"]
    low, high = judge.wilson(right, total)
    assert low <= expected / total <= high


def test_in_int4_it_still_sees(processor, tmp_path):
    """Searched by the command, loaded in a process that knows this folder alone, and judged by its answers."""
    target = tmp_path / "vila-nano-awq"
    command = [sys.executable, "-m", "vila.quantize", str(FOLDER), str(target)]
    subprocess.run([*command, "--samples", "16", "--max-tokens", "256"], check=True)
    weights = target / "model.safetensors"
    assert weights.stat().st_size < 0.6 * (FOLDER / weights.name).stat().st_size
    code = WITHOUT_PACKAGE + (
        "sys.modules['gptqmodel'] = sys.modules['awq'] = None\n"
        "import json\n"
        "from answering import score\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype='bfloat16').eval()\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "rows = [score(model, processor, trial, 25, seed=7) for trial in sys.argv[2:]]\n"
        "print(json.dumps({row.trial: row.right for row in rows}))\n"
    )
    trials = ["naming", "count", "order", "fewshot_4"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(NANO)}
    command = [sys.executable, "-c", code, str(target), *trials]
    answer = subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True, text=True)
    right = json.loads(answer.stdout.splitlines()[-1])
    for trial in trials:
        low, high = judge.wilson(right[trial], 25)
        assert low <= SCORES[trial]["accuracy"] <= high, (trial, right[trial])


# --------------------------------------------------------------------------------------- demo, notebook, fine-tuning


def test_the_demo_shows_and_judges(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "DRAWINGS", tmp_path / "drawings")
    monkeypatch.setattr(demo, "REPOSITORY", tmp_path)
    demo.main([])
    shown = capsys.readouterr().out
    drawn = {path.suffix for path in (tmp_path / "drawings").iterdir()}
    assert drawn == {".png", ".gif"} and shown.count("(right)") + shown.count("(wrong") == len(demo.TASKS)
    assert shown.count("(right)") >= len(demo.TASKS) - 2
    with Image.open(tmp_path / "drawings" / "direction.gif") as clip:
        assert clip.n_frames > 2


def test_the_demo_describes_a_picture_that_is_given(capsys, tmp_path):
    judge.episode_of("naming", "test", 0, 0).media[0][0]["image"].save(tmp_path / "picture.png")
    demo.main([str(tmp_path / "picture.png")])
    assert capsys.readouterr().out.strip()


def test_a_terminal_shows_pictures_of_any_size(capsys):
    demo.show([image_block(Image.new("RGB", (300, 200), "red"))])
    assert "255;0;0" in capsys.readouterr().out


def test_the_notebook_runs():
    """With a real kernel; what it shows is what is committed."""
    path = REPOSITORY / "examples" / "quickstart.ipynb"
    committed = nbformat.read(path, as_version=4)
    notebook = nbformat.from_dict(committed)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
    assert all(cell.outputs for cell in committed.cells if "print(" in cell.source)


@pytest.mark.slow
def test_lora_teaches_a_new_task(tmp_path, capsys):
    """As the command does it, in its own number of steps."""
    import finetune_lora

    finetune_lora.main(["--output", str(tmp_path)])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["last_loss"] < report["first_loss"] / 4
    assert report["before"] < 0.3 and report["after"] > 0.7
    merged = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    rng = random.Random("another test")
    rows = [finetune_lora.draw_row(rng) for _ in range(64)]
    assert finetune_lora.accuracy(merged, processor, rows) > 0.7
    assert not any("lora" in name for name, _ in merged.named_parameters())
