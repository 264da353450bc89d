"""What int4 costs in answers: vila-nano rounded and searched, `python benchmarks/quantize_quality.py`.

Accuracies are those of `examples/nano/evaluate.py`; the divergence is that of the next token at every answer's tokens,
from the model as it is, in nats. What is searched is calibrated on conversations of the kinds that the model was
trained on, in a row of its own on what `vila.quantize` draws by default.
"""

import argparse
import json
import random
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor
from vila.quantize import Options, quantize
from vila.quantize.calibration import Chat
from vila.training_vila import VilaDataCollator

NANO = Path(__file__).resolve().parents[1] / "examples" / "nano"
sys.path.insert(0, str(NANO))
from answering import batched, score  # noqa: E402
from dataset import TASKS  # noqa: E402
from evaluate import DEFAULT_MODEL  # noqa: E402
from judge import TRIALS  # noqa: E402
from recipe import PRACTICE  # noqa: E402

CONTROLS = ("fewshot_0", "tiles_off")
BATCH_SIZE = 32
CALIBRATION_CHATS = 512
DEFAULT_CALIBRATION = "AWQ, 4 bits, default calibration"


def load(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="bfloat16").eval()


@torch.no_grad()
def divergence(whole: Any, model: Any, processor: Any, trials: list[str], samples: int, seed: int) -> float:
    """Mean KL divergence of answers' tokens."""
    collator, total, count = VilaDataCollator(processor), 0.0, 0
    for trial in tqdm(trials, desc="divergence", file=sys.stderr):
        for episodes in batched(TRIALS[trial].episodes(samples, seed), BATCH_SIZE):
            batch = collator([{"messages": episode.messages} for episode in episodes])
            is_answer = batch.pop("labels")[:, 1:] != -100
            one, two = (each(**batch).logits[:, :-1][is_answer].float().log_softmax(-1) for each in (whole, model))
            total += (one.exp() * (one - two)).sum().item()
            count += int(is_answer.sum())
    return total / count


def seen_chats(count: int, seed: int = 0) -> list[Chat]:
    """Conversations of the training split, in the shares of the last stage of training."""
    kinds = random.Random(seed).choices(list(PRACTICE), list(PRACTICE.values()), k=count)
    return [TASKS[kind](random.Random(f"{seed}/{n}"), "train").messages for n, kind in enumerate(kinds)]


def all_variants() -> dict[str, Options | None]:
    """Rows of the table and how each is quantised; GPTQ where optimum is installed."""
    variants: dict[str, Options | None] = {"bfloat16": None}
    for bits in (4, 3):
        variants[f"RTN, {bits} bits"] = Options("rtn", bits)
        variants[f"AWQ, {bits} bits"] = Options("awq", bits, samples=CALIBRATION_CHATS)
        if find_spec("optimum") is not None:
            variants[f"GPTQ, {bits} bits"] = Options("gptq", bits, samples=CALIBRATION_CHATS)
    variants["AWQ, 4 bits, int8 head"] = Options("awq", 4, head_bits=8, samples=CALIBRATION_CHATS)
    variants[DEFAULT_CALIBRATION] = Options("awq", 4)
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--samples", type=int, default=400, help="questions per task (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration", help="see vila.quantize (default: conversations as in training)")
    parser.add_argument("--variants", nargs="+", metavar="TITLE", help="rows of the table (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object per variant instead of the table")
    options = parser.parse_args()
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    trials = [name for name in TRIALS if name not in CONTROLS and "shuffled" not in name]
    whole, own = load(options.model), seen_chats(CALIBRATION_CHATS)
    with tempfile.TemporaryDirectory() as name:
        variants = all_variants()
        if unknown := sorted(set(options.variants or ()) - set(variants)):
            parser.error(f"no variant {', '.join(unknown)}; there are {', '.join(variants)}")
        variants = {title: variants[title] for title in options.variants or variants}
        for number, (title, choice) in enumerate(variants.items()):
            model = whole
            if choice is not None:
                chats = None if title == DEFAULT_CALIBRATION else options.calibration or own
                model = load(quantize(options.model, Path(name) / str(number), choice, chats))
            scores = {
                trial: score(model, processor, trial, options.samples, options.seed, batch_size=BATCH_SIZE).accuracy
                for trial in tqdm(trials, desc=title, file=sys.stderr)
            }
            mean = sum(scores.values()) / len(scores)
            kl = divergence(whole, model, processor, trials, max(1, options.samples // 4), options.seed)
            row = {"variant": title, "mean": mean, "divergence": kl, "scores": scores}
            text = json.dumps(row) if options.json else f"| {title} | {100 * mean:.1f} % | {kl:.5f} |"
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
