"""Exported files, read by the key rules of other tools: every layer is found, and the sum is the merged model.

Original weights are compared in diffusers' layout, into which diffusers' own single-file converters turn them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, inject
from randlora_vision.integrations.export.lora import export_lora
from tests import lora_readers as readers
from tests.helpers import randomize
from tests.tiny_pipelines import PIPELINES
from tests.zoo.base import unmute
from tests.zoo.from_diffusers import ENTRIES

pytestmark = pytest.mark.filterwarnings("ignore:.*FluxPosEmbed.* is deprecated:FutureWarning")
ALL = RandLoRAConfig(rank=8, target_modules="all")
# Their converters know the widths of the published models only.
PUBLISHED_WIDTHS = ((3072, 3072, 3072, 12288), (2304, 768, 768))
CONVERTERS = {
    "flux": converters.convert_flux_transformer_checkpoint_to_diffusers,
    "chroma": converters.convert_chroma_transformer_checkpoint_to_diffusers,
    "flux2": converters.convert_flux2_transformer_checkpoint_to_diffusers,
    "sd3": converters.convert_sd3_transformer_checkpoint_to_diffusers,
    "hunyuan_video": converters.convert_hunyuan_video_transformer_to_diffusers,
    "wan": converters.convert_wan_transformer_to_diffusers,
    "lumina2": converters.convert_lumina2_to_diffusers,
    "auraflow": converters.convert_auraflow_transformer_checkpoint_to_diffusers,
    "z_image": converters.convert_z_image_transformer_checkpoint_to_diffusers,
    "qwen_image": lambda checkpoint: checkpoint,
}


def build(family: str) -> nn.Module:
    import diffusers

    heads = dict(num_attention_heads=2, attention_head_dim=16)
    more: dict[str, Callable[[], nn.Module]] = {
        "hunyuan_video": lambda: diffusers.HunyuanVideoTransformer3DModel(
            **heads, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1,
            text_embed_dim=12, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6)),
        "flux2": lambda: diffusers.Flux2Transformer2DModel(
            **heads, in_channels=8, num_layers=1, num_single_layers=1, joint_attention_dim=12,
            timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4)),
        "lumina2": lambda: diffusers.Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=48, num_layers=1, num_refiner_layers=1, num_attention_heads=3,
            num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 6, 6), axes_lens=(16, 16, 16), cap_feat_dim=12),
        "z_image": lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
            axes_dims=[4, 6, 6], axes_lens=[16, 16, 16]),
    }  # fmt: skip
    if family not in more:
        (entry,) = (entry for entry in ENTRIES if entry.name == f"diffusers/{family}")
        return entry.build()
    torch.manual_seed(0)
    return more[family]().eval()


def adapted(model: nn.Module) -> dict[str, Tensor]:
    """Adapt every layer, and return the path of a layer -> merged weight minus base weight."""
    report = inject(model, ALL)
    randomize(model)
    layers = {target.name.removesuffix(".weight"): target for target in report.targets}
    found = {path: model.get_submodule(path) for path in layers}
    return {path: (layer.weight - layer.base_weight()).detach().double() for path, layer in found.items()}


class Zeros(dict[str, Tensor]):
    """A checkpoint in which what is missing is zero."""

    def pop(self, key: str, *default: Any) -> Tensor:
        return super().pop(key, torch.zeros(840))


def in_diffusers_layout(family: str, original: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    split = torch.split

    def scaled(tensor: Tensor, sizes: Any, dim: int = 0) -> Any:
        known = next((widths for widths in PUBLISHED_WIDTHS if widths[0] == sizes[0]), None)
        if known is not None:
            sizes = [len(tensor) * width // sum(known) for width in known]
        return split(tensor, sizes, dim)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "split", scaled)
        converted = CONVERTERS[family](Zeros({f"{name}.weight": tensor for name, tensor in original.items()}))
    return {key.removesuffix(".weight"): tensor for key, tensor in converted.items() if key.endswith(".weight")}


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The updates found are the expected ones, and zero elsewhere."""
    assert len(expected) > 5
    for path, delta in expected.items():
        torch.testing.assert_close(found.pop(path).double(), delta, atol=1e-4, rtol=1e-3)
    assert not any(tensor.any() for tensor in found.values())


