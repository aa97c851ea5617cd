"""Qwen-Image and its editors, which edit images that their text encoder sees too."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms.functional import to_pil_image

from randlora_vision.training.dreambooth.families.base import Encoded, Takes
from randlora_vision.training.dreambooth.families.flow import FlowFamily
from randlora_vision.training.dreambooth.families.precision import full_precision
from randlora_vision.training.dreambooth.families.seen import Seen, with_image_of
from randlora_vision.training.dreambooth.families.statistics import StatisticsOfVAE


class QwenImage(StatisticsOfVAE, FlowFamily):
    """Qwen-Image: packed latents of a video VAE, Qwen2.5-VL with texts of any length."""

    pipeline = "QwenImagePipeline"
    packing = 4
    guidance_argument = "true_cfg_scale"

    @property
    def without_effect(self) -> tuple[str, ...]:
        """The text's own output in the last block, after which only the image tokens are used."""
        config: Any = self.denoiser.config
        last = f"transformer_blocks.{config.num_layers - 1}"
        return tuple(f"{last}.{name}" for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp"))

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Encode images as videos of one frame."""
        with full_precision(self.device):
            frames = pixels.to(self.device, torch.float32).unsqueeze(2)
            moments: Tensor = self.pipe.vae.encode(frames).latent_dist.parameters
            return moments[:, :, 0].contiguous()

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Decode videos of one frame."""
        return self.pipe.vae.decode(latents.unsqueeze(2), return_dict=False)[0][:, :, 0]

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Also return the masks of the tokens (B, T)."""
        found = self._text(prompts)
        if guided:
            found |= {
                f"negative_{name}": tensor
                for name, tensor in self._text([with_image_of(prompt, "") for prompt in prompts]).items()
            }
        return found

    def _text(self, prompts: Sequence[str]) -> Encoded:
        found, mask = self.pipe.encode_prompt(list(prompts), self.device, **self.text_options)
        if mask is None:  # all tokens count
            mask = torch.ones(found.shape[:2], dtype=torch.long, device=found.device)
        return {"prompt_embeds": found, "prompt_embeds_mask": mask}

    def arguments(self, encoded: Encoded) -> dict[str, Any]:
        """Also give the scale to a transformer with built-in guidance."""
        config: Any = self.denoiser.config
        return {**encoded, **({"guidance_scale": self.options.guidance_scale} if config.guidance_embeds else {})}

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Pack the latents, call the transformer and unpack its output."""
        count, _, height, width = latents.shape
        tokens, shapes = self.tokens(latents, prompt)
        answer = self.denoiser(
            hidden_states=tokens,
            timestep=timesteps / 1000,  # the transformer multiplies them by 1000
            guidance=self.guidance(count),
            encoder_hidden_states=prompt["prompt_embeds"],
            encoder_hidden_states_mask=prompt["prompt_embeds_mask"],
            img_shapes=[shapes] * count,
        ).sample
        scale = self.pipe.vae_scale_factor
        return self.unpack(answer[:, : height * width // 4], height * scale, width * scale)

    def tokens(self, latents: Tensor, prompt: Encoded) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Return the tokens of the image (B, T, C) and the shapes of the images that they are of."""
        height, width = latents.shape[2:]
        return self.pipe._pack_latents(latents, *latents.shape), [(1, height // 2, width // 2)]

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Undo the packing of the pipeline."""
        unpacked: Tensor = self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor)
        return unpacked[:, :, 0]


class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit: Qwen2.5-VL sees the image to edit, whose tokens follow those of the image that is made.

    The pipeline gives both about a million pixels; in training, its latents have the size of the image that is made.
    """

    pipeline = "QwenImageEditPipeline"
    takes: ClassVar[Takes] = "image"
    sees = True

    def _text(self, prompts: Sequence[str]) -> Encoded:
        """Encode one by one, as images have their own numbers of tokens; shorter ones are padded."""
        texts, masks = [], []
        for prompt in prompts:
            assert isinstance(prompt, Seen)
            seen = self.seen(prompt.images)
            found, mask = self.pipe.encode_prompt([str(prompt)], image=seen, device=self.device, **self.text_options)
            texts.append(found[0])
            masks.append(torch.ones(len(found[0]), dtype=torch.long, device=found.device) if mask is None else mask[0])
        padded = {"prompt_embeds": texts, "prompt_embeds_mask": masks}
        return {name: pad_sequence(parts, batch_first=True) for name, parts in padded.items()}

    def seen(self, images: Sequence[Any]) -> Any:
        """Return the image as the pipeline gives it to the text encoder."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as module

        (image,) = images
        width, height, _ = module.calculate_dimensions(1024 * 1024, image.width / image.height)
        return self.pipe.image_processor.resize(image, height, width)

    def shown(self, pixels: Tensor, given: Tensor) -> dict[str, Any]:
        """Return the images, which this pipeline takes as pictures."""
        return {"image": [to_pil_image((image.cpu() + 1) / 2) for image in given]}

    def tokens(self, latents: Tensor, prompt: Encoded) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Also return the tokens and the shape of the image to edit."""
        own, shapes = super().tokens(latents, prompt)
        given, more = super().tokens(prompt["condition"], prompt)
        return torch.cat([own, given], dim=1), [*shapes, *more]


class QwenImageEditPlus(QwenImageEdit):
    """Qwen-Image-Edit 2509 and later: several images, which captions call Picture 1, Picture 2 and so on.

    In training, all of them have the size of the image that is made.
    """

    pipeline = "QwenImageEditPlusPipeline"
    takes = "images"
    one_at_a_time = True

    def seen(self, images: Sequence[Any]) -> Any:
        """Return the images as the pipeline gives them to the text encoder."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

        sizes = [module.calculate_dimensions(module.CONDITION_IMAGE_SIZE, i.width / i.height) for i in images]
        resize = self.pipe.image_processor.resize
        return [resize(image, height, width) for image, (width, height) in zip(images, sizes, strict=True)]

    def condition(self, pixels: Tensor, given: Tensor) -> Tensor:
        """Return the latents of the images (B, N, C, H, W)."""
        return self.mean_latents(given.flatten(0, 1)).unflatten(0, given.shape[:2])

    def shown(self, pixels: Tensor, given: Tensor) -> dict[str, Any]:
        """Return the images of the only picture."""
        return super().shown(pixels, given[0])

    def tokens(self, latents: Tensor, prompt: Encoded) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Also return the tokens and the shapes of all images."""
        parts = [QwenImage.tokens(self, some, prompt) for some in (latents, *prompt["condition"].unbind(1))]
        return torch.cat([tokens for tokens, _ in parts], dim=1), [shape for _, shapes in parts for shape in shapes]
