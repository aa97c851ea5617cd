"""The flags of diffusers' DreamBooth LoRA scripts, kohya's of the loss, and what they mean for train_dreambooth.py."""

from randlora_vision.training.harness.flags import Given, Refused, Table, only

_PRODIGY = Refused("the settings are diffusers' defaults: for others, give --optimizer-kwargs, such as decouple=False")
_BY_PIPELINE = Refused("the pipeline's own tokenizers and masks are used: leave it out")
_DEEPFLOYD = Refused("DeepFloyd's pipelines are not supported: leave it out")
_EDM = Refused("EDM training is not implemented: choose a pipeline that predicts noise or flow")

_TOKENS = Refused(
    "an adapter file holds no tokens, so there is no textual inversion: --train-text-encoder adapts the encoders"
)


_AS_SAVED = Refused("the pipeline is used as it was saved: leave it out")
_SMALL = Refused("give --quantize bnb-nf4, bnb-int8 or torchao-int8, for the frozen weights")
_TEXT = Refused("all text is encoded before the denoiser is loaded: leave it out")


def _optimizer(given: Given) -> str:
    name = next(iter(given.get("--optimizer", ())), "{}")
    return f"--optimizer {name.lower() if name.lower() in ('adamw', 'prodigy') else '{}'}"


def _final_prompt(given: Given) -> str:
    return "" if "--validation-prompt" in given else "--validation-prompt {}"


def _layers(given: Given) -> str:
    names = " ".join(given.get("--lora-layers", ())).replace(",", " ").split()
    return f"--target-modules {' '.join(names) or '{}'}"


_ALL_LEVELS = "noise levels are drawn from all: give --weighting-scheme, or --expert for one of two transformers"
_ONE_OFFSET = Refused("the strength is the same at every step: give --noise-offset or --input-perturbation alone")
_PYRAMID = Refused("noise of several resolutions is not implemented: give --noise-offset")

