"""The mode of a module during training."""

from torch import nn


def train_mode(module: nn.Module) -> None:
    """Put a module in training mode, except for batch normalisations, which keep the base's running statistics.

    Adapter files do not contain these statistics, so the adapter would be loaded into a different base model.
    """
    module.train()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()
