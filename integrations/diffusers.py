"""diffusers: RandLoRA in any pipeline, and presets for its denoisers and text encoders.

    load_adapter(pipe, "adapter.safetensors")  # into the denoiser and the text encoders
    set_scales(pipe, 0.8)

To train, call ``inject(pipe.unet, RandLoRAConfig(rank=32, target_modules="diffusers:backbone"))`` (likewise for
``pipe.transformer``, and with ``"diffusers:text"`` for text encoders) and, at the end, ``save_adapter(pipe, path)``.

The presets follow one rule for all model families. In the blocks of a denoiser:

- ``diffusers:attention``: the attention weights.
- ``diffusers:backbone``: attention and MLP weights, including those stored as 1x1 convolutions (``proj_in`` and
  ``proj_out`` of Stable Diffusion 1.5, the MLPs of Sana).
- ``diffusers:conv``: ``diffusers:backbone`` plus the ungrouped convolutions of resnets and samplers, 1x1 and k x k.

In a text encoder (CLIP, T5 and others from transformers):

- ``diffusers:text``: the attention and MLP weights.

No preset includes embeddings of time, text or pixels, modulation layers, the last projection, or matrices that are too
narrow to be projections. The report lists, as skipped, narrow weights in the blocks and the weights of parts beside the
blocks that have layers of their own: refiners of text tokens inside an embedder, a motion encoder, an adapter of faces.

RandLoRA works together with diffusers' own LoRA: both effects are kept if ``load_lora_weights`` is called before or
after, and also with ``fuse_lora``, ``unfuse_lora`` and ``unload_lora_weights``, in any order. ``load_lora_weights``
freezes all parameters except its own: to continue training, call ``randlora_vision.set_active(pipe.unet, "default")``.

A scale for one call, ``{"scale": 0.5}`` in ``cross_attention_kwargs``, ``joint_attention_kwargs`` or
``attention_kwargs``, or ``lora_scale`` of ``encode_prompt``, holds for the adapters of a whole denoiser or text encoder
as it does for a LoRA. It multiplies their own scales and has no effect on fused adapters.

``pipe.save_pretrained`` writes attached adapters in a form that no pipeline loads, and warns: call `save_adapter`, or
`fuse` before saving, or `save_pipeline`, which writes the base and the adapter beside it. `swap_adapter` puts another
file in the place of an adapter, and a compiled denoiser is not compiled again; `scheduled` changes scales over the
denoising steps. ``ControlNetModel.from_unet`` and other functions that make a model from the weights of another
are refused while adapters are attached; after `fuse` they copy the adapted weights, and within `disabled` the base's.

Offloading whole models (``enable_model_cpu_offload``) works before and after. Enable layer-wise offloading
(``enable_sequential_cpu_offload``, ``enable_group_offload``) after the adapters are added. Call
``fuse_qkv_projections`` before: it copies weights and is refused if they are adapted. If a pipeline replaces adapted
weights later (a Control LoRA, unfused projections, processors of Custom Diffusion), the next call raises a ValueError
that names them.
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
from randlora_vision.integrations.pipelines.exchange import save_pipeline as save_pipeline
from randlora_vision.integrations.pipelines.exchange import swap_adapter as swap_adapter
from randlora_vision.integrations.pipelines.schedule import scheduled as scheduled
from randlora_vision.integrations.presets.denoisers import (
    attention_targets,
    backbone_targets,
    conv_targets,
    skipped_targets,
    text_targets,
)

PRESETS: Mapping[str, Callable[[nn.Module], list[str]]] = {
    "attention": attention_targets,
    "backbone": backbone_targets,
    "conv": conv_targets,
    "text": text_targets,
}
SKIPPED = skipped_targets
save_merged = _merged.save_merged_folder