_KOHYA: Table = {
    "--scale-v-pred-loss-like-noise-pred": Refused("give --snr-gamma or --debiased-estimation-loss"),
    **dict.fromkeys(
        ("--adaptive-noise-scale", "--noise-offset-random-strength", "--ip-noise-gamma-random-strength"), _ONE_OFFSET
    ),
    **dict.fromkeys(("--multires-noise-iterations", "--multires-noise-discount"), _PYRAMID),
    "--min-timestep": only("0", otherwise=_ALL_LEVELS),
    "--max-timestep": only("1000", otherwise=_ALL_LEVELS),
    "--sigmoid-scale": "--logit-std {}",
    "--training-shift": "--discrete-flow-shift {}",
    "--model-prediction-type": only("raw", otherwise="the prediction is that of the pipeline: give raw"),
    "--caption-dropout-every-n-epochs": only("0", otherwise="give --caption-dropout-rate"),
    "--caption-tag-dropout-rate": only("0", "0.0", otherwise="tags are shuffled and not dropped: leave it out"),
    "--min-snr-gamma": "--snr-gamma {}",
    "--ip-noise-gamma": "--input-perturbation {}",
    "--v-parameterization": "--prediction-type v_prediction",
    "--zero-terminal-snr": Refused(
        "set rescale_betas_zero_snr in the scheduler_config.json of the pipeline, as pictures need it too"
    ),
    "--masked-loss": "",
    "--conditioning-data-dir": "--mask-data-dir {}",
    "--timestep-sampling": {
        "sigma": "",
        "uniform": "--weighting-scheme none",
        "sigmoid": "--weighting-scheme logit_normal",
        "shift": Refused("give --discrete-flow-shift with a number, and --weighting-scheme logit_normal"),
        "flux_shift": "--weighting-scheme logit_normal --discrete-flow-shift resolution",
    },
}
DIFFUSERS: Table = {
    "--cache-dir": Refused("set the environment variable HF_HOME for downloads"),
    "--tokenizer-name": _BY_PIPELINE,
    "--tokenizer-max-length": {"77": "", "*": _BY_PIPELINE},
    "--text-encoder-use-attention-mask": _BY_PIPELINE,
    "--dataset-config-name": Refused("save that configuration with save_to_disk and give its folder as --dataset-name"),
    "--repeats": {"1": "", "*": Refused("images are drawn again and again: give more --steps or --epochs")},
    "--validation-epochs": "--eval-epochs {}",
    **_KOHYA,
    "--validation-images": "--validation-image {}",
    "--validation-scheduler": Refused("pictures are drawn with the pipeline's own scheduler: leave it out"),
    "--class-labels-conditioning": _DEEPFLOYD,
    "--skip-save-text-encoder": "",
    "--random-flip": Refused("images are cropped but not flipped: add flipped copies to the folder"),
    "--image-interpolation-mode": {
        "lanczos": "",
        "*": Refused("images are resized with Lanczos: leave it out"),
    },
    "--prior-generation-precision": Refused("class images are generated in --mixed-precision: leave it out"),
    "--pre-compute-text-embeddings": "",
    "--set-grads-to-none": "",
    "--optimizer": _optimizer,
    "--caption-dropout": "--caption-dropout-rate {}",
    "--use-aspect-ratio-buckets": lambda given: (
        "" if "--aspect-ratio-buckets" in given else "--aspect-ratio-buckets auto"
    ),
    "--final-validation-prompt": _final_prompt,
    "--validation-num-inference-steps": "--num-inference-steps {}",
    "--validation-model-path": Refused(
        "pictures are of the pipeline that is trained: load the adapter into the other one"
    ),
    "--skip-final-inference": Refused("leave --validation-prompt out, and no pictures are made"),
    "--offload": "",  # text encoders are let go once everything is encoded
    **dict.fromkeys(("--remote-text-encoder", "--fsdp-text-encoder"), _TEXT),
    **dict.fromkeys(("--do-fp8-training", "--bnb-quantization-config-path"), _SMALL),
    **dict.fromkeys(
        (
            *("--complex-human-instruction", "--system-prompt", "--text-encoder-out-layers", "--upsample-prompt"),
            *("--pretrained-text-encoder-4-name-or-path", "--pretrained-tokenizer-4-name-or-path"),
            *("--prompt-enhancer-head-id", "--vae-encode-mode", "--enable-vae-tiling", "--disable-training-autocast"),
        ),
        _AS_SAVED,
    ),
    "--prodigy-beta3": _PRODIGY,
    **dict.fromkeys(
        ("--prodigy-decouple", "--prodigy-use-bias-correction", "--prodigy-safeguard-warmup"),
        {"True": "", "true": "", "*": _PRODIGY},
    ),
    "--adam-weight-decay-text-encoder": Refused("--weight-decay is for everything that is trained"),
    "--hub-token": Refused("set the environment variable HF_TOKEN, or log in with hf auth login"),
    "--logging-dir": {"logs": "", "*": Refused("trackers write to logs/ in the run folder: leave it out")},
    "--local-rank": {"*": ""},
    "--allow-tf32": Refused("set the environment variable TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1"),
    "--upcast-before-saving": "",
    "--lora-layers": _layers,
    **dict.fromkeys(
        (
            *("--train-text-encoder-ti", "--train-text-encoder-ti-frac", "--token-abstraction", "--enable-t5-ti"),
            *("--num-new-tokens-per-abstraction", "--initializer-concept", "--train-transformer-frac"),
        ),
        _TOKENS,
    ),
    "--train-text-encoder-frac": only("1", "1.0", otherwise="text encoders are trained to the end: leave it out"),
    "--use-blora": Refused("give --target-modules with a pattern of the blocks"),
    "--clip-skip": Refused("the layer that the pipeline itself uses is taken: leave it out"),
    **dict.fromkeys(
        ("--lora-blocks", "--lora-unet-blocks"),
        Refused("give --target-modules with a regular expression that names the blocks"),
    ),
    "--use-dora": Refused("DoRA is not implemented: give --method randlora or lora"),
    "--output-kohya-format": Refused("the adapter is written for this library, LoRA for diffusers: leave it out"),
    "--do-edm-style-training": _EDM,
    "--precondition-outputs": _EDM,
    "--enable-xformers-memory-efficient-attention": "",  # PyTorch's own is used
    "--enable-npu-flash-attention": Refused("PyTorch's own memory-efficient attention is used: leave it out"),
}
