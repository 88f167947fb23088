"""What a model attends to: maps of any mixer that is linear in values, rollout, overlays."""

from .maps import attention_heat, attention_maps
from .pictures import overlay
from .rollout import rollout

__all__ = ["attention_heat", "attention_maps", "overlay", "rollout"]
