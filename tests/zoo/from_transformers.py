"""transformers: vision and text towers from configurations, without any download."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from tests.zoo.base import Entry, entry, flat, numbers, tokens

SIZE, LENGTH, VOCABULARY = 32, 8, 32


def make(model: str, options: dict[str, Any], backbone: dict[str, Any] | None = None) -> nn.Module:
    import transformers

    if backbone is not None:
        options = options | {"backbone_config": transformers.ResNetConfig(**backbone)}
    kind = getattr(transformers, model)
    return kind(kind.config_class(**options))


def run(model: nn.Module, inputs: str, outputs: str) -> Tensor:
    fed: dict[str, Tensor] = {}
    if "image" in inputs:
        fed["pixel_values"] = numbers(model, 2, 3, SIZE, SIZE)
    if "text" in inputs:
        fed["input_ids"] = tokens(2, LENGTH, vocabulary=VOCABULARY)
    output = model(**fed)
    return flat(*(getattr(output, name) for name in outputs.split()))


def tower(
    name: str,
    model: str,
    options: dict[str, Any],
    inputs: str,
    outputs: str = "last_hidden_state",
    backbone: dict[str, Any] | None = None,
    **zoo: Any,
) -> Entry:
    makes = partial(make, model, options, backbone)
    return entry(f"transformers/{name}", makes, partial(run, inputs=inputs, outputs=outputs), **zoo)


# fmt: off
BLOCKS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
VISION = dict(BLOCKS, image_size=SIZE, patch_size=8)
TEXT = dict(BLOCKS, vocab_size=VOCABULARY, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0)
BACKBONE = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"])
DETR = dict(d_model=32, num_queries=6, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
            encoder_attention_heads=2, decoder_attention_heads=2)
# DETR's decoder starts from zeros: its first self-attention has nothing to mix.
FROM_ZEROS = (r"decoder\.layers\.0\.self_attn\.[qkv]_proj\.weight",)

ENTRIES = [
    tower("clip", "CLIPModel", dict(vision_config=VISION, text_config=TEXT, projection_dim=16), "image text",
          "image_embeds text_embeds"),
    tower("siglip", "SiglipModel", dict(vision_config=VISION, text_config=TEXT), "image text",
          "image_embeds text_embeds"),
    tower("vit", "ViTModel", VISION, "image", "last_hidden_state pooler_output"),
    tower("beit", "BeitModel", dict(VISION, use_relative_position_bias=True), "image",
          "last_hidden_state pooler_output"),
    tower("dinov2", "Dinov2Model", VISION, "image"),
    tower("dinov3", "DINOv3ViTModel", VISION, "image"),
    tower("swinv2", "Swinv2Model",
          dict(image_size=SIZE, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4), "image"),
    tower("convnextv2", "ConvNextV2Model", dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2), "image",
          target="all"),
    tower("segformer", "SegformerForSemanticSegmentation",
          dict(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
               strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16),
          "image", "logits"),
    tower("detr", "DetrForObjectDetection", DETR, "image", "logits pred_boxes", backbone=BACKBONE,
          unreachable=FROM_ZEROS),
    tower("bert", "BertModel", TEXT, "text", unreachable=(r"^pooler\.dense\.weight",)),
    tower("gpt2", "GPT2LMHeadModel",
          dict(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2),
          "text", "logits"),
    tower("llama", "LlamaModel", dict(TEXT, num_key_value_heads=1), "text", float32_inside=True),
    tower("t5_encoder", "T5EncoderModel",
          dict(vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2), "text",
          float32_inside=True),
]
# fmt: on
