"""Processes over gloo for test_sequence_parallel.py: `python sequence_processes.py WHAT SIZE FOLDER`.

Everything is imported once, then the processes fork. What they found comes as JSON on the last line.
"""

import copy
import json
import os
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.data_loader import SeedableRandomSampler
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoConfig, AutoModel, AutoProcessor, Trainer, TrainingArguments
from vila import generation_vila
from vila.sequence_parallel_vila import SequenceParallel
from vila.sequence_training_vila import SequenceParallelTrainer, ShardingCollator
from vila.training_vila import LORA_TARGETS, VilaDataCollator, train_only

NANO = Path(__file__).resolve().parents[1] / "checkpoints" / "vila-nano"
TIMEOUT = 60


def frames(count):
    return [Image.effect_noise((112, 112), 40 + number).convert("RGB") for number in range(count)]


def row(question, *media):
    content = [*media, {"type": "text", "text": question}]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": f"The answer is {len(question)}."}]},
        ]
    }


def picture(width, height):
    return {"type": "image", "image": Image.effect_noise((width, height), 80).convert("RGB")}


def video(count):
    return {"type": "video", "video": frames(count)}


BATCHES = {
    "everything": [row("What?", picture(200, 112)), row("Why?"), row("And then?", video(7)), row("Who is it?")],
    "one tile": [row("How many are there?"), row("What is this?", picture(112, 112)), row("Why not?")],
    "text": [row("What is the number?"), row("A longer question without any picture?")],
    "videos": [row("What?", video(5)), row("And?", video(2), picture(112, 112))],
}


def tiny(attention_heads=4, key_heads=2, **options):
    """Random weights, in the shape of vila-nano."""
    config = AutoConfig.from_pretrained(NANO)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.layer_types = 48, 64, 2, None
    text.layer_types = ["full_attention"] * 2
    text.num_attention_heads, text.num_key_value_heads = attention_heads, key_heads
    vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers = 36, 48, 2
    for name, value in options.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModel.from_config(config).float()


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]


def difference(ours, theirs):
    return max(float((own - other).abs().max()) for own, other in zip(ours, theirs, strict=True))


def training(rank, size, folder):
    """Loss and gradients of every batch against those of one process; and the tiles that each process encodes."""
    processor, found = AutoProcessor.from_pretrained(NANO), {}
    collator = VilaDataCollator(processor, packing=True)
    for name, key_heads, checkpointing, tuned in (
        ("everything", 2, False, None),
        ("everything", 1, True, None),
        ("one tile", 4, False, None),
        ("one tile", 2, False, ["projector"]),
        ("text", 2, False, None),
        ("videos", 2, False, None),
    ):
        model = tiny(key_heads=key_heads).train()
        if tuned:
            train_only(model, tuned)
        whole = collator(BATCHES[name])
        expected_loss, expected = loss_and_gradients(model, whole)
        if checkpointing:
            model.gradient_checkpointing_enable()
        parallel = SequenceParallel(model, timeout=TIMEOUT)
        part = ShardingCollator(collator, parallel.sharder)(BATCHES[name])
        loss, gradients = loss_and_gradients(model, part)
        for tensor in (loss, *gradients):
            dist.all_reduce(tensor)
            tensor /= size
        tiles = torch.tensor(sum(len(part[key]) for key in ("pixel_values", "pixel_values_videos") if key in part))
        parallel.stop()
        after, _ = loss_and_gradients(model, whole)
        found[f"{name}/{key_heads}/{checkpointing}/{tuned}"] = {
            "loss": float((loss - expected_loss).abs()),
            "gradients": difference(gradients, expected),
            "largest": max(float(weight.abs().max()) for weight in expected),
            "tiles": [int(count) for count in parallel.gather(tiles)],
            "after": float((after - expected_loss).abs()),
        }
    return found


def adapted(model):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=LORA_TARGETS))


