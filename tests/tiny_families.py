"""Tiny pipelines, with random weights, of the families beyond those in tests/tiny_pipelines.py.

Real classes of diffusers with text encoders of transformers' real classes, or of a class that the pipeline calls in the
same way (a T5 for UMT5, a Qwen2 for the text part of Qwen2.5-VL), and one tokenizer for all of them.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.tiny_pipelines import (
    CLIP_WIDTH,
    CONTEXT,
    FLUX,
    LATENTS,
    NOISE,
    SD15,
    SDXL,
    WORDS,
    built,
    clip_text,
    clip_tokenizer,
    copied,
    flux,
    sd15,
    sdxl,
    t5,
    t5_tokenizer,
    vae,
)

WIDTH, T5_WIDTH = 16, 24
# The prompts before prompts, as words, so that they are short.
_WORDS = (
    *WORDS,
    *"You are an assistant designed to generate superior images with the degree of based on text".split(),
    *"<Prompt Start> image-text alignment textual prompts or user Describe image by detailing color".split(),
)
_CHAT = """{% for message in messages %}{% if message['role'] == 'user' %}{% if message['content'] is string %}\
{{ message['content'] }}{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}\
{% endif %}{% endfor %}"""

# fmt: off
HEADS = dict(num_attention_heads=2, attention_head_dim=16)
SAME = dict(in_channels=LATENTS, out_channels=LATENTS)
SHIFTED = dict(shift=3.0)
DYNAMIC = dict(shift=3.0, use_dynamic_shifting=True)
# fmt: on


@copied
def flux2() -> Any:
    """A Flux2Pipeline: 30 layers in the text encoder, because the pipeline takes the tenth, twentieth and thirtieth."""
    from diffusers import Flux2Pipeline
    from transformers import MistralConfig, MistralForCausalLM

    return built(lambda: Flux2Pipeline(**_flux2(_language(MistralConfig, MistralForCausalLM, 30), guidance=True)))


@copied
def flux2_klein() -> Any:
    """A Flux2KleinPipeline, not distilled: layers 9, 18 and 27 of the text encoder."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    text = _language(Qwen3Config, Qwen3ForCausalLM, 27, head_dim=8)
    return built(lambda: Flux2KleinPipeline(**_flux2(text, guidance=False)))


def _flux2(text: Any, guidance: bool) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    latents = vae(kind=AutoencoderKLFlux2)
    latents.bn.running_mean.uniform_(-1, 1)
    latents.bn.running_var.uniform_(0.5, 2)
    return dict(
        scheduler=_flow(**DYNAMIC),
        vae=latents,
        text_encoder=text,
        tokenizer=_tokenizer(),
        transformer=Flux2Transformer2DModel(
            **HEADS,
            in_channels=4 * LATENTS,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=3 * WIDTH,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance,
        ),
    )


@copied
def qwen_image() -> Any:
    """A QwenImagePipeline."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return built(
        lambda: QwenImagePipeline(
            scheduler=_flow(**DYNAMIC),
            vae=AutoencoderKLQwenImage(**_VIDEO_VAE),
            text_encoder=_language(Qwen2Config, Qwen2ForCausalLM),
            tokenizer=_tokenizer(),
            transformer=QwenImageTransformer2DModel(
                **HEADS,
                in_channels=4 * LATENTS,
                out_channels=LATENTS,
                num_layers=1,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(4, 6, 6),
            ),
        )
    )


@copied
def z_image() -> Any:
    """A ZImagePipeline."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return built(
        lambda: ZImagePipeline(
            scheduler=_flow(**SHIFTED),
            vae=vae(**_SHIFTED_VAE),
            text_encoder=_language(Qwen3Config, Qwen3ForCausalLM, head_dim=8),
            tokenizer=_tokenizer(),
            transformer=ZImageTransformer2DModel(
                in_channels=LATENTS,
                dim=32,
                n_layers=1,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=WIDTH,
                axes_dims=[4, 6, 6],
                axes_lens=[128, 16, 16],
            ),
        )
    )


