"""Every golden case of VILA-U, through `vila-convert` and the public API alone."""

from pathlib import Path

import pytest
import torch
from conftest import COMMITTED_GOLDENS, GOLDENS, GoldenCase
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor
from vila.conversion_vila import convert

TOLERANCE = 1e-4
GUIDED_TOLERANCE = 1e-3
PIXEL_TOLERANCE = 0.01  # of 255


def vila_u_cases() -> list[GoldenCase]:
    root = GOLDENS if (GOLDENS / "vila_u").is_dir() else COMMITTED_GOLDENS
    folders = sorted((root / "vila_u").glob("*/golden.json")) if (root / "vila_u").is_dir() else []
    return [GoldenCase(file.parent) for file in folders]


CASES = vila_u_cases()


def cases_with(*tensors: str):
    """The cases that hold all of these tensors; what a case is follows from what it holds."""
    found = [case for case in CASES if all(name in case.golden["tensors"] for name in tensors)]
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in found])


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """`folder_of(case)`: its checkpoint, converted once."""
    folders: dict[str, Path] = {}

    def convert_once(case: GoldenCase) -> Path:
        if case.name not in folders:
            target = tmp_path_factory.mktemp("vila_u") / f"u_{case.name}"
            folders[case.name] = convert(case.folder / "checkpoint", target)
        return folders[case.name]

    return convert_once


def load(folder, **options):
    return AutoModel.from_pretrained(folder, dtype="float32", **options).eval(), AutoProcessor.from_pretrained(folder)


def close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def on_display(pixel_values):
    return ((pixel_values + 1) * 127.5).clamp(0, 255)


@cases_with("encoder_features", "decoded")
def test_tower_round_trip_equals_the_original(case, folder_of):
    model, _ = load(folder_of(case))
    tensors = case.tensors
    inputs = load_file(case.folder / "inputs" / "inputs.safetensors")
    depth = model.config.code_depth

    codes = model.encode_image(inputs["pixel_values"])
    assert torch.equal(codes, tensors["codes"].flatten(1, 2))
    assert torch.equal(codes + model.config.text_config.vocab_size, tensors["codes_with_offset"])
    close(on_display(model.decode_codes(codes)), on_display(tensors["decoded"]), PIXEL_TOLERANCE)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"])
        close(features.pooler_output[0], tensors["projected"][0])
        embeddings = model.model.quantizer.embed(codes[:1])
        close(embeddings, tensors["code_embeddings"].flatten(1, 2))
        tower = model.model.vision_tower(pixel_values=inputs["pixel_values"]).last_hidden_state
        close(tower, tensors["encoder_features"].flatten(1, 2))
        close(model.model.quantizer(tower)[0], tensors["quantized"].flatten(1, 2))
        given = model.model.quantizer.embed(tensors["rq_codes"].reshape(-1, depth))
        logits = model.model.depth_transformer(tensors["rq_body"].flatten(0, 1), given)
    close(logits, tensors["rq_logits"].flatten(0, 1))


def question(case):
    """The case's chat, from the files beside it."""
    golden = case.golden
    if "video" in golden:
        media = [{"type": "video", "path": str(case.folder / golden["video"])}]
    else:
        media = [{"type": "image", "path": str(case.folder / path)} for path in golden["images"]]
    return [{"role": "user", "content": [*media, {"type": "text", "text": golden["prompt_text"]}]}]