def wrapped(rank, size, folder):
    """Gradients under FSDP, and of adapters, against one process."""
    collator, found = VilaDataCollator(AutoProcessor.from_pretrained(NANO), packing=True), {}
    for name, wrap in (
        ("fsdp", lambda model: [fully_shard(model), model][1]),
        ("adapters", adapted),
    ):
        for rows in ("everything", "one tile"):
            whole_model = wrap(tiny()) if name == "adapters" else tiny()
            expected_loss, expected = loss_and_gradients(whole_model.train(), collator(BATCHES[rows]))
            model = tiny()
            parallel = SequenceParallel(model, timeout=TIMEOUT)
            model = wrap(model).train()
            part = ShardingCollator(collator, parallel.sharder)(BATCHES[rows])
            loss, gradients = loss_and_gradients(model, part)
            if name == "fsdp":
                gradients = [gradient.full_tensor() for gradient in gradients]
            else:
                gradients = [torch.stack(parallel.gather(gradient)).mean(0) for gradient in gradients]
            mean_loss = torch.stack(parallel.gather(loss)).mean()
            found[f"{name}/{rows}"] = {
                "loss": float((mean_loss - expected_loss).abs()),
                "gradients": difference(gradients, expected),
                "largest": max(float(gradient.abs().max()) for gradient in expected),
            }
    return found


class OneProcess(Trainer):
    """In the order of `SequenceParallelTrainer`."""

    def _get_train_sampler(self, train_dataset=None):
        return SeedableRandomSampler(self.train_dataset, data_seed=self.args.seed)


def trainer(rank, size, folder):
    """Three steps of four processes in two groups, or of one with twice as many passes per step."""
    collator, model = VilaDataCollator(AutoProcessor.from_pretrained(NANO), packing=True), tiny()
    rows = [row for batch in ("everything", "one tile", "videos") for row in BATCHES[batch]]
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2 if size > 1 else 4,
        max_steps=3,
        learning_rate=1e-2,
        optim="sgd",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=1,
    )
    options = {"train_dataset": rows[:8], "eval_dataset": rows[:4], "data_collator": collator}
    if size > 1:
        parallel = SequenceParallel(model, size=2, timeout=TIMEOUT)
        runner = SequenceParallelTrainer(model, arguments, sequence_parallel=parallel, **options)
    else:
        runner = OneProcess(model, arguments, **options)
    runner.train()
    losses = [entry["loss"] for entry in runner.state.log_history if "loss" in entry]
    weights = [float(weight.detach().double().norm()) for weight in model.parameters()]
    return {"losses": losses, "evaluated": runner.evaluate()["eval_loss"], "weights": weights}


def question(processor, *contents, **options):
    messages = []
    for content in contents:
        role = "assistant" if isinstance(content, str) else "user"
        content = [{"type": "text", "text": content}] if role == "assistant" else list(content)
        messages.append({"role": role, "content": content})
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": 24, **options},
    )


def answer(model, inputs, **options):
    output = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return output.sequences, torch.cat(output.logits), output.past_key_values


def inference(rank, size, folder):
    """A question about a video and one more, by one process and by all."""
    processor, model = AutoProcessor.from_pretrained(NANO), tiny(key_heads=2).eval()
    model.generation_config.eos_token_id = None
    text = {"type": "text", "text": "What is it, and why?"}
    turn = [*[{"type": "video", "video": frames(24)}], text]
    first = question(processor, turn)
    second = question(
        processor,
        turn,
        "A cat.",
        [
            {
                "type": "text",
                "text": "Are you sure? Tell me which colour the thing has, and how many of them there are in all.",
            }
        ],
    )
    ids, logits, cache = answer(model, first)
    again, more_logits, _ = answer(model, second, past_key_values=copy.deepcopy(cache))
    # of nine ids over four processes the last gets none
    short = {"input_ids": torch.arange(5, 14).unsqueeze(0)}
    _, short_logits, _ = answer(model, short)
    parallel, encoded = SequenceParallel(model, timeout=TIMEOUT), []
    model.model.vision_tower.register_forward_hook(lambda _, inputs, output: encoded.append(len(output[0])))
    own_ids, own_logits, own_cache = answer(model, parallel.prepare(**first))
    own_encoded = sum(encoded)
    own_again, own_more, _ = answer(model, second, past_key_values=own_cache)
    whole_ids, whole_logits, _ = answer(model, first)
    _, own_short, _ = answer(model, parallel.prepare(**short))
    stream, before = question(processor, turn, stream_frames=True), sum(encoded)
    _, own_streamed, _ = answer(model, parallel.prepare(**stream))
    keys = torch.tensor(own_cache.layers[0].keys.shape[2])
    return {
        "logits": float((own_logits - logits).abs().max()),
        "ids": torch.equal(own_ids, ids),
        "more logits": float((own_more - more_logits).abs().max()),
        "more ids": torch.equal(own_again, again),
        "short": float((own_short - short_logits).abs().max()),
        "unprepared": float((whole_logits - logits).abs().max()),
        "unprepared ids": torch.equal(whole_ids, ids),
        "streamed": float((own_streamed - logits).abs().max()),
        "streams": [type(value).__name__ for value in stream.values() if not isinstance(value, torch.Tensor)],
        "decoded": sum(encoded) - before,
        "encoded": [int(n) for n in parallel.gather(torch.tensor(own_encoded))],
        "keys": [int(n) for n in parallel.gather(keys)],
        "prompt": first["input_ids"].shape[1],
        "largest": float(logits.abs().max()),
    }


