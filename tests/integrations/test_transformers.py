"""The presets for models of transformers, from injection to the saved, reloaded and merged model, and generation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from randlora_vision import (
    RandLoRAConfig,
    check_gradients,
    inject,
    load_adapter,
    merge,
    plan,
    remove,
    save_adapter,
)
from randlora_vision.integrations.transformers import PRESETS, language_targets, projector_targets
from tests.helpers import dense_model, randomize
from tests.transformers_models import EXAMPLES, TEXT, VISION, make, words


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_preset_chooses_live_weights(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    model = example.build()
    for parameter in model.parameters():  # a frozen model may take another attention kernel
        parameter.requires_grad_(False)
    before = example.loss(model).item()
    counts, targets = {}, []
    for preset in PRESETS:
        if preset in example.presets:
            found = plan(model, RandLoRAConfig(rank=4, target_modules=f"transformers:{preset}")).targets
            counts[preset] = len(found)
            targets += [target.name for target in found]
        else:
            with pytest.raises(ValueError, match=f"transformers:{preset}: this .* has no .*; use transformers:"):
                PRESETS[preset](model)
    assert counts == example.presets
    assert len(set(targets)) == len(targets) and not any("embed" in name or "lm_head" in name for name in targets)
    report = inject(model, RandLoRAConfig(rank=4, target_modules=targets))
    loss = example.loss(model)
    assert loss.item() == before
    loss.backward()
    assert not [note for note in check_gradients(model) if note.startswith("no gradient")]
    randomize(model)
    adapted = example.loss(model).item()
    assert adapted != before
    path = save_adapter(model, tmp_path / "adapter.safetensors")
    again = example.build()
    load_adapter(again, path)
    assert example.loss(again).item() == pytest.approx(adapted, rel=1e-6)
    merge(again)
    remove(again)
    assert example.loss(again).item() == pytest.approx(adapted, rel=1e-4)
    if name in ("vit", "llava"):  # the paper's formula in float64, by hand
        state = {key: value.double() if value.is_floating_point() else value for key, value in example.batch().items()}
        truth = dense_model(example.build(), model, report)
        assert truth(**state).loss.item() == pytest.approx(adapted, rel=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "smolvlm", "paligemma", "gpt2"])
def test_generation_sees_the_adapter_and_the_merged_weights(name: str) -> None:
    example = EXAMPLES[name]
    model = example.build()
    inputs = {key: value for key, value in example.batch().items() if key != "labels"}
    options = dict(
        max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )

    def logits() -> torch.Tensor:
        return torch.stack(model.generate(**inputs, **options).logits)

    base = logits()
    inject(model, RandLoRAConfig(rank=4, target_modules="transformers:language"))
    torch.testing.assert_close(logits(), base)
    randomize(model)
    adapted = logits()
    assert (adapted - base).abs().max() > 1e-2
    merge(model)
    torch.testing.assert_close(logits(), adapted, atol=1e-4, rtol=1e-4)


def test_presets_can_be_joined_and_exclude_one_another() -> None:
    model = EXAMPLES["smolvlm"].build()
    both = language_targets(model) + projector_targets(model)
    assert len(inject(model, RandLoRAConfig(rank=4, target_modules=both)).targets) == 15


@pytest.mark.parametrize(("setting", "skipped"), [(-2, {1}), (-1, set()), ([-3, -1], set()), (1, {1}), ([0], {0, 1})])
def test_layers_behind_the_chosen_features_are_skipped(setting: object, skipped: set[int]) -> None:
    model = EXAMPLES["llava"].build()
    model.config.vision_feature_layer = setting
    targets = "all-linear" if setting != 1 else ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    report = plan(model, RandLoRAConfig(rank=4, target_modules=targets))
    numbers = {int(re.search(r"layers\.(\d)", name)[1]) for name, reason in report.skipped if "is not used" in reason}
    assert numbers == skipped and len(report.skipped) >= 6 * len(skipped)
    assert f"vision_feature_layer={setting}" in str(report) or not skipped


def test_a_layer_that_is_said_to_be_unused_gets_no_gradient() -> None:
    example = EXAMPLES["llava"]
    model = example.build()
    skipped = [n for n, r in plan(model, RandLoRAConfig(rank=4)).skipped if "is not used" in r]
    example.loss(model).backward()
    grads = dict(model.named_parameters())
    assert len(skipped) == 6 and all(grads[f"{name}.weight"].grad is None for name in skipped)
    assert grads["model.vision_tower.encoder.layers.0.mlp.fc1.weight"].grad is not None


def test_towers_are_found_by_configuration_whatever_their_names() -> None:
    import transformers

    vision, text = transformers.ViTConfig(**VISION), transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2)
    captioner = transformers.VisionEncoderDecoderModel(
        transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    )
    assert {name.split(".")[0] for name in PRESETS["vision"](captioner)} == {"encoder"}
    assert {name.split(".")[0] for name in PRESETS["language"](captioner)} == {"decoder"}
    dual = transformers.VisionTextDualEncoderModel(
        transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, transformers.BertConfig(**TEXT))
    )
    assert PRESETS["projector"](dual) == ["visual_projection", "text_projection"]
    assert len(PRESETS["text"](dual)) == 12
    t5 = make("T5EncoderModel", "T5Config", vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)()
    assert len(PRESETS["text"](t5)) == 12


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="need a model of transformers, got Linear; for other models, list the"):
        inject(nn.Linear(32, 32), RandLoRAConfig(rank=4, target_modules="transformers:vision"))


def test_the_labels_leave_images_out() -> None:
    batch = words(2, 4)
    assert (batch["labels"][:, :4] == -100).all() and batch["input_ids"].shape == (2, 10)
