"""`vila-upload`: what belongs into a repository, the proof that it loads, and the Hub's side of it over loopback.

The client is the real `huggingface_hub`. Xet, its newer transport, needs a storage server with a protocol of its own
and is off here: weights go through the large-file protocol, which the same calls use where Xet is missing.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import COMMITTED_GOLDENS, REPOSITORY, serving
from hub_server import OWNER, TOKEN, HubServer
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor
from vila import hub_upload, staging_vila
from vila.commands_vila import INTERRUPTED
from vila.conversion_vila import convert
from vila.hub_upload import explain, main, prepare, upload
from vila.model_card_vila import CardOptions
from vila.staging_vila import check_loads, stage
from vila.weight_files_vila import INDEX

NANO = REPOSITORY / "checkpoints" / "vila-nano"
GOLDEN = COMMITTED_GOLDENS / "vila" / "nvila_lite_image" / "checkpoint"
REPO = f"{OWNER}/tiny"
CARD = CardOptions(license="cc-by-nc-4.0")
MODULES = {path.name for path in NANO.glob("*.py")}


@pytest.fixture
def hub():
    with serving(HubServer()) as server:
        yield server


@pytest.fixture
def api(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return HfApi(endpoint=hub.url, token=TOKEN)


def in_three_files(target: Path) -> Path:
    """vila-nano with its weights in three files, among what must not be uploaded."""
    target.mkdir()
    for file in NANO.iterdir():
        if file.suffix not in (".safetensors", ".md"):
            shutil.copy(file, target)
    tensors = sorted(load_file(NANO / "model.safetensors").items())
    weight_map = {}
    for number in range(3):
        name = f"model-{number + 1:05d}-of-00003.safetensors"
        part = dict(tensors[number::3])
        save_file(part, target / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return in_three_files(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def staged(sharded, tmp_path_factory):
    return prepare(sharded, REPO, tmp_path_factory.mktemp("staging"), CARD)


def names(staged):
    return {file.name for file in staged.files}


def run_command(hub, home, *arguments, **environment):
    """`python -m vila.hub_upload` in a process of its own that knows the loopback Hub alone."""
    variables = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    variables |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    return subprocess.Popen(
        [sys.executable, "-m", "vila.hub_upload", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**variables, "NO_PROXY": "127.0.0.1", **environment},
    )


# ------------------------------------------------------------------------------------------------- what is uploaded


def test_a_folder_is_staged_with_exactly_what_it_needs(staged):
    assert {name for name in names(staged) if name.endswith(".py")} == MODULES | {"handler.py"}
    assert names(staged) - MODULES == {
        "LICENSE-CODE", "README.md", "chat_template.jinja", "config.json", "generation_config.json", "handler.py",
        "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
        "model.safetensors.index.json", "processor_config.json", "requirements.txt", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert all(file.reason and file.size for file in staged.files)
    assert {path.name for path in staged.folder.iterdir()} == names(staged)


def test_modules_are_the_packages_own_whatever_lies_in_the_folder(tmp_path):
    source = in_three_files(tmp_path / "tiny")
    (source / "modeling_vila.py").write_text("raise SystemExit('not this one')")
    (source / "extra.py").write_text("")
    (tmp_path / "staging").mkdir()
    staged = stage(source, tmp_path / "staging")
    for name in MODULES:
        assert (staged.folder / name).read_bytes() == (REPOSITORY / name).read_bytes()
        assert not (staged.folder / name).is_symlink()
    assert "extra.py" in staged.left_out


def test_pickles_caches_and_unlisted_files_stay_at_home(tmp_path):
    source = in_three_files(tmp_path / "tiny")
    unwanted = [
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pth",
        "rng.pkl",
        "notes.txt",
        ".env",
        "trainer_state.json",
    ]
    for name in [*unwanted, "unindexed.safetensors"]:
        (source / name).write_bytes(b"x")
    for folder in ("checkpoint-500", "original_files", "__pycache__", ".cache"):
        (source / folder).mkdir()
        (source / folder / "config.json").write_text("{}")
    (tmp_path / "staging").mkdir()
    staged = stage(source, tmp_path / "staging")
    assert not names(staged) & {*unwanted, "unindexed.safetensors"}
    assert {path.name for path in staged.folder.iterdir()} == names(staged)
    left_out = {*unwanted, "unindexed.safetensors", "checkpoint-500/", "original_files/", "__pycache__/", ".cache/"}
    assert staged.left_out.keys() == left_out | {"scores.json"}
    assert "pickle" in staged.left_out["optimizer.pt"]


@pytest.mark.parametrize("layout", ["linked", "in place", "original"])
def test_weights_in_other_layouts_become_root_shards(layout, tmp_path):
    source = shutil.copytree(GOLDEN, tmp_path / "source")
    if layout == "linked":
        source = convert(source, tmp_path / "converted")
    elif layout == "in place":
        source = convert(source, in_place=True)
    (tmp_path / "staging").mkdir()
    staged = stage(source, tmp_path / "staging")
    shards = [shard.path.name for shard in staged.shards]
    assert shards and all(name.startswith("model-0") for name in shards)
    assert all(not (staged.folder / name).is_symlink() for name in shards)
    whole = {name: tensor for shard in staged.shards for name, tensor in load_file(shard.path).items()}
    assert all(name.startswith(("llm.", "vision_tower.", "mm_projector.")) for name in whole)
    direct = convert(GOLDEN, tmp_path / "direct", copy=True)
    expected = {name: tensor for path in direct.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert whole.keys() == expected.keys()
    assert ("llm/" in staged.left_out) is (layout != "linked")
    assert all("rewritten" in staged.left_out.get(f"{part}/", "rewritten") for part in staging_vila.PART_PREFIXES)
    assert all(torch.equal(whole[name], expected[name]) for name in whole)
    assert {path.name for path in staged.folder.iterdir()} == names(staged)


@pytest.mark.parametrize("original_names", [True, False])
def test_a_saved_model_is_staged_as_it_was_saved(original_names, tmp_path):
    model, processor = AutoModel.from_pretrained(NANO), AutoProcessor.from_pretrained(NANO)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    saved = tmp_path / "tuned"
    model.save_pretrained(saved, save_original_format=original_names, max_shard_size="4MB")
    processor.save_pretrained(saved)
    (saved / "training_args.bin").write_bytes(b"x")
    (tmp_path / "staging").mkdir()
    staged = stage(saved, tmp_path / "staging")
    assert len(staged.shards) > 1 and "training_args.bin" in staged.left_out
    again = AutoModel.from_pretrained(staged.folder).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_root_shards_are_sent_from_where_they_lie(staged, sharded):
    weights = [file for file in staged.files if file.reason == "weights"]
    assert [file.path for file in weights] == sorted(sharded.glob("*.safetensors"))


def test_code_of_another_repository_is_no_longer_named(tmp_path):
    source = in_three_files(tmp_path / "tiny")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "other/repo--configuration_vila.VilaConfig"}
    config["_name_or_path"] = "/home/somebody/run"
    (source / "config.json").write_text(json.dumps(config))
    processor = json.loads((source / "processor_config.json").read_text())
    processor["image_processor"]["auto_map"] = {
        "AutoImageProcessor": "other/repo--image_processing_vila.VilaImageProcessor"
    }
    (source / "processor_config.json").write_text(json.dumps(processor))
    (tmp_path / "staging").mkdir()
    staged = stage(source, tmp_path / "staging")
    written = (staged.folder / "config.json").read_text() + (staged.folder / "processor_config.json").read_text()
    assert "other/repo" not in written and "/home/somebody" not in written
    assert json.loads((staged.folder / "config.json").read_text())["auto_map"] == staged.family.auto_map
    assert '"image_processing_vila.VilaImageProcessor"' in written


# --------------------------------------------------------------------------------------------------- what is refused


def broken(tmp_path, change):
    source = in_three_files(tmp_path / "tiny")
    change(source)
    (tmp_path / "staging").mkdir()
    return source, tmp_path / "staging"


def only_pickles(source):
    for file in source.glob("*.safetensors*"):
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(b"x")


def replace_by_link(source, name, target):
    (source / name).unlink()
    (source / name).symlink_to(target)


def edit_config(source, **changes):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))


REFUSED = {
    "a missing folder": (lambda source: shutil.rmtree(source), "is no folder"),
    "no config": (lambda source: (source / "config.json").unlink(), "has no config.json"),
    "no tokenizer": (lambda source: (source / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "another model": (lambda source: edit_config(source, model_type="llava"), "'llava', no VILA checkpoint"),
    "an encoder": (lambda source: edit_config(source, model_type="ps3"), "encoder without a language model"),
    "an adapter": (lambda source: (source / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "pickles only": (only_pickles, "pickle files only"),
    "a missing shard": (lambda source: (source / "model-00002-of-00003.safetensors").unlink(), "00002-of-00003"),
    "a damaged shard": (
        lambda source: (source / "model-00002-of-00003.safetensors").write_bytes(b"\0" * 99),
        "no readable safetensors",
    ),
    "broken JSON": (lambda source: (source / "processor_config.json").write_text("{"), "processor_config.json"),
    "a broken index": (lambda source: (source / INDEX).write_text('{"weight_map": 3}'), "does not say which weight"),
    "an index that leads out": (
        lambda source: (source / INDEX).write_text(
            '{"weight_map": {"a": "../tiny/model-00001-of-00003.safetensors"}}'
        ),
        "in a folder that is no part of a VILA",
    ),
    "a link to a secret": (lambda source: replace_by_link(source, "config.json", "/etc/passwd"), "config.json"),
    "a linked licence": (lambda source: (source / "LICENSE").symlink_to("/etc/passwd"), "LICENSE is a link out of"),
    "a link to nowhere": (
        lambda source: (source / "LICENSE").symlink_to("gone"),
        "LICENSE is a link that leads nowhere",
    ),
    "weights elsewhere": (
        lambda source: replace_by_link(source, "model-00003-of-00003.safetensors", NANO / "model.safetensors"),
        "model-00003-of-00003.safetensors is a link out of",
    ),
    "foreign code": (
        lambda source: (source / "tokenizer_config.json").write_text(
            '{"auto_map": {"AutoTokenizer": ["evil.Tok", null]}}'
        ),
        "'evil.Tok', which is no class of this package",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_load_or_does_not_belong_there_is_refused(case, tmp_path):
    change, message = REFUSED[case]
    source, staging = broken(tmp_path, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        stage(source, staging)


def test_an_original_does_not_take_a_secret_along(tmp_path):
    source = shutil.copytree(GOLDEN, tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / "llm" / "tokenizer.model").symlink_to(tmp_path / "secret")
    (tmp_path / "staging").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer\.model is a link out of"):
        stage(source, tmp_path / "staging")
    (source / "llm" / "tokenizer.model").unlink()
    (source / "llm").rename(tmp_path / "elsewhere")
    (source / "llm").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="llm is a link out of"):
        stage(source, tmp_path / "staging")


def test_a_damaged_tokenizer_is_refused_with_one_line(tmp_path, command, capsys):
    source = in_three_files(tmp_path / "tiny")
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(SystemExit, match="config or processor do not load") as ended:
        command(source, REPO, "--dry-run", "--license", "mit")
    assert "\n" not in ended.value.code


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs(tmp_path):
    repository = tmp_path / "models--org--tiny"
    source = in_three_files(tmp_path / "tiny")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    source.rename(repository / "blobs")
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    (tmp_path / "staging").mkdir()
    staged = stage(snapshot, tmp_path / "staging")
    assert "config.json" in names(staged)
    assert not (staged.folder / "config.json").is_symlink()


def test_weights_that_lack_a_tensor_are_refused_by_loading_them(tmp_path):
    source = in_three_files(tmp_path / "tiny")
    index = source / "model.safetensors.index.json"
    tensors = load_file(source / "model-00001-of-00003.safetensors")
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, source / "model-00001-of-00003.safetensors", metadata={"format": "pt"})
    content = json.loads(index.read_text())
    del content["weight_map"][lost]
    index.write_text(json.dumps(content))
    (tmp_path / "staging").mkdir()
    with pytest.raises(ValueError, match=r"does not load: .*lacks 1 weight"):
        check_loads(stage(source, tmp_path / "staging").folder)


@pytest.mark.parametrize("converted", [True, False])
def test_no_room_for_rewritten_weights_is_told_before_they_are_written(converted, tmp_path, monkeypatch):
    source = convert(GOLDEN, tmp_path / "converted") if converted else GOLDEN
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(staging_vila.shutil, "disk_usage", lambda path: usage)
    (tmp_path / "staging").mkdir()
    with pytest.raises(OSError, match="rewritten as root shards"):
        stage(source, tmp_path / "staging")
    assert not list((tmp_path / "staging").rglob("*.safetensors"))


# -------------------------------------------------------------------------------------------------------- the Hub


def test_a_new_repository_gets_every_file_in_one_commit(hub, api, staged):
    address = upload(staged, REPO, api, private=True, message="First")
    repository = hub.repositories[REPO]
    assert repository.private and len(repository.branches["main"]) == 2
    oid, files = repository.branches["main"][-1]
    assert address == f"{hub.url}/{REPO}/commit/{oid}"
    assert files.keys() == names(staged) | {".gitattributes"}
    assert all(files[file.name] == file.path.read_bytes() for file in staged.files)
    assert len(hub.puts) == 3


def test_the_same_folder_again_changes_nothing(hub, api, staged):
    first = upload(staged, REPO, api)
    assert upload(staged, REPO, api) == first
    assert len(hub.repositories[REPO].branches["main"]) == 2
    assert len(hub.puts) == 3


def test_weights_of_an_older_upload_go_and_other_files_stay(hub, api, staged):
    api.create_repo(REPO)
    old = {"model.safetensors": b"old", "notes.md": b"mine", "own.py": b"mine", "sub/model.safetensors": b"mine"}
    hub.repositories[REPO].commit("main", old)
    upload(staged, REPO, api)
    assert hub.files(REPO).keys() - names(staged) == {".gitattributes", "notes.md", "own.py", "sub/model.safetensors"}


def test_a_branch_is_made_and_main_stays_as_it_was(hub, api, staged):
    upload(staged, REPO, api, revision="int4")
    assert hub.files(REPO, "int4").keys() >= names(staged)
    assert hub.files(REPO).keys() == {".gitattributes"}


def test_a_pull_request_is_opened_and_can_be_continued(hub, api, staged):
    address = upload(staged, REPO, api, create_pr=True)
    assert address == f"{hub.url}/{REPO}/discussions/1"
    assert hub.files(REPO).keys() == {".gitattributes"}
    assert hub.files(REPO, "refs/pr/1").keys() >= names(staged)
    upload(staged, REPO, api, revision="refs/pr/1")
    assert hub.repositories[REPO].pulls == 1


@pytest.mark.parametrize("status", [412, 409])
def test_a_commit_in_between_is_a_conflict_and_is_kept(hub, api, staged, status):
    api.create_repo(REPO)
    hub.conflict = status
    hub.before_commit = lambda repository: repository.commit("main", {"theirs.txt": b"theirs"})
    with pytest.raises(HfHubHTTPError) as raised:
        upload(staged, REPO, api)
    assert "has got another commit meanwhile" in explain(raised.value, REPO)
    assert hub.files(REPO).keys() == {".gitattributes", "theirs.txt"}
    hub.before_commit = None
    upload(staged, REPO, api)
    assert hub.files(REPO).keys() == names(staged) | {".gitattributes", "theirs.txt"}
    assert len(hub.puts) == 3  # the weights had arrived before


def test_files_that_a_gitignore_keeps_out_are_named(hub, api, staged):
    hub.ignored = ("modeling_vila.py",)
    with pytest.raises(ValueError, match=r"\.gitignore kept out modeling_vila\.py"):
        upload(staged, REPO, api)


def test_a_public_repository_is_not_taken_for_a_private_one(hub, api, staged):
    api.create_repo(REPO)
    with pytest.raises(ValueError, match="exists and is public"):
        upload(staged, REPO, api, private=True)
    assert not hub.puts


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(hub, api, monkeypatch, tmp_path, capsys):
    """The command in this process, without the check; returns what it writes to stdout, or how it ends."""
    monkeypatch.setattr(hub_upload, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub_upload, "HfApi", partial(HfApi, endpoint=hub.url))
    monkeypatch.setattr(hub_upload, "check_loads", lambda folder, device: "an answer")

    def run(*arguments):
        main([*map(str, arguments)])
        return capsys.readouterr().out

    yield run
    staging = tmp_path / "home" / "vila"
    assert not staging.is_dir() or all(path.suffix == ".lock" for path in staging.iterdir())


def test_a_dry_run_lists_every_file_with_size_and_reason_and_asks_nobody(hub, command, sharded, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    written = command(sharded, REPO, "--dry-run", "--license", "cc-by-nc-4.0")
    rows = {line.split()[0]: line.split()[1:] for line in written.splitlines()}
    size = (sharded / "model-00002-of-00003.safetensors").stat().st_size
    assert rows["model-00002-of-00003.safetensors"] == [f"{size:,}", "weights"]
    assert rows["modeling_vila.py"][1:] == ["module", "that", "auto_map", "reaches"]
    assert "left out: scores.json: not on the list" in written
    assert not hub.requests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["somebody/tiny", "--license", "mit"], r"the token may not write to somebody/tiny \(403\)"),
        (["tiny", "--license", "mit"], "is no Hub id: give owner/name"),
        (["org/ti ny", "--license", "mit"], "org/ti ny"),
        ([REPO], "licence of the weights is not known: name it with --license"),
        ([REPO, "--license", "other"], "--license other needs --license-name"),
        ([REPO, "--license", "mit", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_a_wrong_command_ends_with_one_line(command, sharded, arguments, message, capsys):
    with pytest.raises(SystemExit, match=message) as ended:
        command(sharded, *arguments)
    assert "\n" not in ended.value.code and ended.value.code.startswith("vila-upload: ")


def test_a_missing_token_is_told_before_anything_is_done(hub, command, sharded, monkeypatch):
    monkeypatch.setattr(hub_upload, "get_token", lambda: None)
    with pytest.raises(SystemExit, match="no token: run `hf auth login`"):
        command(sharded, REPO, "--license", "mit")
    assert not hub.requests


def test_a_wrong_token_ends_with_one_line(hub, command, sharded, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SystemExit, match=r"the token may not write to org/tiny \(401\)"):
        command(sharded, REPO, "--license", "mit")
    assert not hub.repositories


def test_what_a_killed_run_left_is_removed_and_a_second_run_at_once_is_refused(hub, command, sharded, monkeypatch):
    seen = []

    def prepare_and_look(source, repo, staging, *others):
        seen.append([path.name for path in staging.iterdir()])
        with pytest.raises(ValueError, match=r"another process is uploading .*tiny to org/tiny"):
            hub_upload.staging_folder(source, repo).__enter__()
        raise ValueError("stopped here")

    monkeypatch.setattr(hub_upload, "prepare", prepare_and_look)
    with hub_upload.staging_folder(sharded, REPO) as staging:
        pass
    staging.mkdir()
    (staging / "model.safetensors").write_bytes(b"half")
    with pytest.raises(SystemExit, match="stopped here"):
        command(sharded, REPO, "--dry-run", "--license", "mit")
    assert seen == [[]] and not staging.exists()


def test_an_interrupted_command_ends_quietly(command, sharded, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub_upload, "check_loads", interrupt)
    with pytest.raises(SystemExit) as ended:
        command(sharded, REPO, "--dry-run", "--license", "mit")
    assert ended.value.code == INTERRUPTED
    assert capsys.readouterr().err.endswith("stopped; the same command goes on where it was\n")


def test_a_card_that_was_edited_on_the_hub_stays(hub, command, sharded):
    command(sharded, REPO, "--license", "mit")
    edited = hub.files(REPO)["README.md"].replace(b"# tiny", b"# Better words")
    hub.repositories[REPO].commit("main", {"README.md": edited})
    command(sharded, REPO)
    assert hub.files(REPO)["README.md"] == edited
    command(sharded, REPO, "--new-card")
    assert b"Better words" not in hub.files(REPO)["README.md"] and b"license: mit" in hub.files(REPO)["README.md"]


def test_a_killed_upload_goes_on_and_a_stranger_can_use_the_repository(hub, sharded, tmp_path):
    hub.hold = 1
    arguments = (sharded, REPO, "--license", "cc-by-nc-4.0")
    process = run_command(hub, tmp_path / "home", *arguments)
    assert hub.held.wait(300), process.communicate(timeout=60)[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(hub.puts) == 1 and len(hub.repositories[REPO].branches["main"]) == 1
    hub.hold = None

    process = run_command(hub, tmp_path / "home", *arguments)
    written, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert len(hub.puts) == len(set(hub.puts)) == 3
    oid = hub.repositories[REPO].branches["main"][-1][0]
    assert len(hub.repositories[REPO].branches["main"]) == 2 and oid in written
    assert not list((tmp_path / "home" / "vila").glob(".upload-*[!k]"))

    script = staging_vila.CHECK.replace("sys.argv[1], sys.argv[2], int(sys.argv[3])", f"{REPO!r}, 'cpu', 8")
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    stranger = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "stranger"), "HF_HUB_DISABLE_XET": "1"},
    )
    assert stranger.returncode == 0, stranger.stderr
    assert json.loads(stranger.stdout.strip().splitlines()[-1])["model"] == "VilaForConditionalGeneration"
