"""What a model attends to: maps of any mixer that is linear in values, rollout, pictures."""

from .maps import attention_maps



__all__ = ["attention_maps", "overlay", "rollout"]