@copied
def sana() -> Any:
    """A SanaPipeline with the solver of its published weights."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    return built(
        lambda: SanaPipeline(
            tokenizer=_tokenizer(),
            text_encoder=_gemma(),
            vae=AutoencoderDC(
                latent_channels=LATENTS,
                attention_head_dim=8,
                encoder_block_out_channels=(8, 16),
                decoder_block_out_channels=(8, 16),
                encoder_layers_per_block=(1, 1),
                decoder_layers_per_block=(1, 1),
                encoder_qkv_multiscales=((), ()),
                decoder_qkv_multiscales=((), ()),
                scaling_factor=0.4,
            ),
            transformer=SanaTransformer2DModel(
                **HEADS,
                **SAME,
                num_layers=1,
                num_cross_attention_heads=2,
                cross_attention_head_dim=16,
                cross_attention_dim=32,
                caption_channels=WIDTH,
                sample_size=16,
                timestep_scale=0.5,
            ),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
    )


@copied
def pixart_sigma() -> Any:
    """A PixArtSigmaPipeline that predicts a variance too."""
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    return built(
        lambda: PixArtSigmaPipeline(
            tokenizer=_tokenizer(),
            text_encoder=t5(T5_WIDTH, _tokenizer()),
            vae=vae(scaling_factor=0.13025),
            transformer=PixArtTransformer2DModel(
                **HEADS,
                in_channels=LATENTS,
                out_channels=2 * LATENTS,
                num_layers=1,
                sample_size=32,
                cross_attention_dim=32,
                caption_channels=T5_WIDTH,
                use_additional_conditions=False,
            ),
            scheduler=DDIMScheduler(**NOISE),
        )
    )


@copied
def lumina2() -> Any:
    """A Lumina2Pipeline, which fixes the scale of its VAE at 8."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    return built(
        lambda: Lumina2Pipeline(
            transformer=Lumina2Transformer2DModel(
                sample_size=8,
                in_channels=LATENTS,
                hidden_size=32,
                num_layers=1,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=8,
                axes_dim_rope=(4, 6, 6),
                axes_lens=(128, 16, 16),
                cap_feat_dim=WIDTH,
            ),
            scheduler=_flow(**SHIFTED),
            vae=vae(levels=4, **_SHIFTED_VAE),
            text_encoder=_gemma(),
            tokenizer=_tokenizer(),
        )
    )


@copied
def chroma() -> Any:
    """A ChromaPipeline."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    return built(
        lambda: ChromaPipeline(
            scheduler=_flow(**SHIFTED),
            vae=vae(**_SHIFTED_VAE),
            text_encoder=t5(T5_WIDTH, _tokenizer()),
            tokenizer=_tokenizer(),
            transformer=ChromaTransformer2DModel(
                **HEADS,
                in_channels=4 * LATENTS,
                num_layers=1,
                num_single_layers=1,
                joint_attention_dim=T5_WIDTH,
                axes_dims_rope=(4, 6, 6),
                approximator_num_channels=16,
                approximator_hidden_dim=32,
                approximator_layers=1,
            ),
        )
    )


@copied
def aura_flow() -> Any:
    """An AuraFlowPipeline."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    return built(
        lambda: AuraFlowPipeline(
            tokenizer=_tokenizer(),
            text_encoder=t5(T5_WIDTH, _tokenizer()),
            vae=vae(scaling_factor=0.13025),
            transformer=AuraFlowTransformer2DModel(
                **HEADS,
                sample_size=8,
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                joint_attention_dim=T5_WIDTH,
                caption_projection_dim=32,
                pos_embed_max_size=64,
            ),
            scheduler=_flow(shift=1.73),
        )
    )


