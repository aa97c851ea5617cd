"""How other tools read LoRA files: their key rules, written anew from the tools' sources, and the sums they compute.

Read on: ComfyUI of January 2026 (comfy/lora.py, comfy/utils.py, comfy/ldm), sd-scripts of February 2026
(networks/lora*.py), musubi-tuner of June 2026 (networks/, utils/lora_utils.py), LyCORIS of October 2025
(lycoris/wrapper.py).
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn


def updates_in(path: Path) -> dict[str, Tensor]:
    """Stem -> update (O, I...), as ComfyUI adds it up for the pairs of keys and the key ``.diff`` that it knows."""
    file = safetensors.torch.load_file(path)
    found = {}
    for stem in dict.fromkeys(re.sub(r"\.(lora_(A|B|up|down)\.weight|alpha|diff)$", "", key) for key in file):
        if f"{stem}.diff" in file:
            found[stem] = file.pop(f"{stem}.diff")
            continue
        names = ("lora_up", "lora_down") if f"{stem}.lora_up.weight" in file else ("lora_B", "lora_A")
        up, down = (file.pop(f"{stem}.{name}.weight").double() for name in names)
        alpha = file.pop(f"{stem}.alpha", torch.tensor(len(down)))
        product = up.flatten(1) @ down.flatten(1) * (alpha / len(down))
        found[stem] = product.reshape(len(up), *down.shape[1:])
    assert not file
    return found


def expand(pattern: str, blocks: int = 2) -> Iterator[str]:
    """Yield the names that a pattern stands for: ``{a,b}`` is a or b, ``#`` the number of a block."""
    parts = [part[1:-1].split(",") if part.startswith("{") else [part] for part in re.split(r"({[^}]*})", pattern)]
    for name in map("".join, itertools.product(*parts)):
        for numbers in itertools.product(range(blocks), repeat=name.count("#")):
            yield name.replace("#", "{}").format(*numbers)


def names(patterns: str, blocks: int = 2) -> list[str]:
    return [name for pattern in patterns.split() for name in expand(pattern, blocks)]


# ComfyUI's own modules that have a weight, of the families whose names it derives from them: `lora_unet_` and the path
# with underscores. sd-scripts and musubi-tuner derive the names in the same way, from modules of the same names.
_DOUBLE = "double_blocks.#.{img,txt}_attn.{qkv,proj} double_blocks.#.{img,txt}_mlp.{0,2} "
_FLUX = _DOUBLE + "single_blocks.#.{linear1,linear2} img_in txt_in final_layer.linear final_layer.adaLN_modulation.1 "
MODULES = {
    "flux": _FLUX + "double_blocks.#.{img,txt}_mod.lin single_blocks.#.modulation.lin "
    "{time,vector,guidance}_in.{in,out}_layer",
    "chroma": _FLUX + "distilled_guidance_layer.{in,out}_proj distilled_guidance_layer.layers.#.{in,out}_layer",
    "flux2": _FLUX + "{time,guidance}_in.{in,out}_layer double_stream_modulation_{img,txt}.lin "
    "single_stream_modulation.lin",
    "sd3": "joint_blocks.#.{x,context}_block.attn.{qkv,proj} joint_blocks.#.x_block.attn2.{qkv,proj} "
    "joint_blocks.#.{x,context}_block.mlp.{fc1,fc2} joint_blocks.#.{x,context}_block.adaLN_modulation.1 "
    "x_embedder.proj context_embedder {t,y}_embedder.mlp.{0,2} final_layer.linear final_layer.adaLN_modulation.1",
    "wan": "blocks.#.{self,cross}_attn.{q,k,v,o} blocks.#.cross_attn.{k,v}_img blocks.#.ffn.{0,2} patch_embedding "
    "{text,time}_embedding.{0,2} time_projection.1 head.head img_emb.proj.{1,3}",
    "lumina2": "{layers,noise_refiner,context_refiner}.#.attention.{qkv,out} "
    "{layers,noise_refiner,context_refiner}.#.feed_forward.{w1,w2,w3} {layers,noise_refiner}.#.adaLN_modulation.1 "
    "x_embedder t_embedder.mlp.{0,2} cap_embedder.1 final_layer.linear final_layer.adaLN_modulation.1",
    "qwen_image": "transformer_blocks.#.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out} "
    "transformer_blocks.#.{img,txt}_mlp.net.{0.proj,2} transformer_blocks.#.{img,txt}_mod.1 img_in txt_in proj_out "
    "norm_out.linear time_text_embed.timestep_embedder.linear_{1,2}",
}
# musubi-tuner's own modules of the two families that ComfyUI calls by other names.
MUSUBI = {
    "hunyuan_video": "double_blocks.#.{img,txt}_attn_{qkv,proj} double_blocks.#.{img,txt}_mlp.{fc1,fc2} "
    "double_blocks.#.{img,txt}_mod.linear single_blocks.#.{linear1,linear2} single_blocks.#.modulation.linear "
    "img_in.proj txt_in.input_embedder txt_in.t_embedder.mlp.{0,2} txt_in.c_embedder.linear_{1,2} "
    "txt_in.individual_token_refiner.blocks.#.self_attn_{qkv,proj} "
    "txt_in.individual_token_refiner.blocks.#.mlp.{fc1,fc2} "
    "txt_in.individual_token_refiner.blocks.#.adaLN_modulation.1 {time,guidance}_in.mlp.{0,2} "
    "vector_in.{in,out}_layer final_layer.linear final_layer.adaLN_modulation.1",
    "z_image": "{layers,noise_refiner,context_refiner}.#.attention.{to_q,to_k,to_v,to_out.0} "
    "{layers,noise_refiner,context_refiner}.#.feed_forward.{w1,w2,w3} {layers,noise_refiner}.#.adaLN_modulation.0 "
    "all_x_embedder.2-1 all_final_layer.2-1.{linear,adaLN_modulation.1} cap_embedder.1 t_embedder.mlp.{0,2}",
}


