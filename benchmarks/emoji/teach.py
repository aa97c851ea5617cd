"""Training of the demo's pipeline: flow matching on drawings that are few enough to know by heart.

Shapes: B pictures of a step; L tokens of a prompt; D width of their embeddings.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.emoji.pipeline import CONTEXT, SHIFT
from randlora_vision.files.atomic import replacing
from randlora_vision.training.harness.ema import Ema

T5_LENGTH = 4
_SAVE_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Teaching:
    """How the pipeline is trained."""

    steps: int = 2250
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 100
    cooldown: float = 0.35
    """Fraction of the steps over which the rate falls to 0, at the end."""
    coloured: float = 0.35
    """Fraction of the pictures on a background that is drawn at random; the others are on white."""
    unprompted: float = 0.1
    """Fraction of the pictures with the empty prompt."""
    ema_decay: float = 0.998
    compiled: bool = True

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        return self.lr * min(1, step / self.warmup, (self.steps - step) / (self.cooldown * self.steps))


class Trained(nn.ModuleDict):
    """The parts of the pipeline that are trained."""

    def __init__(self, pipe: Any) -> None:
        super().__init__({"u": pipe.transformer, "t1": pipe.text_encoder, "t2": pipe.text_encoder_2})

    def prompts(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the transformer is told by prompts (B, L): (B, L + zeros for T5, D) and (B, D).

        They are those of `encode_prompt` of the pipeline, with gradients.
        """
        texts = [self[name](ids, output_hidden_states=True) for name in ("t1", "t2")]
        sequence = torch.cat([text.hidden_states[-2] for text in texts], -1)
        return F.pad(sequence, (0, 0, 0, T5_LENGTH)), torch.cat([text[0] for text in texts], -1)


def teach(pipe: Any, pictures: Tensor, prompts: list[list[str]], how: Teaching, checkpoint: Path) -> None:
    """Train the pipeline on `pictures` (emoji, backgrounds, 3, 32, 32), from -1 to 1, of such prompts.

    The first background is white. What `checkpoint` holds of an interrupted training is continued.
    """
    config = pipe.vae.config
    emoji, backgrounds = pictures.shape[:2]
    latents = ((pictures - config.shift_factor) * config.scaling_factor).flatten(0, 1)
    texts = [*(prompt for row in prompts for prompt in row), ""]
    ids = pipe.tokenizer(texts, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
    trained = Trained(pipe).train()
    groups = [
        {"params": [p for p in trained.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in trained.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=how.lr, betas=(0.9, 0.98))
    ema = Ema(dict(trained.named_parameters()), how.ema_decay)
    start = _resume(checkpoint, trained, optimizer, ema)
    denoiser = torch.compile(pipe.transformer, dynamic=False) if how.compiled else pipe.transformer
    losses: list[float] = []
    saved = time.monotonic()
    for step in range(start + 1, how.steps + 1):
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = how.rate(step)
        size = how.batch_size
        chosen = torch.randint(emoji, (size,)) * backgrounds
        chosen = chosen + torch.randint(backgrounds, (size,)) * (torch.rand(size) < how.coloured)
        clean = latents[chosen]
        noise = torch.randn_like(clean)
        level = torch.rand(size)
        level = SHIFT * level / (1 + (SHIFT - 1) * level)
        told = torch.where(torch.rand(size) < how.unprompted, len(texts) - 1, chosen)
        sequence, pooled = trained.prompts(ids[told])
        amount = level.view(-1, 1, 1, 1)
        (answer,) = denoiser(
            (1 - amount) * clean + amount * noise,
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            timestep=1000 * level,
            return_dict=False,
        )
        loss = F.mse_loss(answer, noise - clean)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        ema.update(step)
        losses.append(loss.item())
        if step % 25 == 0:
            print(f"step {step} of {how.steps}: loss {sum(losses[-25:]) / len(losses[-25:]):.4f}", flush=True)
        if time.monotonic() - saved > _SAVE_EVERY or step == how.steps:
            _save(checkpoint, trained, optimizer, ema, step)
            saved = time.monotonic()
    ema.put_into_model()
    trained.eval()


def _resume(path: Path, trained: Trained, optimizer: torch.optim.Optimizer, ema: Ema) -> int:
    """Load an interrupted training, if there is one; return how many steps it has done."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    trained.load_state_dict(state["m"])
    optimizer.load_state_dict(state["o"])
    ema.averages = state["e"]
    return int(state["s"])


def _save(path: Path, trained: Trained, optimizer: torch.optim.Optimizer, ema: Ema, step: int) -> None:
    state = {"m": trained.state_dict(), "o": optimizer.state_dict(), "e": ema.averages, "s": step}
    with replacing(path) as temporary:
        torch.save(state, temporary)
