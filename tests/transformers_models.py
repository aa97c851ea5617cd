"""Small models of transformers with random weights, in their real classes, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.base import unmute

SIZE, PATCH, VOCABULARY, IMAGE = 32, 8, 64, 60

# fmt: off
VISION = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=SIZE,
              patch_size=PATCH)
TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=VOCABULARY,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA = dict(TEXT, model_type="llama", num_key_value_heads=2)
ROPE = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4)
QWEN = dict(TEXT, num_key_value_heads=2, rope_parameters=ROPE)
QWEN_IDS = dict(image_token_id=IMAGE, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
QWEN_VISION = dict(depth=2, hidden_size=32, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
# fmt: on


@dataclass(frozen=True)
class Example:
    """`build` gives the same model at every call, in eval mode; `batch` its inputs, with labels if it takes them."""

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    presets: dict[str, int]
    """The presets that fit, and how many weights each one adapts."""

    def loss(self, model: nn.Module) -> Tensor:
        output = model(**self.batch())
        if getattr(output, "loss", None) is not None:
            return output.loss
        values = [getattr(output, name, None) for name in ("image_embeds", "text_embeds")]
        if values[0] is None:
            values = [output.last_hidden_state]
        return sum(value.square().mul(torch.linspace(0, 1, value.shape[-1])).mean() for value in values)


def pixels(images: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, 3, SIZE, SIZE, generator=generator)


def words(count: int = 2, image_tokens: int = 0) -> dict[str, Tensor]:
    """Token ids with the image first, and labels that leave the image out."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 50, (count, 6), generator=generator)
    ids = torch.cat([torch.full((count, image_tokens), IMAGE), text], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids == IMAGE, -100)}


def _talk(image_tokens: int, **more: Callable[[], Tensor]) -> Callable[[], dict[str, Tensor]]:
    return lambda: {**words(2, image_tokens), **{name: make() for name, make in more.items()}}


def _pixel_batch() -> dict[str, Tensor]:
    return {"pixel_values": pixels()}


def _labelled() -> dict[str, Tensor]:
    return {"pixel_values": pixels(), "labels": torch.tensor([0, 2])}


def _pair_batch() -> dict[str, Tensor]:
    return {"pixel_values": pixels(), **{k: v for k, v in words().items() if k != "labels"}}


def _flat_patches() -> dict[str, Tensor]:
    """SigLIP 2's patches (B, 16, 3 * 8 * 8), with their mask and grid."""
    patches = pixels().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1).reshape(2, 16, -1)
    grid = {"pixel_attention_mask": torch.ones(2, 16, dtype=torch.long), "spatial_shapes": torch.full((2, 2), 4)}
    return {**_pair_batch(), "pixel_values": patches, **grid}


def _qwen_batch() -> dict[str, Tensor]:
    """Two images of 4 x 4 patches of 4 x 4 pixels, which become 2 x 2 tokens each."""
    generator = torch.Generator().manual_seed(0)
    ids = words(2, 4)
    start = torch.full((2, 1), 62)
    ids["input_ids"] = torch.cat([start, ids["input_ids"]], dim=1)
    ids["attention_mask"] = torch.ones_like(ids["input_ids"])
    ids["labels"] = torch.cat([torch.full((2, 1), -100), ids["labels"]], dim=1)
    kinds = {"mm_token_type_ids": (ids["input_ids"] == IMAGE).int()}
    grid = {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    return {**ids, **kinds, "pixel_values": torch.randn(32, 3 * 2 * 4 * 4, generator=generator), **grid}


def _pali_batch() -> dict[str, Tensor]:
    batch = _talk(16, pixel_values=pixels)()
    return {**batch, "token_type_ids": (batch["labels"] != -100).long()}


def make(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built = getattr(transformers, model)(getattr(transformers, config)(**options))
            unmute(built)
        return built.eval()

    return build


def _vlm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return make(f"{name}ForConditionalGeneration", f"{name}Config", **options)


SIGLIP_VISION = dict(VISION, model_type="siglip_vision_model", vision_use_head=False)
# fmt: off
EXAMPLES = {
    "vit": Example(make("ViTForImageClassification", "ViTConfig", **VISION, num_labels=3), _labelled, dict(vision=12)),
    "dinov2": Example(make("Dinov2Model", "Dinov2Config", **VISION), _pixel_batch, dict(vision=12)),
    "dinov3": Example(make("DINOv3ViTModel", "DINOv3ViTConfig", **VISION), _pixel_batch, dict(vision=12)),
    "clip": Example(
        make("CLIPModel", "CLIPConfig", vision_config=VISION, text_config=TEXT, projection_dim=16), _pair_batch,
        dict(vision=12, text=12, projector=2)),
    "siglip2": Example(
        make("Siglip2Model", "Siglip2Config", vision_config=dict(VISION, num_patches=16), text_config=TEXT),
        _flat_patches, dict(vision=16, text=12)),
    "bert": Example(
        make("BertModel", "BertConfig", **TEXT), lambda: {"input_ids": words()["input_ids"]}, dict(text=12)),
    "gpt2": Example(
        make("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=2, vocab_size=VOCABULARY, bos_token_id=1,
             eos_token_id=2), words, dict(language=8)),
    "detr": Example(
        make("DetrForObjectDetection", "DetrConfig", d_model=32, num_queries=4, encoder_layers=1, decoder_layers=1,
             encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2,
             backbone_config=dict(model_type="resnet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1],
                                  layer_type="basic", out_features=["stage2"])),
        _pixel_batch, dict(vision=21)),
    "llava": Example(
        _vlm("Llava", vision_config=dict(VISION, model_type="clip_vision_model"), text_config=LLAMA,
             image_token_index=IMAGE, image_token_id=IMAGE), _talk(16, pixel_values=pixels),
        dict(vision=6, language=14, projector=2)),
    "qwen2_vl": Example(
        _vlm("Qwen2VL", vision_config=dict(QWEN_VISION, embed_dim=32), text_config=QWEN, **QWEN_IDS), _qwen_batch,
        dict(vision=8, language=14, projector=2)),
    "smolvlm": Example(
        _vlm("SmolVLM", vision_config=VISION, text_config=LLAMA, image_token_id=IMAGE, scale_factor=2),
        _talk(4, pixel_values=lambda: pixels()[:, None]), dict(vision=12, language=14, projector=1)),
    "paligemma": Example(
        _vlm("PaliGemma", vision_config=SIGLIP_VISION, projection_dim=32, image_token_index=IMAGE,
             text_config=dict(TEXT, model_type="gemma", head_dim=16, num_key_value_heads=2)),
        _pali_batch, dict(vision=12, language=14, projector=1)),
    "gemma3": Example(
        _vlm("Gemma3", vision_config=SIGLIP_VISION, mm_tokens_per_image=4, image_token_id=IMAGE,
             text_config=dict(TEXT, head_dim=16, sliding_window=8, num_key_value_heads=2)),
        lambda: {**_pali_batch(), **_talk(4, pixel_values=pixels)(),
                 "token_type_ids": (words(2, 4)["input_ids"] == IMAGE).long()},
        dict(vision=12, language=14, projector=1)),
}
# fmt: on
