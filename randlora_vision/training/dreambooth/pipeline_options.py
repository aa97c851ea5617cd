"""The options of train_dreambooth.py that choose the pipeline and how it is loaded."""

from dataclasses import dataclass, field

from randlora_vision.training.dreambooth.offload import Place
from randlora_vision.training.dreambooth.quantization import Quantization
from randlora_vision.training.option_fields import ABOVE_0, RARE, Options, needs


@dataclass(frozen=True)
class PipelineOptions(Options):
    """The pipeline."""

    pretrained_model_name_or_path: str | None = None
    """A diffusers pipeline: a folder written by save_pretrained, or a name on the Hugging Face Hub. docs/diffusion.md
    lists what is supported. Default: a tiny Stable Diffusion 3 that draws emoji."""
    revision: str | None = field(default=None, metadata=RARE)
    """Revision of the pipeline on the Hub."""
    variant: str | None = field(default=None, metadata=RARE)
    """Variant of the weights, such as fp16."""
    pretrained_vae_model_name_or_path: str | None = field(default=None, metadata=RARE)
    """Another VAE for the pipeline, such as madebyollin/sdxl-vae-fp16-fix: a folder written by save_pretrained, or a
    name on the Hub."""
    train_text_encoder: bool = False
    """Also adapt the CLIP text encoders."""
    text_encoder_lr: float | None = field(default=None, metadata=RARE | ABOVE_0 | needs("train_text_encoder"))
    """Peak learning rate of the text encoders. Default: --lr."""
    max_sequence_length: int | None = field(default=None, metadata=RARE | ABOVE_0)
    """Maximum length of prompts, in tokens, where the pipeline takes one. Default: that of the pipeline."""
    quantize: Quantization | None = None
    """Quantise the frozen denoiser and the text encoders that are not trained; adapters stay in full precision. gguf
    takes the denoiser from --gguf-file."""
    gguf_file: str | None = field(default=None, metadata=RARE)
    """The denoiser as a GGUF file, with --quantize gguf."""
    dry_run: bool = False
    """Print the parameters and the bytes of every part, the size of the adapter and an estimate of the peak memory, and
    stop. No weights are loaded."""
    offload_base: Place | None = None
    """Keep the weights of the frozen denoiser in main memory (cpu) or on disk, and load a layer while it is used. Turns
    on --gradient-checkpointing."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: uses less memory and more time."""
    torch_compile: bool = field(default=False, metadata=RARE)
    """Compile the forward and backward passes of the denoiser with torch.compile; pictures are sampled without it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.quantize == "gguf") != (self.gguf_file is not None):
            raise ValueError("--quantize gguf and --gguf-file go together: the file holds the quantised denoiser")
        if self.offload_base and (self.quantize or self.torch_compile or self.train_text_encoder):
            raise ValueError("--offload-base excludes --quantize, --torch-compile and --train-text-encoder")
