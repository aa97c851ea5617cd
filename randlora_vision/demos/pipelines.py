"""The pretrained models of the DreamBooth demo: tiny diffusers pipelines, trained on the ten digits.

They generate images of 16 x 16 pixels from latents of 8 x 8 with 4 channels. The text encoders are random and frozen,
with token embeddings large enough to tell prompts apart. The VAE is trained first, also on inverted images.
"""

from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

from randlora_vision.demos.pretraining import Pretraining, cached_folder, teach
from randlora_vision.demos.tokenizers import clip_tokenizer
from randlora_vision.training.data.labelled import Batch, LabelledImages
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources import digits
from randlora_vision.training.dreambooth.batches import Prompts
from randlora_vision.training.dreambooth.families import FAMILIES, Family
from randlora_vision.training.dreambooth.objectives import ObjectiveOptions
from randlora_vision.training.dreambooth.pipeline_options import DemoFamily

PIXELS = 16
PROMPTS = tuple(f"a photo of the digit {name}" for name in digits.NAMES)
CLASS_PROMPT = "a photo of a digit"
_CONTEXT = 16
_TEXT_WIDTH = 64
_EMBEDDING_STD = 0.5
_VAE_TRAINING = Pretraining(steps=150, lr=2e-3)
_DENOISER_TRAINING = {
    "unet": Pretraining(steps=800, lr=2e-3),
    "flow": Pretraining(steps=600, lr=3e-3),
}
_EMA_DECAY = 0.99
_KL_WEIGHT = 1e-4
_CLASS_PART, _EMPTY_PART = 0.15, 0.1  # fractions of images captioned with the class prompt, or with the empty prompt
_VAE = {
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": PIXELS,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "block_out_channels": (32, 64),
    "cross_attention_dim": _TEXT_WIDTH,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
_TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 6,
    "joint_attention_dim": 2 * _TEXT_WIDTH,
    "caption_projection_dim": 96,
    "pooled_projection_dim": 2 * _TEXT_WIDTH,
    "pos_embed_max_size": 8,
}
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def demo_pipeline_folder(family: DemoFamily, cache_dir: str | None = None) -> Path:
    """Return the folder of a pretrained tiny pipeline, pretraining it first if it is not cached.

    `unet` is a StableDiffusionPipeline with noise prediction, `flow` a StableDiffusion3Pipeline with flow matching and
    without T5. The settings hashed into its name include the versions of torch, diffusers and transformers.
    """
    settings = {
        "vae": _VAE,
        "denoiser": _UNET if family == "unet" else _TRANSFORMER,
        "noise": _NOISE,
        "text": [_CONTEXT, _TEXT_WIDTH, _EMBEDDING_STD],
        "training": [
            asdict(_VAE_TRAINING),
            asdict(_DENOISER_TRAINING[family]),
            _EMA_DECAY,
            _KL_WEIGHT,
            _CLASS_PART,
            _EMPTY_PART,
        ],
        "prompts": [*PROMPTS, CLASS_PROMPT],
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "scikit-learn")},
    }

    def fill(folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_VAE_TRAINING.seed)
            pipe = build(family)
            _teach_vae(pipe)
            _teach_denoiser(pipe, _DENOISER_TRAINING[family])
        pipe.save_pretrained(folder)

    return cached_folder(f"digits-{family}", settings, fill, cache_dir)


def build(family: DemoFamily) -> Any:
    """Return the pipeline with random weights."""
    import diffusers

    if family == "unet":
        return diffusers.StableDiffusionPipeline(
            vae=diffusers.AutoencoderKL(**_VAE),
            text_encoder=_text_encoder(),
            tokenizer=clip_tokenizer(_CONTEXT),
            unet=diffusers.UNet2DConditionModel(**_UNET),
            scheduler=diffusers.DDIMScheduler(**_NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return diffusers.StableDiffusion3Pipeline(
        vae=diffusers.AutoencoderKL(**_VAE, shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_text_encoder(projected=True),
        tokenizer=clip_tokenizer(_CONTEXT),
        text_encoder_2=_text_encoder(projected=True),
        tokenizer_2=clip_tokenizer(_CONTEXT),
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=diffusers.SD3Transformer2DModel(**_TRANSFORMER),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def to_pixels() -> Compose:
    """Return the transform from a picture to pixels (3, 16, 16) between -1 and 1."""
    return Compose([Resize(PIXELS), ToTensor(), Normalize(0.5, 0.5)])


def _text_encoder(projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        projection_dim=_TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=_CONTEXT,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval().requires_grad_(False)
    model.get_input_embeddings().weight.normal_(std=_EMBEDDING_STD)
    return model


def _images(inverted: bool = False) -> LabelledImages:
    splits = digits.read_digits(inverted=inverted)
    return splits.select("train", Compose([splits.augment, to_pixels()]), SkipList())


def _teach_vae(pipe: Any) -> None:
    """Train the VAE on upright and inverted images; set the scale at which latents have unit variance."""
    vae = pipe.vae.train()

    def loss(batch: Batch) -> Tensor:
        images = batch["images"]
        flipped = torch.rand(len(images), 1, 1, 1) < 0.5
        images = torch.where(flipped, -images, images)
        posterior = vae.encode(images).latent_dist
        answer = vae.decode(posterior.sample()).sample
        return F.mse_loss(answer, images) + _KL_WEIGHT * posterior.kl().mean() / images[0].numel()

    teach(vae.parameters(), loss, _images(), _VAE_TRAINING)
    vae.eval().requires_grad_(False)
    images = torch.stack([item[0] for item in _some(_images(), 256)])
    with torch.no_grad():
        latents = vae.encode(torch.cat([images, -images])).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


def _teach_denoiser(pipe: Any, how: Pretraining) -> None:
    """Train the denoiser with the objective of its family on captioned upright digits."""
    family: Family = FAMILIES[type(pipe).__name__](pipe, ObjectiveOptions(), _CONTEXT)
    prompts = Prompts(family, [*PROMPTS, CLASS_PROMPT, ""], trained=False)
    sizes = torch.zeros(0)  # neither family uses them

    def loss(batch: Batch) -> Tensor:
        chance = torch.rand(len(batch["labels"]))
        captions = batch["labels"].clone()
        captions[chance < _CLASS_PART] = len(PROMPTS)
        captions[chance > 1 - _EMPTY_PART] = len(PROMPTS) + 1
        noised = family.objective(family.latents(family.moments(batch["images"])))
        answer = family.predict(noised.latents, noised.timesteps, prompts(captions), sizes)
        return F.mse_loss(answer, noised.target)

    family.denoiser.train()
    teach(family.denoiser.parameters(), loss, _images(), how, _EMA_DECAY)
    family.denoiser.eval()


def _some(data: LabelledImages, count: int) -> Iterator[tuple[Tensor, int]]:
    for index in range(min(count, len(data))):
        item = data[index]
        assert item is not None
        yield item