@cases_with("layout", "prefill_logsumexp", "output_ids")
def test_understanding_equals_the_original(case, folder_of):
    model, processor = load(folder_of(case))
    golden, tensors = case.golden, case.tensors
    inputs = processor.apply_chat_template(
        question(case), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    layout = tensors["layout"]
    assert torch.equal(inputs["input_ids"][0], layout.masked_fill(layout == -200, model.config.image_token_id))
    assert torch.equal(inputs["pixel_values"], tensors["pixel_values"])
    assert torch.equal(model.encode_image(inputs["pixel_values"]), tensors["codes"])
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        logits = model(**inputs).logits[0]
    is_video = "video" in golden
    close(torch.stack([features[0], features[-1]] if is_video else list(features)), tensors["image_features"])
    assert torch.equal(logits.argmax(-1), tensors["prefill_argmax"])
    close(logits.logsumexp(-1), tensors["prefill_logsumexp"])
    close(logits[-8:], tensors["prefill_logits_last8"])
    count = golden["generation"]["max_new_tokens"]
    output = model.generate(
        **inputs, max_new_tokens=count, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    new_ids = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(new_ids, tensors["output_ids"])
    close(torch.cat(output.logits), tensors["greedy_logits"])
    if "\ufffd" not in golden["generated_text"]:  # of broken UTF-8, tokenizers make different numbers of marks
        assert processor.decode(new_ids[0], skip_special_tokens=True).strip() == golden["generated_text"]


@cases_with("codes", "conditional_ids", "pixels_0_255")
def test_drawing_equals_the_original(case, folder_of):
    model, processor = load(folder_of(case))
    golden, tensors = case.golden, case.tensors
    frames = golden["frames"]
    mode, options = ("video", {"num_frames": frames}) if frames else ("image", {})
    inputs = processor(text=[golden["prompt"]], generation_mode=mode, return_tensors="pt")

    assert torch.equal(inputs["input_ids"][0], tensors["conditional_ids"])
    assert torch.equal(inputs["negative_prompt_ids"][0], tensors["unconditional_ids"])
    output = model.generate(
        **inputs,
        generation_mode=mode,
        guidance_scale=golden["cfg_scale"],
        num_return_sequences=golden["generation_nums"],
        output_logits=True,
        **golden["sampling"],
        **options,
    )
    assert torch.equal(output.sequences, tensors["codes"])
    first = output.logits[:, : tensors["first_depth_logits_cfg"].shape[0]]
    close(first.permute(1, 2, 0, 3), tensors["first_depth_logits_cfg"], GUIDED_TOLERANCE)
    close(on_display(output.pixel_values), tensors["pixels_0_255"], PIXEL_TOLERANCE)
    pictures = processor.post_process_multimodal_output(output.pixel_values, generation_mode=mode)
    assert len(pictures) == golden["generation_nums"]
    assert (pictures[0][0] if frames else pictures[0]).size == tuple(tensors["pixels_0_255"].shape[:-3:-1])


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name) for case in CASES if "image_processor" in case.golden]
)
def test_preprocessing_equals_the_original(case, folder_of):
    processor = AutoProcessor.from_pretrained(folder_of(next(other for other in CASES if other.has_checkpoint)))
    modes = {"resize": "resize", "pad": "pad", "generation": "square"}
    for name, expected in case.tensors.items():
        picture, mode = name.rsplit("_", 1)
        image = Image.open(case.folder / "inputs" / f"{picture}.png")
        pixels = processor.image_processor(image, image_mode=modes[mode], return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels[0], expected), name


@cases_with("samples_default_seed_1234")
def test_sampling_filters_equal_the_original(case):
    from vila.sampling_vila_u import Sampling, code_filters

    logits = case.tensors["logits"]
    for name, settings in case.golden["settings"].items():
        probabilities = Sampling(code_filters(logits.shape[1], **settings)).probabilities(logits)
        expected = case.tensors[f"probs_{name}"]
        assert torch.equal(probabilities > 0, expected > 0), name
        torch.testing.assert_close(probabilities, expected, atol=1e-7, rtol=1e-5)
    sampling = Sampling(code_filters(logits.shape[1], **case.golden["settings"]["default"]))
    torch.manual_seed(1234)
    drawn = torch.stack([sampling.choose(logits) for _ in case.tensors["samples_default_seed_1234"]])
    assert torch.equal(drawn, case.tensors["samples_default_seed_1234"])


