"""An AutoencoderKL that changes nothing: its latents are the pixels, shifted and scaled.

At 32 x 32 pixels a transformer can take patches of the picture itself. A learnt VAE of a fifth of the size of the
pipeline blurred the drawings.
"""

from typing import Any

import torch
from torch import Tensor, nn

from randlora_vision.demos.emoji import PIXELS

SHIFT, SCALE = 0.4, 1.5  # to latents of about unit variance
_LARGE = 1000.0
_LEAST_LOGVAR = -30.0


@torch.no_grad()
def identity_vae() -> Any:
    """Return the VAE.

    Its residual blocks add zero. Every colour x is carried by the channels x and -x, so that SiLU loses nothing:
    silu(x) - silu(-x) = x. Two channels +K and -K, with K much larger than x, make the variance of the group the same
    for every picture, so that the group norm divides by a constant.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=3,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=SHIFT,
        scaling_factor=SCALE,
        sample_size=PIXELS,
    )
    for module in vae.modules():
        if hasattr(module, "conv_shortcut"):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    colours = torch.eye(3)
    split = torch.cat([colours, -colours, torch.zeros(2, 3)])
    joined = torch.cat([colours, -colours, torch.zeros(3, 2)], dim=1)
    for half, answer, bias in (
        (vae.encoder, torch.cat([joined, torch.zeros(3, 8)]), [0.0] * 3 + [_LEAST_LOGVAR] * 3),
        (vae.decoder, joined, [0.0] * 3),
    ):
        _multiply(half.conv_in, split, [0.0] * 6 + [_LARGE, -_LARGE])
        half.conv_norm_out.weight.fill_(_LARGE / 2)  # the standard deviation of K, -K and six small numbers
        half.conv_norm_out.bias.zero_()
        _multiply(half.conv_out, answer, bias)
    return vae.eval().requires_grad_(False)


def _multiply(conv: nn.Conv2d, matrix: Tensor, bias: list[float]) -> None:
    """Make a convolution multiply the channels of every pixel by a matrix (out, in), and add the bias."""
    assert conv.bias is not None
    conv.weight.zero_()
    conv.weight[:, :, 1, 1] = matrix
    conv.bias.copy_(torch.tensor(bias))