def readme(rank, size, folder):
    """The README's lines about an answer, and another question behind them."""
    processor, model = AutoProcessor.from_pretrained(NANO), tiny().eval()
    model.generation_config.eos_token_id = list(range(model.config.text_config.vocab_size))
    turn = [{"type": "video", "video": frames(6)}, {"type": "text", "text": "What is it?"}]
    first = question(processor, turn)
    second = question(processor, turn, "A cat.", [{"type": "text", "text": "Are you sure?"}])
    expected = [answer(model, inputs)[0] for inputs in (first, second)]
    blocks = (NANO.parents[1] / "README.md").read_text(encoding="utf-8").split("```python\n")
    (code,) = (block.split("```")[0] for block in blocks if "parallel.prepare(" in block)
    shown = {"model": model, "processor": processor, "inputs": first, "torch": torch, "os": os}
    with patch.object(dist, "init_process_group"):  # there is a group already, with a file in place of a port
        exec(code, shown | {"SequenceParallel": SequenceParallel}, shown)
    output = shown["output"]
    own = [output.sequences, answer(model, second, past_key_values=output.past_key_values)[0]]
    return {"same": [torch.equal(*pair) for pair in zip(own, expected, strict=True)], "answer": shown["answer"]}


@patch.multiple(generation_vila, LONG_PROMPT=20, PREFILL_CHUNK=16)
def long_inference(rank, size, folder):
    """Prompts that one process takes in chunks, by one process and by all: logits, and the keys of every process."""
    processor, model = AutoProcessor.from_pretrained(NANO), tiny().eval()
    model.generation_config.eos_token_id = None
    turn = [{"type": "video", "video": frames(24)}, {"type": "text", "text": "What is it?"}]
    again = [{"type": "text", "text": "Are you sure? Tell me which colour the thing has, and how many there are."}]
    first, second = question(processor, turn), question(processor, turn, "A cat.", again)
    text = {"input_ids": torch.arange(5, 95).unsqueeze(0)}
    _, logits, cache = answer(model, first)
    expected = [logits, logits, logits, answer(model, text)[1], answer(model, second, past_key_values=cache)[1]]
    parallel = SequenceParallel(model, timeout=TIMEOUT)
    caches, found = [], []
    for inputs in (first, parallel.prepare(**first), parallel.prepare(**first), text, second):
        # the second question about the video goes on from the first
        past = {"past_key_values": caches[1]} if inputs is second else {}
        model.generation_config.prefill_chunk_size = 12 if len(found) == 2 else None
        _, own, cache = answer(model, inputs, **past)
        caches.append(cache)
        found.append(own)
    try:
        model.generate(**text, prefill_chunk_size=16)
    except ValueError as error:
        refused = str(error)
    keys = [torch.tensor(cache.layers[0].keys.shape[2]) for cache in (*caches[:1], *caches[2:4])]
    return {
        "logits": [float((own - one).abs().max()) for own, one in zip(found, expected, strict=True)],
        "largest": float(logits.abs().max()),
        "keys": [[int(n) for n in parallel.gather(count)] for count in keys],
        "prompts": [first["input_ids"].shape[1]] * 2 + [90],
        "refused": refused,
    }


def tensor_parallel(rank, size, folder):
    """Two groups of weights, each over two parts of the prompt, against one process."""
    processor, model = AutoProcessor.from_pretrained(NANO), tiny().eval()
    inputs = question(processor, [{"type": "video", "video": frames(6)}, {"type": "text", "text": "What is it?"}])
    ids, logits, _ = answer(model, inputs)
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("sequence", "tensor"))
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    language_model = model.model.language_model
    plan = {name: styles[style]() for name, style in language_model.config.base_model_tp_plan.items()}
    parallelize_module(language_model, mesh["tensor"], plan)
    heads = language_model.layers[0].self_attn.q_proj.weight.to_local().shape[0]
    parallel = SequenceParallel(model, group=mesh["sequence"].get_group())
    own_ids, own_logits, cache = answer(model, parallel.prepare(**inputs))
    return {
        "ids": torch.equal(own_ids, ids),
        "logits": float((own_logits - logits).abs().max()),
        "query channels": heads,
        "cache": list(cache.layers[0].keys.shape),
        "prompt": inputs["input_ids"].shape[1],
    }


