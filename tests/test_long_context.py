"""The long-context recipe and the needle grid, as commands."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import needle
import pytest
from conftest import REPOSITORY
from safetensors.torch import load_file

EXAMPLES = REPOSITORY / "examples"
NANO = REPOSITORY / "checkpoints" / "vila-nano"


@pytest.fixture(scope="module")
def recipe():
    """`examples/long_context.py` as a module; its neighbours are found beside it, as when it runs as a command."""
    before, others = list(sys.path), {name: sys.modules.pop(name, None) for name in ("train", "haystack")}
    sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "nano")]
    spec = importlib.util.spec_from_file_location("long_context", EXAMPLES / "long_context.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["long_context"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    for name, other in others.items():
        sys.modules.pop(name, None)
        if other is not None:
            sys.modules[name] = other


def run(script, *arguments, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), EXAMPLES / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def steps_of(text):
    return [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", text)]


def test_presets_are_those_of_the_release(recipe):
    stages = recipe.STAGES
    extensions = {name[16:]: stage for name, stage in stages.items() if name.startswith("longvila/extend-")}
    assert {n: (s.max_length, s.rope_theta, s.steps) for n, s in extensions.items()} == {
        "64k": (131072, 15_300_000, 40),
        "256k": (262144, 207_112_184, 80),
        "512k": (524288, 1_062_356_830, 80),
        "1m": (1048576, 3_580_165_449, 50),
    }
    assert all(s.adapters and s.learning_rate == 2e-5 and "constant" in s.schedule for s in extensions.values())
    videos = {stage.num_frames: stage for name, stage in stages.items() if name.startswith("longvila/sft-")}
    assert {n: (s.max_length, s.learning_rate, s.sequence_parallel, s.fps) for n, s in videos.items()} == {
        256: (131072, 2e-5, 14, 2.0),
        512: (262144, 5e-5, 14, 2.0),
        1024: (262144, 5e-5, 28, 2.0),
        2048: (524288, 5e-5, 28, 2.0),
    }
    assert not any(stage.adapters for stage in videos.values())


def config(context, base):
    text = SimpleNamespace(
        max_position_embeddings=context, rope_parameters={"rope_theta": base, "rope_type": "default"}
    )
    return SimpleNamespace(text_config=text)


def test_extension_sets_context_and_base(recipe):
    extended = config(8192, 500_000.0)
    recipe.set_context(extended, recipe.STAGES["longvila/extend-64k"])
    assert extended.text_config.max_position_embeddings == 131072
    assert extended.text_config.rope_parameters == {"rope_theta": 15_300_000.0, "rope_type": "default"}
    recipe.set_context(extended, recipe.STAGES["longvila/sft-256"])
    assert extended.text_config.rope_parameters["rope_theta"] == 15_300_000.0


@pytest.mark.parametrize(
    ("context", "base", "stage", "message"),
    [
        (524288, 1e9, "longvila/extend-256k", "262144, the model one of 524288"),
        (8192, 1e9, "longvila/extend-256k", "rope base of 2.07112e\\+08, the model one of 1e\\+09"),
        (8192, 5e5, "longvila/sft-512", "extend it first .*longvila/extend-256k"),
    ],
)
def test_stage_that_contradicts_the_model_is_refused(recipe, context, base, stage, message):
    with pytest.raises(ValueError, match=message):
        recipe.set_context(config(context, base), recipe.STAGES[stage])


@pytest.mark.parametrize(
    ("context", "reached", "stage", "message"),
    [
        (131072, 131072, "longvila/extend-256k", "rope_parameters stretch by 'yarn' already"),
        (131072, 262144, "longvila/extend-256k", "rope_parameters stretch by 'yarn' already"),
        (262144, 131072, "longvila/sft-512", "262144 is more than the 131072 tokens that rope_parameters reach"),
    ],
)
def test_stage_that_contradicts_a_stretched_rope_is_refused(recipe, context, reached, stage, message):
    stretched = config(context, 1e6)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": reached // 4}
    stretched.text_config.rope_parameters |= yarn
    with pytest.raises(ValueError, match=message):
        recipe.set_context(stretched, recipe.STAGES[stage])


def test_long_videos_are_trained_with_a_stretched_rope_that_reaches_them(recipe):
    stretched = config(262144, 1e6)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 65536}
    stretched.text_config.rope_parameters |= yarn
    recipe.set_context(stretched, recipe.STAGES["longvila/sft-512"])
    assert stretched.text_config.rope_parameters["rope_type"] == "yarn"


@pytest.mark.parametrize(
    ("stage", "option", "message"),
    [
        ("nano/long", ["--rows", 0], "--rows 0: at least 1"),
        ("nano/long", ["--num_frames", 0], "--num_frames 0: at least 1"),
        ("nano/long", ["--sequence_parallel", 0], "--sequence_parallel 0: at least 1"),
        ("nano/long", ["--rows", 3, "--data", "rows.jsonl"], "--data gives them"),
        ("nano/extend", ["--num_frames", 64], "nano/extend has no videos"),
        ("nano/short", ["--num_frames", 8], "at least 16 frames, not 8"),
    ],
)
def test_option_without_effect_is_refused(recipe, tmp_path, stage, option, message):
    with pytest.raises(ValueError, match=message):
        recipe.main([str(o) for o in ("--preset", stage, "--model", NANO, "--output", tmp_path, *option)])


@pytest.mark.parametrize(("depth", "first"), [(0, 0), (0.5, 16), (1, 30)])
def test_needle_appears_at_its_depth(recipe, depth, first):
    haystack = sys.modules["haystack"]
    messages, answer = haystack.needle("seed", 32, depth)
    video, question = messages[0]["content"]
    frames = [frame.tobytes() for frame in video["video"]]
    # an empty frame comes again after sixteen others
    shown = {i for i, frame in enumerate(frames) if frames.count(frame) == 1 and frames[(i + 16) % 32] != frame}
    assert len(frames) == 32 and {first, first + 1} <= shown
    assert answer in haystack.COLOURS and any(shape in question["text"] for shape in haystack.SHAPES)
    with pytest.raises(ValueError, match="16 frames"):
        haystack.needle("seed", 8, depth)


def test_training_rows_ask_for_everything_that_appears(recipe):
    rows = sys.modules["haystack"].Needles(rows=5, max_frames=64)
    assert len(rows) == 5
    for number in range(5):
        messages = rows[number]["messages"]
        assert 16 <= len(messages[0]["content"][0]["video"]) <= 64
        answers = [message["content"][0]["text"] for message in messages if message["role"] == "assistant"]
        assert len(set(answers)) == 4
        assert [m["content"][-1] for m in rows[number]["messages"]] == [m["content"][-1] for m in messages]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """vila-nano after one step of the first stage, stopped and continued to a second."""
    folder = tmp_path_factory.mktemp("recipe") / "extended"
    options = ["--preset", "nano/extend", "--model", NANO, "--output", folder]
    options += ["--gradient_accumulation_steps", 1, "--save_steps", 1, "--data", folder.parent / "rows.jsonl"]
    row = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]}
    (folder.parent / "rows.jsonl").write_text((json.dumps(row) + "\n") * 2)
    done = [run("long_context.py", *options, "--max_steps", steps) for steps in (1, 2)]
    return folder / "final", done


def test_extension_goes_on_where_it_was_stopped_and_saves_a_whole_model(extended):
    folder, (first, second) = extended
    assert first.returncode == 0 == second.returncode, first.stderr[-2000:] + second.stderr[-2000:]
    assert len(steps_of(first.stdout)) == 1 == len(steps_of(second.stdout))
    text = json.loads((folder / "config.json").read_text())["text_config"]
    assert text["max_position_embeddings"] == 12288 and text["rope_parameters"]["rope_theta"] == 250_000
    assert not list(folder.glob("adapter*")) and (folder / "modeling_vila.py").is_file()


@pytest.mark.slow
def test_short_videos_are_trained_within_the_model_s_own_context(tmp_path):
    options = ["--preset", "nano/short", "--model", NANO, "--output", tmp_path, "--rows", 4, "--num_frames", 16]
    options += ["--gradient_accumulation_steps", 2, "--save_steps", 1]
    stopped, done = (run("long_context.py", *options, "--max_steps", steps) for steps in (1, 2))
    assert stopped.returncode == 0 == done.returncode, stopped.stderr[-2000:] + done.stderr[-2000:]
    assert len(steps_of(stopped.stdout)) == 1 == len(steps_of(done.stdout))
    text, before = (
        json.loads((folder / "config.json").read_text())["text_config"] for folder in (NANO, tmp_path / "final")
    )
    assert text["max_position_embeddings"] == before["max_position_embeddings"] == 2048
    weights = [load_file(folder / "model.safetensors") for folder in (NANO, tmp_path / "final")]
    changed = {name.split(".")[0] for name, weight in weights[1].items() if not weight.equal(weights[0][name].float())}
    assert changed == {"llm", "mm_projector"}, "the tower is left as it was"


@pytest.mark.slow
def test_two_processes_share_long_videos_and_find_needles(extended, tmp_path):
    options = ["--preset", "nano/long", "--model", extended[0], "--output", tmp_path / "long", "--rows", 2]
    options += ["--num_frames", 16, "--gradient_accumulation_steps", 1, "--max_steps", 2, "--sequence_parallel", 2]
    done = run("long_context.py", *options, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(steps_of(done.stdout)) == 2
    processor = json.loads((tmp_path / "long" / "final" / "processor_config.json").read_text())
    assert processor["num_video_frames"] == 16

    grid = ["--model", tmp_path / "long" / "final", "--frames", 16, "--depths", 2, "--trials", 1, "--output"]
    assert run("needle.py", *grid, tmp_path / "two", processes=2).returncode == 0
    assert run("needle.py", *grid, tmp_path / "one").returncode == 0
    answers = [(tmp_path / name / "needle.jsonl").read_text() for name in ("one", "two")]
    assert answers[0] == answers[1] and len(answers[0].splitlines()) == 2
    # what was asked is not asked again, and a line that was cut off is
    (tmp_path / "one" / "needle.jsonl").write_text(answers[0][:-40])
    again = run("needle.py", *grid, tmp_path / "one")
    assert again.returncode == 0 and "/1 " in again.stderr
    both = run("needle.py", "--draw", tmp_path / "one", tmp_path / "two", "--output", tmp_path / "both.png")
    assert both.returncode == 0 and (tmp_path / "both.png").stat().st_size > 5000


# ---- the grid


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """`asked(*options)`: how many questions the model is asked for a grid of one cell, `tmp_path / "grid"`."""
    questions, ask = [], needle.Asker.ask
    monkeypatch.setattr(needle.Asker, "ask", lambda self, *args: questions.append(args) or ask(self, *args))

    def run(*options, model=NANO):
        grid = ["--output", tmp_path / "grid", "--frames", 16, "--depths", 1, "--trials", 1]
        questions.clear()
        needle.main([str(option) for option in ("--model", model, *grid, *options)])
        return len(questions)

    return run


def test_grid_of_the_same_model_and_seed_goes_on(asked, tmp_path, capsys):
    assert asked() == 1 and asked() == 0 and asked("--frames", 16, 18) == 1
    answers = needle.read(tmp_path / "grid" / "needle.jsonl")
    assert [(answer["frames"], answer["depth"], answer["seed"]) for answer in answers] == [(16, 0.5, 0), (18, 0.5, 0)]
    assert "of 2 right" in capsys.readouterr().out


def test_every_process_takes_the_device_of_its_own(asked, monkeypatch):
    chosen, placed = [None], []
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.set_device_index", chosen.append)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: placed.append(chosen[-1]) or "cpu")
    assert asked() == 1
    monkeypatch.setenv("LOCAL_RANK", "3")
    asked()
    assert placed == [0, 3]


def test_answers_of_another_model_or_seed_are_not_taken_for_those_of_this_one(asked, tmp_path):
    model = shutil.copytree(NANO, tmp_path / "model")
    assert asked(model=model) == 1
    written = (tmp_path / "grid" / "needle.jsonl").read_text()
    for options, changed in ((["--seed", 1], "seed"), (["--dtype", "bfloat16"], "dtype")):
        with pytest.raises(ValueError, match=f"answers of {model} with other {changed} .* another --output"):
            asked(*options, model=model)
    assert asked() == 0, "the model is another copy of the same files"
    # trained on in the same folder
    os.utime(model / "model.safetensors", (1, 1))
    with pytest.raises(ValueError, match="other weights than asked"):
        asked(model=model)
    assert (tmp_path / "grid" / "needle.jsonl").read_text() == written


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("long_context.py", ["--preset", "nano/long"], "extend it first"),
        ("long_context.py", ["--preset", "nano/short", "--sequence_parallel", 2], "torchrun"),
        ("needle.py", ["--frames", 8], "16 frames"),
    ],
)
def test_what_cannot_work_is_one_line(script, arguments, message, tmp_path):
    done = run(script, "--model", NANO, "--output", tmp_path, *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]