class Place(NamedTuple):
    """Where ComfyUI adds an update: a weight, the part of its rows (number, of how many), and whether it swaps halves.

    `rows` instead gives the first row and the count in units of the model's width.
    """

    weight: str
    rows: tuple[int, int] | None = None
    swapped: bool = False


def _split(ours: str, parts: str, theirs: str) -> dict[str, Place]:
    """Layers that are equal parts of one weight's rows, in this order."""
    return {f"{ours}.{part}": Place(theirs, (number, 1)) for number, part in enumerate(parts.split())}


def _renamed(ours: str, theirs: str, pairs: str) -> dict[str, Place]:
    return {
        f"{ours}.{a}".strip("."): Place(f"{theirs}.{b}".strip(".")) for a, b in (p.split("=") for p in pairs.split())
    }


def comfy_diffusers_names(family: str, blocks: int = 2) -> dict[str, Place]:
    """ComfyUI's tables of diffusers' names, whose keys start with ``transformer.``, for small models."""
    found: dict[str, Place] = {}
    times = "time_text_embed.timestep_embedder.linear_"
    texts = "time_text_embed.text_embedder.linear_"
    final = {"norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
             "proj_out": Place("final_layer.linear")}  # fmt: skip
    for i in range(blocks):
        block = f"transformer_blocks.{i}"
        if family == "flux":
            double, single, theirs = f"double_blocks.{i}", f"single_transformer_blocks.{i}", f"single_blocks.{i}"
            found |= _split(f"{block}.attn", "to_q to_k to_v", f"{double}.img_attn.qkv")
            found |= _split(f"{block}.attn", "add_q_proj add_k_proj add_v_proj", f"{double}.txt_attn.qkv")
            found |= _renamed(block, double, "attn.to_out.0=img_attn.proj attn.to_add_out=txt_attn.proj "
                              "norm1.linear=img_mod.lin norm1_context.linear=txt_mod.lin ff.net.0.proj=img_mlp.0 "
                              "ff.net.2=img_mlp.2 ff_context.net.0.proj=txt_mlp.0 "
                              "ff_context.net.2=txt_mlp.2")  # fmt: skip
            found |= _split(f"{single}.attn", "to_q to_k to_v", f"{theirs}.linear1")
            found[f"{single}.proj_mlp"] = Place(f"{theirs}.linear1", (3, 4))
            found |= _renamed(single, theirs, "norm.linear=modulation.lin proj_out=linear2")
        elif family == "sd3":
            x, context = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
            found |= _split(f"{block}.attn", "to_q to_k to_v", f"{x}.attn.qkv")
            found |= _split(f"{block}.attn2", "to_q to_k to_v", f"{x}.attn2.qkv")
            found |= _split(f"{block}.attn", "add_q_proj add_k_proj add_v_proj", f"{context}.attn.qkv")
            found |= _renamed(block, x, "attn.to_out.0=attn.proj attn2.to_out.0=attn2.proj ff.net.0.proj=mlp.fc1 "
                              "ff.net.2=mlp.fc2 norm1.linear=adaLN_modulation.1")  # fmt: skip
            found |= _renamed(block, context, "attn.to_add_out=attn.proj ff_context.net.0.proj=mlp.fc1 "
                              "ff_context.net.2=mlp.fc2 norm1_context.linear=adaLN_modulation.1")  # fmt: skip
            last = f"{context}.adaLN_modulation.1"
            found[f"{block}.norm1_context.linear"] = Place(last, swapped=i == blocks - 1)
        elif family == "pixart":
            theirs = f"blocks.{i}"
            found |= _split(f"{block}.attn1", "to_q to_k to_v", f"{theirs}.attn.qkv")
            found |= _split(f"{block}.attn2", "to_k to_v", f"{theirs}.cross_attn.kv_linear")
            found |= _renamed(block, theirs, "attn1.to_out.0=attn.proj attn2.to_q=cross_attn.q_linear "
                              "attn2.to_out.0=cross_attn.proj ff.net.0.proj=mlp.fc1 ff.net.2=mlp.fc2")  # fmt: skip
        elif family == "auraflow":
            joint, single = f"joint_transformer_blocks.{i}", f"single_transformer_blocks.{i}"
            found |= _renamed(joint, f"double_layers.{i}", "attn.to_q=attn.w2q attn.to_k=attn.w2k attn.to_v=attn.w2v "
                              "attn.to_out.0=attn.w2o attn.add_q_proj=attn.w1q attn.add_k_proj=attn.w1k "
                              "attn.add_v_proj=attn.w1v attn.to_add_out=attn.w1o ff.linear_1=mlpX.c_fc1 "
                              "ff.linear_2=mlpX.c_fc2 ff.out_projection=mlpX.c_proj ff_context.linear_1=mlpC.c_fc1 "
                              "ff_context.linear_2=mlpC.c_fc2 ff_context.out_projection=mlpC.c_proj "
                              "norm1.linear=modX.1 norm1_context.linear=modC.1")  # fmt: skip
            found |= _renamed(single, f"single_layers.{i}", "attn.to_q=attn.w1q attn.to_k=attn.w1k attn.to_v=attn.w1v "
                              "attn.to_out.0=attn.w1o norm1.linear=modCX.1 ff.linear_1=mlp.c_fc1 "
                              "ff.linear_2=mlp.c_fc2 ff.out_projection=mlp.c_proj")  # fmt: skip
        elif family == "z_image":
            for kind in ("layers", "noise_refiner", "context_refiner"):
                own = f"{kind}.{i}"
                found |= _split(f"{own}.attention", "to_q to_k to_v", f"{own}.attention.qkv")
                found |= _renamed(own, own, "attention.to_out.0=attention.out feed_forward.w1=feed_forward.w1 "
                                  "feed_forward.w2=feed_forward.w2 feed_forward.w3=feed_forward.w3 "
                                  "adaLN_modulation.0=adaLN_modulation.0")  # fmt: skip
    if family == "flux":
        found |= final | _renamed("", "", "x_embedder=img_in context_embedder=txt_in")
        guidance = "time_text_embed.guidance_embedder.linear_"
        for ours, theirs in ((times, "time_in"), (texts, "vector_in"), (guidance, "guidance_in")):
            found |= _renamed("", "", f"{ours}1={theirs}.in_layer {ours}2={theirs}.out_layer")
    elif family == "sd3":
        found |= final | _renamed("", "", "context_embedder=context_embedder pos_embed.proj=x_embedder.proj")
        for ours, theirs in ((times, "t_embedder"), (texts, "y_embedder")):
            found |= _renamed("", "", f"{ours}1={theirs}.mlp.0 {ours}2={theirs}.mlp.2")
    elif family == "pixart":
        found |= _renamed("", "", "pos_embed.proj=x_embedder.proj caption_projection.linear_1=y_embedder.y_proj.fc1 "
                          "caption_projection.linear_2=y_embedder.y_proj.fc2 adaln_single.linear=t_block.1 "
                          "adaln_single.emb.timestep_embedder.linear_1=t_embedder.mlp.0 "
                          "adaln_single.emb.timestep_embedder.linear_2=t_embedder.mlp.2 "
                          "proj_out=final_layer.linear")  # fmt: skip
    elif family == "auraflow":
        found |= _renamed("", "", "time_step_proj.linear_1=t_embedder.mlp.0 time_step_proj.linear_2=t_embedder.mlp.2 "
                          "context_embedder=cond_seq_linear pos_embed.proj=init_x_linear "
                          "proj_out=final_linear")  # fmt: skip
        found["norm_out.linear"] = Place("modF.1", swapped=True)
    elif family == "z_image":
        found |= _renamed("", "", "all_final_layer.2-1.linear=final_layer.linear all_x_embedder.2-1=x_embedder "
                          "all_final_layer.2-1.adaLN_modulation.1=final_layer.adaLN_modulation.1 "
                          "cap_embedder.1=cap_embedder.1 t_embedder.mlp.0=t_embedder.mlp.0 "
                          "t_embedder.mlp.2=t_embedder.mlp.2")  # fmt: skip
    elif family == "qwen_image":
        found = {name: Place(name) for name in names(MODULES[family], blocks)}
    return found


