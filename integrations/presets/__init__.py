"""Which weights a preset such as ``timm:attention`` takes."""