@pytest.mark.parametrize("family", [*readers.MODULES, *readers.MUSUBI])
def test_kohya_names_are_the_tools_own(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    expected = adapted(model)
    export_lora(model, tmp_path / "kohya.safetensors", energy=1.0, format="kohya")
    modules = readers.names((readers.MODULES | readers.MUSUBI)[family])
    by_stem = {f"lora_unet_{name.replace('.', '_')}": name for name in modules}
    read = {by_stem[stem]: update for stem, update in readers.updates_in(tmp_path / "kohya.safetensors").items()}
    if family == "z_image":  # musubi-tuner's modules are those of diffusers
        return check(read, expected)
    check(in_diffusers_layout(family, read, monkeypatch), expected)


@pytest.mark.parametrize("family", ["flux", "sd3", "auraflow", "z_image", "qwen_image", "pixart"])
def test_comfyui_reads_diffusers_names(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    depth = {"sd3": 2, "pixart": 2, "qwen_image": 2}.get(family, 1)
    expected = adapted(model)
    export_lora(model, tmp_path / "lora.safetensors", energy=1.0)
    updates = {
        stem.removeprefix("transformer."): update
        for stem, update in readers.updates_in(tmp_path / "lora.safetensors").items()
    }
    places = readers.comfy_diffusers_names(family, depth)
    sizes: dict[str, int] = {}
    for path, place in places.items():
        sizes[place.weight] = sizes.get(place.weight, 0) + len(updates.get(path, ()))
    read = readers.add_up(updates, places, sizes)
    if family == "pixart":  # has no converter
        stacks = {name: [p for p in places if places[p].weight == name and p in expected] for name in sizes}
        return check(read, {name: torch.cat([expected[p] for p in parts]) for name, parts in stacks.items() if parts})
    check(in_diffusers_layout(family, read, monkeypatch), expected)


def unet(kind: str) -> nn.Module:
    """A U-Net with the blocks of the published ones."""
    from diffusers import UNet2DConditionModel

    attention, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    options: dict[str, Any] = dict(sample_size=8, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4)
    if kind == "sd15":
        down = (attention,) * 3 + (plain,)
        options |= dict(block_out_channels=(8,) * 4, attention_head_dim=2)
    else:
        down = (plain, attention, attention)
        options |= dict(block_out_channels=(8,) * 3, transformer_layers_per_block=(1, 1, 2), use_linear_projection=True,
                        addition_embed_type="text_time", addition_time_embed_dim=4,
                        projection_class_embeddings_input_dim=32)  # fmt: skip
    up = tuple(name.replace("Down", "Up") for name in reversed(down))
    torch.manual_seed(0)
    model = UNet2DConditionModel(down_block_types=down, up_block_types=up, **options)
    unmute(model)
    return model


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("format", ["kohya", "lycoris"])
def test_comfyui_finds_every_layer_of_a_unet(kind: str, format: str, tmp_path: Path) -> None:
    model = unet(kind)
    expected = adapted(model)
    size = {} if format == "lycoris" else {"energy": 1.0}
    export_lora(model, tmp_path / "lora.safetensors", format=format, **size)
    stems = readers.comfy_unet_stems(model)
    read = {stems[stem]: update for stem, update in readers.updates_in(tmp_path / "lora.safetensors").items()}
    check(read, expected)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_sd_scripts_finds_the_layers_in_the_blocks_of_a_unet(kind: str, tmp_path: Path) -> None:
    model = unet(kind)
    inject(model, ALL)
    randomize(model)
    export_lora(model, tmp_path / "kohya.safetensors", rank=1, format="kohya")
    stems = set(readers.updates_in(tmp_path / "kohya.safetensors"))
    outside = {stem for stem in stems if "block" not in stem}
    assert {stem.removeprefix("lora_unet_").partition("_")[0] for stem in outside} <= {"conv", "time", "label"}
    if kind == "sd15":
        assert stems - outside <= readers.sd_scripts_unet_stems(model)
    else:
        originals = {f"lora_unet_{name.replace('.', '_')}" for name in readers.comfy_unet_names(model).values()}
        assert {readers.sd_scripts_sdxl_stem(stem) for stem in stems - outside} <= originals


@pytest.mark.parametrize("format", ["diffusers", "kohya", "lycoris"])
@pytest.mark.parametrize(
    "kind, encoders",
    [("sd15", ["clip_l"]), ("sdxl", ["clip_l", "clip_g"]), ("sd3", ["clip_l", "clip_g"]), ("flux", ["clip_l"])],
)
def test_comfyui_finds_every_layer_of_the_text_encoders(
    kind: str, encoders: list[str], format: str, tmp_path: Path
) -> None:
    pipe = PIPELINES[kind]()
    expected = {}
    for component in ("text_encoder", "text_encoder_2")[: len(encoders)]:
        model = getattr(pipe, component)
        inject(model, RandLoRAConfig(rank=8, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]))
        randomize(model)
        for path, layer in model.named_modules():
            if path.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"):
                name = f"{component}.{path.removeprefix('text_model.')}"
                expected[name] = (layer.weight - layer.base_weight()).detach().double()
    size = {} if format == "lycoris" else {"energy": 1.0}
    export_lora(pipe, tmp_path / "lora.safetensors", format=format, **size)
    stems = readers.comfy_text_stems(encoders)
    found = readers.updates_in(tmp_path / "lora.safetensors")
    if format == "kohya":  # sd-scripts numbers the encoders, except where there is one in the first place
        numbered = ["lora_te"] if kind == "sd15" else ["lora_te1", "lora_te2"][: len(encoders)]
        assert {stem.partition("_text_model")[0] for stem in found} == set(numbered)
    check({stems[stem]: update for stem, update in found.items()}, expected)


@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_lycoris_finds_every_layer_of_other_models(family: str, tmp_path: Path) -> None:
    model = build(family)
    expected = adapted(model)
    export_lora(model, tmp_path / "full.safetensors", format="lycoris")
    stems = readers.lycoris_stems(model)
    check({stems[s]: update for s, update in readers.updates_in(tmp_path / "full.safetensors").items()}, expected)