def add_up(updates: dict[str, Tensor], places: dict[str, Place], sizes: dict[str, int]) -> dict[str, Tensor]:
    """ComfyUI's sum: weight -> update of all its rows. `sizes`: weight -> number of rows."""
    found: dict[str, Tensor] = {}
    for stem, update in updates.items():
        weight, rows, swapped = places[stem]
        if swapped:
            update = torch.cat(update.chunk(2)[::-1])
        if rows is None:
            assert weight not in found
            found[weight] = update
            continue
        width = len(update) // rows[1]
        whole = found.setdefault(weight, update.new_zeros(sizes[weight], *update.shape[1:]))
        whole[width * rows[0] :][: len(update)] += update
    return found


_ATTENTIONS = "proj_in proj_out transformer_blocks.#.attn{1,2}.to_{q,k,v,out.0} transformer_blocks.#.ff.net.{0.proj,2}"
_RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3",
           "conv_shortcut": "skip_connection"}  # fmt: skip
_UNET_ROOT = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
              "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
              "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip


def comfy_unet_names(unet: nn.Module) -> dict[str, str]:
    """diffusers' path of every layer that ComfyUI knows -> path in the original U-Net."""
    config = unet.config  # type: ignore[attr-defined]
    count, layers = len(config["down_block_types"]), config["layers_per_block"]
    found = dict(_UNET_ROOT)

    def add(ours: str, number: int, side: str, transformer: bool) -> int:
        own = ours.replace("@", "resnets")
        found.update({f"{own}.{a}": f"{side}.{number}.0.{b}" for a, b in _RESNET.items()})
        if transformer:
            own = ours.replace("@", "attentions")
            found.update({f"{own}.{name}": f"{side}.{number}.1.{name}" for name in names(_ATTENTIONS, 4)})
        return 2 if transformer else 1

    for x, kind in enumerate(config["down_block_types"]):
        first = 1 + (layers + 1) * x
        for i in range(layers):
            add(f"down_blocks.{x}.@.{i}", first + i, "input_blocks", "Attn" in kind)
        found[f"down_blocks.{x}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
    for i, number in enumerate((0, 2)):
        found.update({f"mid_block.resnets.{i}.{a}": f"middle_block.{number}.{b}" for a, b in _RESNET.items()})
    found.update({f"mid_block.attentions.0.{name}": f"middle_block.1.{name}" for name in names(_ATTENTIONS, 4)})
    for x, kind in enumerate(config["up_block_types"]):
        for i in range(layers + 1):
            number = (layers + 1) * x + i
            position = add(f"up_blocks.{x}.@.{i}", number, "output_blocks", "Attn" in kind)
            if i == layers:
                found[f"up_blocks.{x}.upsamplers.0.conv"] = f"output_blocks.{number}.{position}.conv"
    assert count == len(config["up_block_types"])
    return found


def comfy_unet_stems(unet: nn.Module) -> dict[str, str]:
    """Stem of a file's key -> diffusers' path, for ComfyUI and a U-Net."""
    stems = {}
    for ours, theirs in comfy_unet_names(unet).items():
        stems |= {f"lora_unet_{theirs.replace('.', '_')}": ours, f"diffusion_model.{theirs}": ours}
        stems |= {f"{prefix}_{ours.replace('.', '_')}": ours for prefix in ("lora_unet", "lycoris")}
        processor = ours.replace(".to_", ".processor.to_").removesuffix(".0" if ours.endswith("to_out.0") else "")
        stems |= {processor: ours, f"unet.{processor}": ours}
    return stems


def comfy_text_stems(encoders: list[str]) -> dict[str, str]:
    """Stem of a file's key -> component and path, for ComfyUI and CLIP text encoders, in ComfyUI's names of them."""
    stems = {}
    layers = "encoder.layers.#.mlp.{fc1,fc2} encoder.layers.#.self_attn.{q,k,v,out}_proj"
    for component, encoder in zip(("text_encoder", "text_encoder_2"), encoders, strict=False):
        prefixes = {"clip_l": ("te", "te1"), "clip_h": ("te", "te1"), "clip_g": ("te2",)}[encoder]
        for name in names(layers):
            flat = name.replace(".", "_")
            stems |= {f"lora_{prefix}_text_model_{flat}": f"{component}.{name}" for prefix in prefixes}
            stems[f"{component}.text_model.{name}"] = f"{component}.{name}"
    return stems


def sd_scripts_unet_stems(unet: nn.Module) -> set[str]:
    """The stems that sd-scripts loads into a U-Net of SD 1 or 2, whose modules it calls as diffusers does."""
    owners = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
    return {
        f"lora_unet_{path}_{name}".replace(".", "_")
        for path, owner in unet.named_modules()
        if type(owner).__name__ in owners
        for name, layer in owner.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


def sd_scripts_sdxl_stem(stem: str) -> str:
    """The name into which sd-scripts turns a diffusers name, for SDXL: the first prefix that occurs is replaced."""
    pairs = []
    for i in range(3):
        for j in range(2):
            for part, own in (("resnets", 0), ("attentions", 1)):
                pairs.append((f"down_blocks_{i}_{part}_{j}", f"input_blocks_{3 * i + j + 1}_{own}"))
        for j in range(3):
            for part, own in (("resnets", 0), ("attentions", 1)):
                pairs.append((f"up_blocks_{i}_{part}_{j}", f"output_blocks_{3 * i + j}_{own}"))
        pairs.append((f"down_blocks_{i}_downsamplers_0_conv", f"input_blocks_{3 * (i + 1)}_0_op"))
        pairs.append((f"up_blocks_{i}_upsamplers_0", f"output_blocks_{3 * i + 2}_2"))
    pairs.append(("mid_block_attentions_0", "middle_block_1"))
    pairs += [(f"mid_block_resnets_{j}", f"middle_block_{2 * j}") for j in range(2)]
    for ours, theirs in pairs:
        if ours in stem:
            stem = stem.replace(ours, theirs)
            break
    if "blocks_" in stem or "middle_block" in stem:
        for ours, theirs in _RESNET.items():
            if stem.endswith(f"_0_{ours}") or re.search(rf"middle_block_[02]_{ours}$", stem):
                stem = stem.removesuffix(ours) + theirs.replace(".", "_")
    return stem


def lycoris_stems(model: nn.Module) -> dict[str, str]:
    """The stems that LyCORIS's `create_lycoris_from_weights` looks for -> path."""
    return {f"lycoris_{path}".replace(".", "_"): path for path, _ in model.named_modules()}
