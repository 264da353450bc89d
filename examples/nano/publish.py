"""Makes a finished run the embedded checkpoint: `python examples/nano/publish.py nano-run/final scores.json`.

`scores.json` is what `evaluate.py --json` wrote. The folder gets weights, configs, the scores, a model card with their
table, and links to the repository's modules in place of copies.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from evaluate import DEFAULT_MODEL, table_of
from transformers.dynamic_module_utils import get_relative_import_files
from vila import configuration_vila, modeling_vila, processing_vila

CARD = Path(__file__).with_name("model_card.md")
SCORES = "scores.json"


def link_modules(folder: Path) -> None:
    """Relative links to the modules that `auto_map` reaches, so that no second copy can age."""
    for module in (modeling_vila, processing_vila, configuration_vila):
        path = str(module.__file__)
        for file in map(Path, [path, *get_relative_import_files(path)]):
            link = folder / file.name
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..", "..", file.name))


def card(scores: list[dict]) -> str:
    return CARD.read_text(encoding="utf-8").replace("{scores}", table_of(scores))


def publish(source: Path, scores: Path, target: Path) -> None:
    """Replaces `target`."""
    report = json.loads(scores.read_text(encoding="utf-8"))
    report.pop("model", None)  # a folder of the machine that measured
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix != ".py":
            shutil.copy(file, target)
    link_modules(target)
    (target / SCORES).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (target / "README.md").write_text(card(report["scores"]), encoding="utf-8")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="publish.py", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of the trained model")
    parser.add_argument("scores", type=Path, help="its scores, as evaluate.py --json writes them")
    parser.add_argument("--target", type=Path, default=DEFAULT_MODEL, help="default: %(default)s")
    options = parser.parse_args(arguments)
    publish(options.source, options.scores, options.target)
    sys.stdout.write(f"{options.target}\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"publish.py: {error}")