@copied
def hunyuan_dit() -> Any:
    """A HunyuanDiTPipeline, which computes positions for a VAE of scale 8."""
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel

    vocabulary = dict(vocab_size=len(_tokenizer()), max_position_embeddings=77)
    bert = dict(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return built(
        lambda: HunyuanDiTPipeline(
            vae=vae(levels=4, scaling_factor=0.13025),
            text_encoder=BertModel(BertConfig(**vocabulary, **bert)).eval(),
            tokenizer=_tokenizer(),
            transformer=HunyuanDiT2DModel(
                **HEADS,
                in_channels=LATENTS,
                patch_size=2,
                sample_size=8,
                hidden_size=32,
                num_layers=2,
                cross_attention_dim=WIDTH,
                cross_attention_dim_t5=T5_WIDTH,
                pooled_projection_dim=20,
                text_len=77,
                text_len_t5=256,
            ),
            scheduler=DDPMScheduler(**{**NOISE, "prediction_type": "v_prediction"}),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            text_encoder_2=t5(T5_WIDTH, _tokenizer()),
            tokenizer_2=_tokenizer(),
        )
    )


@copied
def wan() -> Any:
    """A WanPipeline of version 2.1, with the solver of its published weights."""
    return built(lambda: _wan(dict(_VIDEO_VAE, scale_factor_temporal=2, scale_factor_spatial=2)))


@copied
def wan_experts() -> Any:
    """A WanPipeline of version 2.2 A14B: two transformers, with a boundary that two steps of sampling pass."""
    return built(lambda: _wan(dict(_VIDEO_VAE, scale_factor_temporal=2, scale_factor_spatial=2), boundary_ratio=0.875))


@copied
def wan_5b() -> Any:
    """A WanPipeline of version 2.2 TI2V-5B: a timestep per token, and a VAE with patches and residual blocks."""
    residual = dict(is_residual=True, patch_size=2, in_channels=12, out_channels=12, decoder_base_dim=8)
    sizes = dict(dim_mult=[1, 2, 2], temperal_downsample=[False, True], scale_factor_temporal=2, scale_factor_spatial=8)
    return built(lambda: _wan({**_VIDEO_VAE, **residual, **sizes}, expand_timesteps=True))


def _wan(vae: dict[str, Any], **settings: Any) -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    def transformer() -> Any:
        texts = dict(text_dim=T5_WIDTH, freq_dim=16, ffn_dim=48)
        return WanTransformer3DModel(**HEADS, **SAME, **texts, num_layers=1, rope_max_seq_len=16)

    if "boundary_ratio" in settings:
        settings["transformer_2"] = transformer()
    return WanPipeline(
        tokenizer=_tokenizer(),
        text_encoder=t5(T5_WIDTH, _tokenizer()),
        vae=AutoencoderKLWan(**vae),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer(),
        **settings,
    )


@copied
def ltx() -> Any:
    """An LTXPipeline."""
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    def make() -> Any:
        scaling = ("spatio_temporal_scaling", "decoder_spatio_temporal_scaling")
        sizes = dict.fromkeys(("block_out_channels", "decoder_block_out_channels"), (8,) * 4)
        layers = dict.fromkeys(("layers_per_block", "decoder_layers_per_block"), (1,) * 5)
        latents = AutoencoderKLLTXVideo(
            **dict.fromkeys(scaling, (True, True, False, False)),
            **sizes,
            **layers,
            latent_channels=2 * LATENTS,
            patch_size=1,
            scaling_factor=0.5,
        )
        latents.latents_mean.uniform_(-1, 1)
        latents.latents_std.uniform_(0.5, 2)
        return LTXPipeline(
            scheduler=_flow(**DYNAMIC),
            vae=latents,
            text_encoder=t5(T5_WIDTH, _tokenizer()),
            tokenizer=_tokenizer(),
            transformer=LTXVideoTransformer3DModel(
                **HEADS,
                in_channels=2 * LATENTS,
                out_channels=2 * LATENTS,
                cross_attention_dim=32,
                num_layers=1,
                caption_channels=T5_WIDTH,
            ),
        )

    return built(make)


@copied
def hidream() -> Any:
    """A HiDreamImagePipeline."""
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel
    from transformers import LlamaConfig, LlamaForCausalLM

    return built(
        lambda: HiDreamImagePipeline(
            scheduler=_flow(**SHIFTED),
            vae=vae(**_SHIFTED_VAE),
            text_encoder=clip_text(projected=True, context=64),
            tokenizer=clip_tokenizer(64),
            text_encoder_2=clip_text(projected=True, context=64),
            tokenizer_2=clip_tokenizer(64),
            text_encoder_3=t5(T5_WIDTH, _tokenizer()),
            tokenizer_3=_tokenizer(),
            text_encoder_4=_language(LlamaConfig, LlamaForCausalLM),
            tokenizer_4=_tokenizer(),
            transformer=HiDreamImageTransformer2DModel(
                **HEADS,
                **SAME,
                patch_size=2,
                num_layers=1,
                num_single_layers=1,
                caption_channels=[T5_WIDTH, WIDTH],
                text_emb_dim=2 * CLIP_WIDTH,
                num_routed_experts=2,
                num_activated_experts=1,
                axes_dims_rope=(4, 6, 6),
                max_resolution=(16, 16),
                llama_layers=[0, 1],
            ),
        )
    )


@copied
def sd_inpaint() -> Any:
    """A StableDiffusionInpaintPipeline."""
    from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel

    return _like(sd15, StableDiffusionInpaintPipeline, UNet2DConditionModel, SD15, in_channels=2 * LATENTS + 1)


@copied
def sdxl_inpaint() -> Any:
    """A StableDiffusionXLInpaintPipeline."""
    from diffusers import StableDiffusionXLInpaintPipeline, UNet2DConditionModel

    return _like(sdxl, StableDiffusionXLInpaintPipeline, UNet2DConditionModel, SDXL, in_channels=2 * LATENTS + 1)


@copied
def flux_fill() -> Any:
    """A FluxFillPipeline: a mask of 2 x 2 pixels for each place of the latents."""
    from diffusers import FluxFillPipeline, FluxTransformer2DModel

    channels = dict(in_channels=4 * (2 * LATENTS + 4), out_channels=4 * LATENTS)
    return _like(flux, FluxFillPipeline, FluxTransformer2DModel, FLUX, **channels)


@copied
def flux_kontext() -> Any:
    """A FluxKontextPipeline."""
    from diffusers import FluxKontextPipeline, FluxTransformer2DModel

    return _like(flux, FluxKontextPipeline, FluxTransformer2DModel, FLUX)


@copied
def qwen_image_edit(plus: bool = False) -> Any:
    """A QwenImageEditPipeline, whose text encoder sees images: use it within `small_edits`."""
    from diffusers import (
        AutoencoderKLQwenImage,
        QwenImageEditPipeline,
        QwenImageEditPlusPipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = _tokenizer()
    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer.add_tokens([*marks], special_tokens=True)
    tokenizer.image_token, tokenizer.video_token = marks[:2]
    image, video, start, end = tokenizer.convert_tokens_to_ids([*marks])
    sizes = dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH)
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            sizes,
            vocab_size=len(tokenizer),
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters=rope,
            bos_token_id=0,
            eos_token_id=1,
        ),
        vision_config=dict(
            sizes,
            depth=1,
            num_heads=2,
            out_hidden_size=WIDTH,
            patch_size=4,
            spatial_merge_size=2,
            window_size=16,
            fullatt_block_indexes=[0],
        ),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        text = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    images = Qwen2VLImageProcessor(min_pixels=64, max_pixels=1024, patch_size=4, merge_size=2)
    return built(
        lambda: (QwenImageEditPlusPipeline if plus else QwenImageEditPipeline)(
            scheduler=_flow(**DYNAMIC),
            vae=AutoencoderKLQwenImage(**_VIDEO_VAE),
            text_encoder=text,
            tokenizer=tokenizer,
            processor=Qwen2VLProcessor(
                image_processor=images, tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor()
            ),
            transformer=QwenImageTransformer2DModel(
                **HEADS,
                in_channels=4 * LATENTS,
                out_channels=LATENTS,
                num_layers=1,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(4, 6, 6),
            ),
        )
    )


