"""A converted, fine-tuned or quantised folder -> a repository on the Hub that works for a stranger. `vila-upload`.

- The repository holds what loading and serving need and nothing else; `--dry-run` lists it, with reasons.
- Before anything is sent, a fresh process without this package loads what would be sent, and answers.
- Everything arrives in one commit, so that code and weights of two versions never meet. A run that was stopped goes
  on: weights that the Hub has already are not sent again.
"""

import argparse
import hashlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from .commands_vila import INTERRUPTED, one_line
from .loading_vila import check_device
from .model_card_vila import CardOptions, is_llama3_card, model_card
from .staging_vila import CARD, Staged, StagedFile, check_loads, inside, stage

CONFLICTS, FORBIDDEN = (409, 412), (401, 403)
# what an older upload may have left, and engines would still read: they take every weight file at the root
STALE = ("*.safetensors", "*.safetensors.index.json")


def prepare(source: str | Path, repo: str, staging: Path, options: CardOptions, previous: str | None = None) -> Staged:
    """Stages a folder with its model card.

    Args:
        repo: Hub id, `owner/name`.
        staging: an empty folder.
        previous: the card of the repository; a card in the folder goes before it.

    Raises:
        ValueError, FileNotFoundError: see `stage` and `model_card`; nothing can be uploaded then.
    """
    staged = stage(source, staging)
    own = Path(source) / CARD
    if own.is_file() or own.is_symlink():
        previous = inside(Path(source), own).read_text(encoding="utf-8")
    card = staging / CARD
    card.write_text(str(model_card(staged, repo, options, previous)), encoding="utf-8")
    reason = "model card" + (", completed" if previous is not None and not options.new_card else "")
    return staged._replace(files=sorted([*staged.files, StagedFile(CARD, card, reason)]))


def upload(
    staged: Staged,
    repo: str,
    api: HfApi,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Upload a VILA",
) -> str:
    """Sends a prepared folder as one commit, and deletes older weight files that it does not hold.

    Args:
        repo: Hub id, `owner/name`; a repository that does not exist is made.
        private: whether a new one is private.
        revision: branch, made if it does not exist, or `refs/pr/N`.
        create_pr: open a pull request instead of a commit to the branch.

    Returns:
        The address of the commit or pull request.

    Raises:
        HfHubHTTPError: from the Hub: without permission, or where the branch has got another commit meanwhile.
        ValueError: if the repository is public and `private` is asked for, or its `.gitignore` left files out.
    """
    repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo, branch=revision, exist_ok=True)
    info = api.model_info(repo, revision=revision)
    if private and not info.private:
        raise ValueError(f"{repo} exists and is public: --private holds for a new repository")
    names = {file.name for file in staged.files}
    stale = [sibling.rfilename for sibling in info.siblings or [] if is_stale(sibling.rfilename, names)]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(file.name, str(file.path)) for file in staged.files),
        *(CommitOperationDelete(name) for name in stale),
    ]
    commit = api.create_commit(
        repo,
        operations,
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
        parent_commit=info.sha,
    )
    if ignored := names.difference(api.list_repo_files(repo, revision=commit.oid)):
        raise ValueError(f"the repository's .gitignore kept out {', '.join(sorted(ignored))}: remove the rule")
    return commit.pr_url or str(commit.commit_url)


def is_stale(name: str, staged: set[str]) -> bool:
    """Whether a file of the repository belongs to an older upload; only files at the root are ours."""
    return "/" not in name and name not in staged and any(Path(name).match(pattern) for pattern in STALE)


def remote_card(repo: str, revision: str | None, api: HfApi) -> str | None:
    """The text of the repository's card, None where there is none."""
    try:
        return Path(api.hf_hub_download(repo, CARD, revision=revision)).read_text(encoding="utf-8")
    except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None


def listing(staged: Staged) -> str:
    """Every file with size and reason, and what is left out."""
    width = max(len(file.name) for file in staged.files)
    lines = [f"{file.name:<{width}}  {file.size:>14,}  {file.reason}" for file in staged.files]
    lines.append(f"{len(staged.files)} files, {sum(file.size for file in staged.files):,} bytes")
    lines += [f"left out: {name}: {reason}" for name, reason in staged.left_out.items()]
    return "\n".join(lines) + "\n"


