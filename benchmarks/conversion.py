"""Time and memory of `vila-convert`: `python benchmarks/conversion.py`.

Linking is measured on a 15B layout whose weight files are sparse (headers are real, data are holes), copying on three
shards beside a plain `shutil.copyfile` of the same bytes. Prints one line per figure.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from sparse import write_shards  # noqa: E402

TINY = REPOSITORY / "tests" / "goldens" / "vila" / "nvila_lite_image" / "checkpoint"
MIB = 2**20
QWEN_14B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "num_hidden_layers": 48,
}


def make_layout(folder: Path, shards: int, **llm: int) -> None:
    """The tiny checkpoint's folder with a language model of other sizes, and a projector that fits."""
    shutil.copytree(TINY, folder)
    (folder / "llm" / "model.safetensors").unlink()
    path = folder / "llm" / "config.json"
    config = {**json.loads(path.read_text()), **llm}
    path.write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "llm"))
    shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    write_shards(folder / "llm", shapes, shards)
    projector, hidden = load_file(folder / "mm_projector" / "model.safetensors"), config["hidden_size"]
    size = json.loads((TINY / "llm" / "config.json").read_text())["hidden_size"]
    for name, weight in projector.items():
        projector[name] = torch.zeros([hidden if extent == size else extent for extent in weight.shape])
    save_file(projector, folder / "mm_projector" / "model.safetensors")


def convert_in_child(*arguments: str | Path) -> tuple[float, float]:
    """Seconds of the conversion without imports, and the process's peak resident MiB above that after imports."""
    script = (
        "import resource, sys, time\n"
        "from vila.conversion_vila import convert\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; start = time.perf_counter()\n"
        "convert(sys.argv[1], sys.argv[2], copy=sys.argv[3:] == ['--copy'])\n"
        "seconds = time.perf_counter() - start\n"
        "print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, peak = output.split()[-2:]
    return float(seconds), float(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        make_layout(folder / "large", shards=6, **QWEN_14B)
        size = sum(path.stat().st_size for path in (folder / "large").rglob("*.safetensors"))
        runs = [convert_in_child(folder / "large", folder / f"linked{run}") for run in range(repeats)]
        seconds, peak = (statistics.median(column) for column in zip(*runs))
        sys.stdout.write(f"link {size / 1e9:.1f} GB: {seconds:.2f} s, peak +{peak:.0f} MiB\n")

        make_layout(folder / "middle", shards=3, **{**QWEN_14B, "hidden_size": 1024, "num_attention_heads": 8})
        shard = max(path.stat().st_size for path in (folder / "middle").rglob("*.safetensors")) / MIB
        ratios, peaks = [], []
        for run in range(repeats):
            start = time.perf_counter()
            for path in (folder / "middle" / "llm").glob("*.safetensors"):
                shutil.copyfile(path, folder / "peer")
            plain = time.perf_counter() - start
            seconds, peak = convert_in_child(folder / "middle", folder / f"copied{run}", "--copy")
            shutil.rmtree(folder / f"copied{run}")
            ratios.append(seconds / plain)
            peaks.append(peak / shard)
        sys.stdout.write(
            f"copy 3 shards of {shard:.0f} MiB: {statistics.median(ratios):.2f} x the time of shutil.copyfile, "
            f"peak memory {statistics.median(peaks):.2f} x one shard\n"
        )


if __name__ == "__main__":
    main()
