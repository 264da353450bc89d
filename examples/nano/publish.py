"""Makes a finished run the embedded checkpoint: `python examples/nano/publish.py nano-run/final scores.json`.

`scores.json` is what `evaluate.py --json` wrote. The folder gets weights, configs, the scores, a model card with their
table, and links to the repository's modules in place of copies.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evaluate import DEFAULT_MODEL, table_of
from transformers.dynamic_module_utils import get_relative_import_files
from vila.families_vila import family_of
from vila.tokenizer_files_vila import read_json

CARD = Path(__file__).with_name("model_card.md")
SCORES = "scores.json"


def link_modules(folder: Path) -> None:
    """Relative links to the modules that `auto_map` reaches, so that no second copy can age."""
    family = family_of(read_json(folder / "config.json"))
    for owner in (family.model_class, family.processor_class, family.config_class):
        path = str(sys.modules[owner.__module__].__file__)
        for file in map(Path, [path, *get_relative_import_files(path)]):
            link = folder / file.name
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..", "..", file.name))


def scores_table(report: dict[str, Any]) -> str:
    return table_of(report["scores"])


def publish(source: Path, report: dict[str, Any], target: Path, card: Path, table: Callable[[Any], str]) -> None:
    """Replaces `target`.

    Args:
        report: what the evaluation wrote; `table` makes Markdown of it, for the `{scores}` of the card.
    """
    report.pop("model", None)  # a folder of the machine that measured
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix != ".py":
            shutil.copy(file, target)
    link_modules(target)
    (target / SCORES).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    text = card.read_text(encoding="utf-8").replace("{scores}", table(report))
    (target / "README.md").write_text(text, encoding="utf-8")


def main(
    arguments: list[str],
    default: Path = DEFAULT_MODEL,
    card: Path = CARD,
    table: Callable[[Any], str] = scores_table,
) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0].partition(":")[0])
    parser.add_argument("source", type=Path, help="folder of the trained model")
    parser.add_argument("scores", type=Path, help="its scores, as the evaluation writes them")
    parser.add_argument("--target", type=Path, default=default, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        publish(options.source, json.loads(options.scores.read_text("utf-8")), options.target, card, table)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{parser.prog}: {error}")
    sys.stdout.write(f"{options.target}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
