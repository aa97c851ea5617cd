"""Integrations with host libraries: presets and convenience functions, each imported only when it is used."""
