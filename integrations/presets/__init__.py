"""The weights that presets such as ``timm:attention`` choose."""