def different_batches(rank, size, folder):
    model = tiny()
    parallel = SequenceParallel(model, timeout=TIMEOUT)
    collator = ShardingCollator(VilaDataCollator(AutoProcessor.from_pretrained(NANO), packing=True), parallel.sharder)
    try:
        model(**collator([row("What?" if rank else "Why?")]))
    except ValueError as error:
        return {"error": str(error)}


def different_prompts(rank, size, folder):
    """One process asks something else: at first, with media that the others lack, or after the first answer."""
    processor, model = AutoProcessor.from_pretrained(NANO), tiny().eval()
    parallel, errors = SequenceParallel(model, timeout=TIMEOUT), []
    ids, others = torch.arange(5, 25).unsqueeze(0), torch.arange(6, 26).unsqueeze(0)
    clip = question(processor, [{"type": "video", "video": frames(4)}, {"type": "text", "text": "What is it?"}])
    _, _, cache = answer(model, {"input_ids": ids})
    again = torch.arange(30, 40 + rank).unsqueeze(0)
    for inputs, past in (
        ({"input_ids": others if rank else ids}, {}),
        ({"input_ids": ids} if rank else clip, {}),
        (
            {"input_ids": again},
            {"past_key_values": cache, "attention_mask": torch.ones(1, cache.get_seq_length() + again.shape[1])},
        ),
    ):
        try:
            answer(model, parallel.prepare(**inputs), **past)
        except ValueError as error:
            errors.append(str(error))
    found = [None] * size
    dist.all_gather_object(found, errors)
    return found


def lost(rank, size, folder, sleep):
    """The last process ends, or sleeps, after a step; what do the others say, and when?"""
    model = tiny().train()
    parallel = SequenceParallel(model, timeout=8)
    collator = ShardingCollator(VilaDataCollator(AutoProcessor.from_pretrained(NANO), packing=True), parallel.sharder)
    part = collator(BATCHES["one tile"])
    model(**part).loss.backward()
    if rank == size - 1:
        time.sleep(sleep)
        os._exit(1)
    start = time.monotonic()
    try:
        model(**part).loss.backward()
    except RuntimeError as error:
        return {"error": type(error).__name__, "seconds": time.monotonic() - start}


def lost_answering(rank, size, folder):
    """The last process ends while the others answer; what do they say, then and when they prepare another question?"""
    processor, model, found = AutoProcessor.from_pretrained(NANO), tiny(size, size).eval(), {}
    inputs = question(processor, [{"type": "video", "video": frames(6)}, {"type": "text", "text": "What is it?"}])
    parallel = SequenceParallel(model, timeout=8)
    prepared = parallel.prepare(**inputs)
    start, calls = time.monotonic(), []

    def count(*_):
        calls.append(None)
        # behind the prompt and two new tokens
        if rank == size - 1 and len(calls) == 4:
            os._exit(1)

    model.model.language_model.register_forward_pre_hook(count)
    for name, work in (("generate", lambda: answer(model, prepared)), ("prepare", lambda: parallel.prepare(**inputs))):
        try:
            work()
        except RuntimeError as error:
            found[name] = type(error).__name__
    return found | {"calls": len(calls), "seconds": time.monotonic() - start}


SCENARIOS = {
    "training": training,
    "inference": inference,
    "long_inference": long_inference,
    "readme": readme,
    "tensor_parallel": tensor_parallel,
    "trainer": trainer,
    "wrapped": wrapped,
    "different_batches": different_batches,
    "different_prompts": different_prompts,
    "dies_answering": lost_answering,
    "dies": lambda *args: lost(*args, sleep=0),
    "hangs": lambda *args: lost(*args, sleep=30),
}


def work(rank, size, names, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # asked for, but the store is a file
    limit = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=limit)
    try:
        found = {name: SCENARIOS[name](rank, size, folder) for name in names}
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    os._exit(0)  # without waiting for processes that are gone


if __name__ == "__main__":
    *names, size = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(work, (int(size), names, folder), int(size), join=False, start_method="fork")
        for process in context.processes:
            process.join()
        sys.stdout.write(Path(folder, "found.json").read_text() + "\n")