def qwen_image_edit_plus() -> Any:
    """A QwenImageEditPlusPipeline, which takes several images: use it within `small_edits`."""
    return qwen_image_edit(plus=True)


def small_edits(patch: Any) -> None:
    """Let Qwen-Image-Edit resize images to edit to 16 x 32 pixels instead of a million."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    def small(area: int, ratio: float) -> tuple[int, int]:
        return (32, 16) if ratio > 1 else (16, 32)

    patch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (*small(area, ratio), None))
    patch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", small)


@copied
def kolors() -> Any:
    """A KolorsPipeline with the ChatGLM of diffusers.

    Its own tokenizer needs sentencepiece and a model file: another one stands for it, which cannot be saved. diffusers
    has the pipeline only where sentencepiece is installed.
    """
    pytest.importorskip("sentencepiece")
    from diffusers import DDIMScheduler, KolorsPipeline, UNet2DConditionModel
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    class Tokenizer:
        def __init__(self) -> None:
            self.plain = _tokenizer()

        def __call__(self, *given: Any, **options: Any) -> Any:
            found = self.plain(*given, **options)
            found["position_ids"] = torch.arange(found["input_ids"].shape[1]).expand_as(found["input_ids"])
            return found

    text = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=len(_tokenizer()),
        hidden_size=WIDTH,
        ffn_hidden_size=2 * WIDTH,
        kv_channels=8,
        num_attention_heads=2,
        multi_query_attention=True,
        multi_query_group_num=1,
        add_qkv_bias=True,
        original_rope=True,
        torch_dtype=torch.float32,
    )

    def encoder() -> Any:
        made = ChatGLMModel(text, empty_init=False)
        for parameter in made.parameters():  # it leaves some without values
            torch.nn.init.normal_(parameter, std=0.3)
        return made

    sizes = dict(cross_attention_dim=CLIP_WIDTH, encoder_hid_dim=WIDTH, encoder_hid_dim_type="text_proj")
    return built(
        lambda: KolorsPipeline(
            vae=vae(scaling_factor=0.13025),
            text_encoder=encoder().eval(),
            tokenizer=Tokenizer(),
            unet=UNet2DConditionModel(
                **{**SDXL, **sizes, "projection_class_embeddings_input_dim": 6 * 8 + WIDTH},
            ),
            scheduler=DDIMScheduler(**NOISE),
        )
    )


def _like(make: Callable[[], Any], kind: Any, denoiser: Any, options: dict[str, Any], **changed: Any) -> Any:
    """A pipeline of the parts of another one, with a denoiser of its own."""
    takes = inspect.signature(kind).parameters
    parts = {part: module for part, module in make().components.items() if part in takes}
    name = "unet" if "unet" in parts else "transformer"
    settings = {"requires_safety_checker": False} if kind.__name__ == "StableDiffusionInpaintPipeline" else {}
    return built(lambda: kind(**{**parts, name: denoiser(**{**options, **changed})}, **settings))


TINY: dict[str, Callable[[], Any]] = {
    make.__name__: make
    for make in (flux2, flux2_klein, qwen_image, z_image, sana, pixart_sigma, lumina2, chroma, aura_flow, hunyuan_dit,
                 wan, wan_experts, wan_5b, ltx, hidream, sd_inpaint, sdxl_inpaint, flux_fill, flux_kontext,
                 qwen_image_edit, qwen_image_edit_plus)
}  # fmt: skip
LENGTHS = {"flux_fill": CONTEXT, "flux_kontext": CONTEXT}  # of texts, in tokens; 64 for the others
SIZES = {"sana": (32, 64), "ltx": (32, 64)}  # of which the pipelines demand multiples of 32

_SHIFTED_VAE = dict(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
_VIDEO_VAE = dict(
    base_dim=8,
    z_dim=LATENTS,
    dim_mult=[1, 2],
    num_res_blocks=1,
    temperal_downsample=[True],
    latents_mean=[-0.8, -0.1, 0.2, 0.9],
    latents_std=[2.8, 1.4, 0.5, 1.2],
)


def _tokenizer() -> Any:
    tokenizer = t5_tokenizer(2048, _WORDS)
    tokenizer.chat_template = _CHAT
    return tokenizer


def _flow(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def _language(config: Any, model: Any, layers: int = 2, **options: Any) -> Any:
    sizes = dict(
        vocab_size=len(_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return model._from_config(config(**sizes, **options), attn_implementation="eager").eval()


def _gemma() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return _language(Gemma2Config, Gemma2Model, head_dim=8)
