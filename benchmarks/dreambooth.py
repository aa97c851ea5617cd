"""Peak memory of train_dreambooth.py by option, on a mid-sized Stable Diffusion 3 with random weights.

python -m benchmarks.dreambooth            # writes benchmarks/results/dreambooth.json (make figures shows it)
python -m benchmarks.dreambooth --quick    # a small pipeline, and nothing is written

Every row is a run of the script with four images of 64 x 64 pixels per step. Counted are the bytes of the tensors that
exist at once (see benchmarks/live.py), which no device changes: while texts and images are encoded, and while the
denoiser is trained. The check of the saved file, which loads the pipeline again, is left out.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

from benchmarks.live import LiveBytes
from randlora_vision.files.atomic import write_json

RESULTS = Path(__file__).parent / "results" / "dreambooth.json"
ALL_AT_ONCE = "all parts loaded together"
_BF16, _CHECKPOINTS = ("--mixed-precision", "bf16"), ("--gradient-checkpointing",)
_INT8 = ("--quantize", "torchao-int8")
_ADAM, _DISK, _FULL = ("--use-8bit-adam",), ("--offload-base", "disk"), ("--method", "full")
ROWS: dict[str, tuple[str, ...]] = {
    "`--method full`": _FULL,
    "`--method full --use-8bit-adam`": (*_FULL, *_ADAM),
    ALL_AT_ONCE: (),
    "the default: the denoiser after the text encoders": (),
    "`--use-8bit-adam`": _ADAM,
    "`--quantize torchao-int8`": _INT8,
    "`--mixed-precision bf16`": _BF16,
    "`--gradient-checkpointing`": _CHECKPOINTS,
    "`--mixed-precision bf16 --gradient-checkpointing --use-8bit-adam`": (*_BF16, *_CHECKPOINTS, *_ADAM),
    "`--quantize torchao-int8 --gradient-checkpointing`": (*_INT8, *_CHECKPOINTS),
    "`--offload-base disk` (with checkpointing)": _DISK,
    "`--offload-base disk --mixed-precision bf16`": (*_DISK, *_BF16),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dreambooth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="use a small pipeline, and write nothing")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        sizes = build(Path(folder), options.quick)
        rows = {}
        for row in ROWS:
            rows[row] = measure(row, folder)
            print(f"{row}: {rows[row]}", flush=True)
    if not options.quick:
        write_json(RESULTS, {"command": "python -m benchmarks.dreambooth", "parameters": sizes, "rows": rows})


def build(folder: Path, quick: bool) -> dict[str, int]:
    """Write a Stable Diffusion 3 pipeline of random weights and four images; return the parameters of every part."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    from benchmarks.clip_vocabulary import clip_tokenizer

    torch.manual_seed(0)
    width, layers, size = (64, 2, 32) if quick else (256, 4, 64)
    parts: dict[str, Any] = {
        "transformer": SD3Transformer2DModel(
            sample_size=size // 8,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            num_attention_heads=width // 64,
            attention_head_dim=64,
            joint_attention_dim=2 * width,
            caption_projection_dim=width,
            pooled_projection_dim=2 * width,
            pos_embed_max_size=size // 16,
        ),
        "vae": AutoencoderKL(
            block_out_channels=(16,) * 4,
            norm_num_groups=8,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            shift_factor=0.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "text_encoder": _text_encoder(width, layers),
        "text_encoder_2": _text_encoder(width, layers),
    }
    pipe = StableDiffusion3Pipeline(
        **parts,
        tokenizer=clip_tokenizer(77),
        tokenizer_2=clip_tokenizer(77),
        text_encoder_3=None,
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.save_pretrained(folder / "base")
    (folder / "images").mkdir()
    for number in range(4):
        Image.linear_gradient("L").rotate(90 * number).resize((size, size)).save(folder / f"images/{number}.png")
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def _text_encoder(width: int, layers: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    return CLIPTextModelWithProjection(config)


def measure(row: str, folder: str) -> dict[str, int]:
    """Run a row; return the most bytes while encoding and while training, and what a dry run estimates for training."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from randlora_vision.train_scripts import train_dreambooth as script
    from randlora_vision.training.dreambooth import loading, task

    for state in (AcceleratorState, GradientState, PartialState):  # as in a separate process
        state._shared_state.clear()
    argv = ["--pretrained-model-name-or-path", f"{folder}/base", "--instance-data-dir", f"{folder}/images"]
    argv += ["--instance-prompt", "a photo of sks dog", "--steps", "2", "--batch-size", "4", "--workers", "0"]
    argv += ["--num-inference-steps", "1", "--report-to", "none", "--num-prior-images", "0", "--center-crop"]
    argv += ["--overwrite", "--output-dir", f"{folder}/run", *ROWS[row]]
    live, found = LiveBytes(), {}

    def together(*given: Any, **options: Any) -> Any:
        return loading.load_family(*given, **{**options, "text_first": row != ALL_AT_ONCE})

    def loaded(load: Callable[..., Any], *given: Any, **options: Any) -> Any:
        result = load(*given, **options)
        family = given[0] if result is None else result
        for part in family.pipe.components.values():
            live.see(part.parameters() if isinstance(part, torch.nn.Module) else ())
        return result

    def timed(name: str, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        live.peak = live.now
        try:
            return function(*given, **options)
        finally:
            found[name] = live.peak

    load, fit, material = script.load, script.fit, script.make_material
    load_denoiser = script.Family.load_denoiser
    with contextlib.ExitStack() as stack:
        patch = lambda *given: stack.enter_context(mock.patch.object(*given))  # noqa: E731
        patch(script, "check_reload", lambda *given: 0.0)
        patch(task, "_MEASURED", 2)  # images of an evaluation: all take the same memory
        patch(script, "load_family", together)
        patch(script, "load", lambda *given: loaded(load, *given))
        patch(script.Family, "load_denoiser", lambda family: loaded(load_denoiser, family))
        patch(script, "make_material", lambda *given: timed("encoding", material, *given))
        patch(script, "fit", lambda *given, **options: timed("training", fit, *given, **options))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}))
        options = script.parse(script.DreamBoothOptions, argv, "", script.DIFFUSERS, script.DEFAULTS.help())
        settings = script.resolve(options)
        needs = script.measure(*_base(script, settings))
        stack.enter_context(live)
        script.train(options)
    return {**found, "estimate": needs.training_bytes}


def _base(script: Any, settings: Any) -> tuple[Any, ...]:
    base, dtype = script.base_of(settings)
    return base, settings, dtype


if __name__ == "__main__":
    main()