def explain(error: BaseException, repo: str) -> str:
    """An error of the Hub or of this package as one line."""
    cause = error.__cause__ if isinstance(error, RuntimeError) else None  # of a weight file that was being sent
    status = getattr(getattr(cause or error, "response", None), "status_code", None)
    if status in CONFLICTS:
        return f"{repo} has got another commit meanwhile; nothing of this one is in it: run the command again"
    if status in FORBIDDEN:
        return f"the token may not write to {repo} ({status}): `hf auth login` with a token of the role write"
    return one_line(f"{error} {cause or ''}")


def run(options: argparse.Namespace) -> str:
    """What the command does: the text that it writes."""
    validate_repo_id(options.repo)
    if options.repo.count("/") != 1:
        raise ValueError(f"{options.repo!r} is no Hub id: give owner/name")
    api = HfApi(library_name="vila-hf")
    if not options.dry_run and get_token() is None:
        raise ValueError("no token: run `hf auth login`, or set HF_TOKEN")
    check_device(options.device)
    card = CardOptions(
        base_model=tuple(options.base_model),
        license=options.license,
        license_name=options.license_name,
        license_link=options.license_link,
        datasets=tuple(options.dataset),
        language=tuple(options.language),
        date=options.date,
        space=options.space,
        new_card=options.new_card,
    )
    previous = None if options.dry_run else remote_card(options.repo, options.revision, api)
    with staging_folder(options.folder, options.repo) as staging:
        staged = prepare(options.folder, options.repo, staging, card, previous)
        for note in notes(staged, options.repo):
            sys.stderr.write(f"vila-upload: {note}\n")
        sys.stderr.write("vila-upload: loading it in a fresh process\n")
        answer = check_loads(staged.folder, options.device)
        if options.dry_run:
            return f"{listing(staged)}loads, and answers about a drawn picture: {answer!r}\nnothing was sent\n"
        address = upload(
            staged,
            options.repo,
            api,
            private=options.private,
            revision=options.revision,
            create_pr=options.create_pr,
            message=options.message,
        )
    return f"{address}\n"


@contextmanager
def staging_folder(source: Path, repo: str) -> Iterator[Path]:
    """An empty folder for one upload, gone afterwards; what a run that was killed left of it is removed first."""
    key = hashlib.sha256(f"{source.resolve()} {repo}".encode()).hexdigest()[:12]
    folder = Path(HF_HOME) / "vila" / f".upload-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder)
    except Timeout as error:
        raise ValueError(f"another process is uploading {source} to {repo}") from error


def notes(staged: Staged, repo: str) -> list[str]:
    """What the user should know and nothing refuses."""
    text = (staged.folder / CARD).read_text(encoding="utf-8")
    found = []
    if "trust_remote_code" not in text:
        found.append("README.md does not say how to load it with trust_remote_code; --new-card writes one that does")
    if is_llama3_card(text) and not repo.rsplit("/", 1)[-1].lower().startswith("llama-3"):
        found.append('the licence of Llama 3 wants names that begin with "Llama-3"')
    return found


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vila-upload", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="converted, fine-tuned or quantised folder, or an original one")
    add("repo", metavar="REPO", help="Hub id, owner/name")
    add("--dry-run", action="store_true", help="do everything but send: list every file with size and reason")
    add("--private", action="store_true", help="make a new repository private")
    add("--revision", metavar="BRANCH", help="branch, made if missing, or refs/pr/N (default: main)")
    add("--create-pr", action="store_true", help="open a pull request")
    add("--message", default="Upload a VILA", help="of the commit (default: %(default)s)")
    add("--license", metavar="ID", help="of the weights, such as cc-by-nc-4.0")
    add("--license-name", metavar="NAME", help="of a licence that the Hub does not list (--license other)")
    add("--license-link", metavar="LINK", help="its address, or LICENSE")
    add("--base-model", action="append", default=[], metavar="ID", help="Hub id of what it was made from; repeatable")
    add("--dataset", action="append", default=[], metavar="ID", help="Hub id of what it was trained on; repeatable")
    add("--language", action="append", default=[], metavar="CODE", help="of text, such as en; repeatable")
    add("--date", help="when it was trained")
    add("--space", metavar="ID", help="Hub id of a demo")
    add("--new-card", action="store_true", help="write the model card anew where there is one")
    add("--device", default="cpu", help="that the check runs on (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    try:
        sys.stdout.write(run(options))
    except KeyboardInterrupt:
        sys.stderr.write("vila-upload: stopped; the same command goes on where it was\n")
        sys.exit(INTERRUPTED)
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        sys.exit(f"vila-upload: {explain(error, options.repo)}")


if __name__ == "__main__":
    main()
