"""Host-library integrations: presets and one-call conveniences, each imported only when it is used."""
