"""What the diffusers presets leave out is in the report, and tiny configurations are adapted."""

from typing import Any

import pytest
import torch

from randlora_vision import RandLoRAConfig, plan
from randlora_vision.integrations.presets import denoisers

HEADS = dict(num_attention_heads=2, attention_head_dim=16)


def planned(name: str, rank: int = 2, preset: str = "diffusers:backbone", **options: Any) -> Any:
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, name)(**options)
    return plan(model, RandLoRAConfig(rank=rank, target_modules=preset))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "HunyuanVideoTransformer3DModel": (
        "context_embedder.token_refiner.refiner_blocks.0.attn.to_q",
        dict(HEADS, num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=24,
             pooled_projection_dim=20, rope_axes_dim=(4, 6, 6)),
    ),
    "HunyuanImageTransformer2DModel": (
        "context_embedder.token_refiner.refiner_blocks.0.attn.to_q",
        dict(HEADS, num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=24,
             rope_axes_dim=(8, 8)),
    ),
    "HunyuanVideo15Transformer3DModel": (
        "context_embedder.token_refiner.refiner_blocks.0.attn.to_q",
        dict(HEADS, in_channels=9, out_channels=4, num_layers=1, num_refiner_layers=1, text_embed_dim=24,
             text_embed_2_dim=20, image_embed_dim=16, rope_axes_dim=(4, 6, 6)),
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        "context_embedder.token_refiner.refiner_blocks.0.ff.net.2",
        dict(HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1,
             text_embed_dim=24, pooled_projection_dim=20, rope_axes_dim=(4, 6, 6), image_proj_dim=16,
             has_image_proj=True, has_clean_x_embedder=True),
    ),
    "WanAnimateTransformer3DModel": (
        "face_adapter.0.to_q",
        dict(HEADS, num_layers=1, text_dim=24, freq_dim=16, ffn_dim=48, motion_encoder_size=16,
             motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_style_dim=16, motion_dim=4,
             motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_parts_beside_the_blocks_are_in_the_report(name: str) -> None:
    weight, options = CASES[name]
    report = planned(name, **options)
    skipped = dict(report.skipped)
    assert skipped[weight].startswith("beside the blocks")
    targets = {target.name for target in report.targets}
    assert weight not in targets and targets
    assert not any(other.startswith(("x_embedder", "time", "norm_out", "proj_out")) for other in skipped)


def test_every_weight_of_the_facial_extractor_is_adapted_or_in_the_report() -> None:
    """Its attentions have keys and values in one weight, which is not one that fusing has replaced."""
    report = planned(
        "ConsisIDTransformer3DModel", **HEADS, in_channels=8, out_channels=4, num_layers=2, text_embed_dim=24,
        time_embed_dim=16, sample_width=8, sample_height=8, sample_frames=5, is_train_face=True, cross_attn_interval=1,
        cross_attn_dim_head=16, cross_attn_num_heads=2, LFE_id_dim=16, LFE_vit_dim=16, LFE_depth=5, LFE_dim_head=8,
        LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=2, LFE_output_dim=16, LFE_ff_mult=2,
    )  # fmt: skip
    names, skipped = {target.name for target in report.targets}, dict(report.skipped)
    assert {"local_facial_extractor.layers.4.0.to_kv", "perceiver_cross_attention.1.to_kv"} <= names
    left = {f"local_facial_extractor.id_embedding_mapping.{number}" for number in (0, 3, 6)}
    assert {name for name in skipped if name.startswith("local")} == left
    assert len({name for name in {*names, *skipped} if name.startswith("local_facial")}) == 5 * 5 + 5 * 3 + 3


def test_narrow_weights_are_in_the_report_and_tiny_models_are_adapted() -> None:
    options = dict(sample_size=8, patch_size=2, num_layers=1, caption_projection_dim=16, joint_attention_dim=8,
                   pooled_projection_dim=8, pos_embed_max_size=8)  # fmt: skip
    tiny = planned("SD3Transformer2DModel", num_attention_heads=2, attention_head_dim=4, **{
        **options, "caption_projection_dim": 8})  # fmt: skip
    assert {min(target.shape) for target in tiny.targets} == {8} and not tiny.skipped
    gated = planned("LTX2VideoTransformer3DModel", num_layers=1, gated_attn=True, num_attention_heads=2,
                    attention_head_dim=16, cross_attention_dim=32, audio_num_attention_heads=2,
                    audio_attention_head_dim=16, audio_cross_attention_dim=32, caption_channels=24,
                    preset="diffusers:attention")  # fmt: skip
    gates = {name: reason for name, reason in gated.skipped if "gate" in name}
    assert gates and set(gates.values()) == {"narrower than 16: a gate or a bias per head"}


@pytest.mark.parametrize("preset", ["attention", "backbone", "conv"])
def test_the_depth_of_a_model_does_not_change_how_often_it_is_walked(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[int] = []
    matrices = denoisers.matrices
    monkeypatch.setattr(denoisers, "matrices", lambda model: (walks.append(1), matrices(model))[1])
    counts = []
    for layers in (1, 3):
        walks.clear()
        planned("FluxTransformer2DModel", preset=f"diffusers:{preset}", **HEADS, num_layers=layers, num_single_layers=1,
                joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6))  # fmt: skip
        counts.append(len(walks))
    assert counts[0] == counts[1] > 0
