"""Adapts two pretrained towers, DINOv2 and MiniLM, from one artist's emoji to another's, with three methods.

make demo-real

The towers are downloaded (`benchmarks.quality.data`), joined to an open_clip model, and aligned on Google's emoji and
their names: both stay frozen and two projections are learned on their features. train_scripts/compare.py then adapts
both towers to Twitter's drawings of the same things, with RandLoRA, LoRA and full fine-tuning, and measures Google's
again (the original task).
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import command_line
from benchmarks.quality.data import get
from benchmarks.quality.dinov2 import load_dinov2
from randlora_vision.errors import user_errors
from randlora_vision.files.atomic import replacing_folder
from randlora_vision.train_scripts import compare
from randlora_vision.training.clip.contrastive import softmax_loss
from randlora_vision.training.harness.optim import make_optimizer
from randlora_vision.training.harness.schedules import Schedule, warmup_schedule

PIXELS, CONTEXT, WIDTH = 56, 12, 384  # 99 of 100 names have at most 11 tokens
_VALIDATION, _TEST = 200, 500
_STEPS, _BATCH, _LR, _TEMPERATURE = 400, 256, 1e-3, 0.05  # of the alignment, which costs seconds
_AT_ONCE = 100
_TRAINING = ("--steps", "30", "--batch-size", "64", "--eval-every", "30", "--workers", "0", "--report-to", "none")
_RATES = ("--rates", "lora=1e-3", "full=1e-4")


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Get the data, align the towers, and compare the methods."""
    parser = command_line.parser("demo_real", __doc__)
    parser.add_argument("--data", type=Path, default=Path("runs/quality-data"), help="folder of the downloads")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo-real"), help="folder of the results")
    options, others = parser.parse_known_args(argv)
    get(options.data, ("dinov2", "emoji", "minilm"))
    emoji, model = options.output_dir / "emoji", options.output_dir / "dinov2-minilm"
    if not emoji.is_dir():
        write_emoji(options.data, emoji)
    if not model.is_dir():
        print("aligning DINOv2 and MiniLM on Google's emoji and their names", flush=True)
        with replacing_folder(model) as unfinished:
            write_model(options.data, unfinished, model.resolve())
    words = [
        "--model",
        f"local-dir:{model}",
        "--data",
        str(emoji / "twitter"),
        "--retention-data",
        str(emoji / "google"),
    ]
    compare.main([*words, "--output-dir", str(options.output_dir), *_RATES, *_TRAINING, *others])
    grids = ", ".join(str(path) for path in sorted(options.output_dir.glob("*/predictions.png")))
    print(f"nearest names before and after: {grids}")


def parts(number: int) -> dict[str, list[int]]:
    """Return the emoji of each split, the same for both artists."""
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0)).tolist()
    cuts = {"val": order[:_VALIDATION], "test": order[_VALIDATION : _VALIDATION + _TEST]}
    return {"train": order[_VALIDATION + _TEST :], **cuts}


def write_emoji(data: Path, folder: Path) -> None:
    """Write `folder/<artist>/<split>/` with pictures and metadata.csv, as train_clip.py reads them."""
    drawn = load_file(data / "emoji.safetensors")
    captions = json.loads((data / "emoji.json").read_text(encoding="utf-8"))["captions"]
    with replacing_folder(folder) as unfinished:
        for artist in ("google", "twitter"):
            for split, chosen in parts(len(captions)).items():
                place = unfinished / artist / split
                place.mkdir(parents=True)
                with (place / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
                    table = csv.writer(file)
                    table.writerow(("file_name", "text"))
                    for index in chosen:
                        name = f"{index:04}.png"
                        Image.fromarray(drawn[artist][index].numpy()).save(place / name)
                        table.writerow((name, captions[index]))


def write_model(data: Path, folder: Path, final: Path) -> None:
    """Write the aligned model to `folder` for open_clip's `local-dir:`; its configuration names the path `final`."""
    import open_clip

    timm_cfg = {
        "num_classes": 0,
        "input_size": [3, PIXELS, PIXELS],
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    timm = {"architecture": "vit_small_patch14_dinov2", "model_args": {"img_size": PIXELS}, "pretrained_cfg": timm_cfg}
    (folder / "vision").mkdir()
    (folder / "vision" / "config.json").write_text(json.dumps(timm), encoding="utf-8")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (folder / name).write_bytes((data / "minilm" / name).read_bytes())

    def config(place: Path) -> dict[str, Any]:
        vision = {
            "image_size": PIXELS,
            "timm_model_name": f"local-dir:{place / 'vision'}",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
        }
        text = {
            "context_length": CONTEXT,
            "hf_model_name": str(place),
            "hf_tokenizer_name": str(place),
            "hf_model_pretrained": False,
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "linear",
        }
        return {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text, "custom_text": True}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CustomTextCLIP(**{k: v for k, v in config(folder).items() if k != "custom_text"})
    model.visual.trunk.load_state_dict(load_dinov2(data, PIXELS).state_dict())
    text = load_file(data / "minilm" / "model.safetensors")
    lost = model.text.transformer.load_state_dict(text, strict=False)
    if lost.missing_keys:
        raise ValueError(f"{data}/minilm does not hold the text encoder: {lost.missing_keys[0]} is missing")
    preprocess = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic"}
    settings = {"model_cfg": config(final), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    align(model.eval(), data, open_clip.tokenizer.HFTokenizer(str(folder), context_length=CONTEXT))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def align(model: Any, data: Path, tokenize: Any) -> None:
    """Learn the two projections and the temperature on the frozen towers' features of Google's training emoji."""
    from torchvision.transforms import functional as images

    drawn = load_file(data / "emoji.safetensors")["google"]
    captions = json.loads((data / "emoji.json").read_text(encoding="utf-8"))["captions"]
    chosen = parts(len(captions))["train"]
    pixels = images.resize(drawn[chosen].permute(0, 3, 1, 2).float() / 255, [PIXELS, PIXELS], antialias=True)
    pixels = images.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    tokens = tokenize([captions[index] for index in chosen])
    with torch.no_grad():
        seen = torch.cat([model.visual.trunk(part) for part in pixels.split(_AT_ONCE)])
        read = torch.cat([_pooled(model.text, part) for part in tokens.split(_AT_ONCE)])
    visual, text = model.visual.head, model.text.proj
    nn.init.eye_(text.weight)  # MiniLM's own space is the start
    with torch.no_grad():
        model.logit_scale.fill_(-torch.tensor(_TEMPERATURE).log())
    trained = [*visual.parameters(), *text.parameters()]
    optimizer = make_optimizer("adamw", trained, _LR, 0.1)
    schedule = warmup_schedule(optimizer, Schedule(_STEPS, _STEPS // 10))
    generator = torch.Generator().manual_seed(0)
    for _ in range(_STEPS):
        batch = torch.randperm(len(seen), generator=generator)[:_BATCH]
        image, words = (F.normalize(x, dim=-1) for x in (visual(seen[batch]), text(read[batch])))
        logits, same = image @ words.T / _TEMPERATURE, torch.eye(len(batch), dtype=torch.bool)
        ((softmax_loss(logits, same) + softmax_loss(logits.T, same)) / (2 * len(batch))).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _pooled(text: Any, tokens: Tensor) -> Tensor:
    """Return the pooled features (B, D) of an open_clip text tower before its projection."""
    mask = (tokens != text.config.pad_token_id).long()
    return text.pooler(text.transformer(input_ids=tokens, attention_mask=mask), mask)


if __name__ == "__main__":
    main()
