"""diffusers: RandLoRA in any pipeline, and presets for its denoisers and text encoders.

    load_adapter(pipe, "adapter.safetensors")  # the parts of the denoiser and the text encoders, each in its place
    set_scales(pipe, 0.8)

To train: ``inject(pipe.unet, RandLoRAConfig(rank=32, target_modules="diffusers:backbone"))``, likewise
``pipe.transformer`` and ``"diffusers:text"`` for text encoders, and at the end ``save_adapter(pipe, path)``.

The presets follow one rule, whatever the family is called. Of a denoiser's blocks:

- ``diffusers:attention``: the attention weights.
- ``diffusers:backbone``: attention and MLP weights, also where they are 1x1 convolutions (Stable Diffusion 1.5's
  ``proj_in`` and ``proj_out``, Sana's MLPs).
- ``diffusers:conv``: as ``diffusers:backbone``, with the ungrouped convolutions of resnets and samplers, 1x1 and k x k.
- ``diffusers:text``: of a text encoder (CLIP, T5 and others of transformers), the attention and MLP weights.

None takes embeddings of time, text or pixels, modulation, the last projection, or a matrix too narrow to be one.

All of it lives beside diffusers' own LoRA: ``load_lora_weights`` before or after keeps both effects, and so do
``fuse_lora``, ``unfuse_lora`` and ``unload_lora_weights``, in any order. ``load_lora_weights`` freezes what is not its
own: to go on training, ``randlora_vision.set_active(pipe.unet, "default")``.

Offloading by whole models (``enable_model_cpu_offload``) works before and after. Offloading layer by layer
(``enable_sequential_cpu_offload``, ``enable_group_offload``) comes after the adapters. ``fuse_qkv_projections`` comes
before them: it copies weights, and is refused on adapted ones.
"""

from collections.abc import Callable, Mapping

from torch import nn

from randlora_vision.integrations.export import merged as _merged
from randlora_vision.integrations.export.lora import export_lora as export_lora
from randlora_vision.integrations.pipelines.adapter_files import load_adapter as load_adapter
from randlora_vision.integrations.pipelines.adapter_files import save_adapter as save_adapter
from randlora_vision.integrations.pipelines.control import delete_adapter as delete_adapter
from randlora_vision.integrations.pipelines.control import disabled as disabled
from randlora_vision.integrations.pipelines.control import fuse as fuse
from randlora_vision.integrations.pipelines.control import list_adapters as list_adapters
from randlora_vision.integrations.pipelines.control import set_scales as set_scales
from randlora_vision.integrations.pipelines.control import unfuse as unfuse
from randlora_vision.integrations.presets.denoisers import (
    attention_targets,
    backbone_targets,
    conv_targets,
    text_targets,
)

PRESETS: Mapping[str, Callable[[nn.Module], list[str]]] = {
    "attention": attention_targets,
    "backbone": backbone_targets,
    "conv": conv_targets,
    "text": text_targets,
}
save_merged = _merged.save_merged_folder
