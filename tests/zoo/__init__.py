"""Small models with random weights, of every library and family whose layers are held in their own way.

Everything is built offline from tiny configurations; a host library is imported by the builders that need it.
"""

from tests.zoo import from_diffusers, from_open_clip, from_timm, from_torch, from_transformers
from tests.zoo.base import Entry as Entry
from tests.zoo.base import reading as reading

ZOO: list[Entry] = [
    *from_torch.ENTRIES,
    *from_timm.ENTRIES,
    *from_open_clip.ENTRIES,
    *from_transformers.ENTRIES,
    *from_diffusers.ENTRIES,
]