def training_row(case, conversation):
    """A conversation of the golden as chat; the picture or frames of each side lie in files of their own."""
    inputs = case.folder / "inputs"
    # samples of text alone were built without the system prompt, as the golden's notes say
    has_media = any("<image>" in turn["value"] for turn in conversation)
    messages = [] if has_media else [{"role": "system", "content": ""}]
    for turn in conversation:
        is_drawn = turn["from"] == "gpt"
        text = turn["value"]
        content = []
        if "<vi_start>" in text:
            content.append({"type": "video", "path": str(inputs / "frames")})
        elif "<image>" in text:
            picture = "generation.png" if is_drawn else "understanding.png"
            content.append({"type": "image", "path": str(inputs / picture)})
        for token in ("<im_start>", "<im_end>", "<vi_start>", "<vi_end>", "<image>"):
            text = text.replace(token, "")
        content.append({"type": "text", "text": text.strip()})
        messages.append({"role": "assistant" if is_drawn else "user", "content": content})
    return {"messages": messages}


def expand(ids, image_id, tokens):
    """The original has one -200 per picture where ours has a placeholder per code."""
    return [token for value in ids for token in ([image_id] * tokens if value == -200 else [value])]


@cases_with("expanded_labels", "images")
@pytest.mark.parametrize("packing", [False, True])
def test_training_equals_the_original(case, packing, folder_of):
    from vila.training_vila_u import VilaUDataCollator

    model, processor = load(folder_of(case), depth_dropout=0.0)
    golden, tensors = case.golden, case.tensors
    image_id, tokens = model.config.image_token_id, model.config.num_tile_tokens
    rows = [training_row(case, conversation) for conversation in golden["conversations"]]
    batch = VilaUDataCollator(processor, packing=packing)(rows)

    assert torch.equal(batch["pixel_values"], tensors["images"])
    if not packing:
        for row, (ids, mask) in enumerate(zip(tensors["input_ids"], tensors["attention_mask"])):
            expected = torch.tensor(expand(ids[mask].tolist(), image_id, tokens))
            assert torch.equal(batch["input_ids"][row, : len(expected)], expected)
            labels = tensors["expanded_labels"][row, : len(expected), 0]
            is_code = labels >= model.config.text_config.vocab_size
            assert torch.equal(batch["labels"][row, : len(expected)], labels.masked_fill(is_code, image_id))
    expected = golden["train_mode" if packing else "eval_mode"]
    # as the original: the depth transformer learns, the tower and its codes do not
    model.model.vision_tower.requires_grad_(False)
    model.model.quantizer.requires_grad_(False)
    output = model.train(packing)(**batch)
    for name in ("loss", "text_loss", "image_loss"):
        close(output[name], torch.tensor(expected[name]))
    if packing:
        output.loss.backward()
        check_gradients(model, golden, tensors)


def check_gradients(model, golden, tensors):
    from vila.weight_names_vila_u import with_module_names_u

    close(model.model.depth_transformer.hidden_projection.weight.grad, tensors["grad_in_mlp_2"])
    norms = with_module_names_u(golden["train_grad_norms"])
    parameters = dict(model.named_parameters())
    for name, norm in norms.items():
        close(parameters[name].grad.norm(), torch.tensor(norm))


@cases_with("inference_8")
def test_frames_of_a_video_equal_the_original(case, folder_of):
    processor = AutoProcessor.from_pretrained(folder_of(next(other for other in CASES if other.has_checkpoint)))
    for name in [name for name in case.tensors if name.startswith("inference_")]:
        count = int(name.removeprefix("inference_"))
        data = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "video", "path": str(case.folder / "inputs" / "clip.mp4")}]}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_frames": count},
        )
        means = on_display(data["pixel_values"]).mean((2, 3))
        assert len(means) == len(case.tensors[name])
        torch.testing.assert_close(means, case.tensors[name], atol=1.0, rtol=0)
