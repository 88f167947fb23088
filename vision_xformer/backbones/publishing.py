"""Methods of models for the Hugging Face Hub, implemented in :mod:`vision_xformer.hub`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def published(known: Mapping[str, Any], channels: int) -> dict[str, list[Any]]:
    """The "mean", "std" and "label_names" of a ``pretrained_cfg`` as plain lists, if known.

    Raises:
        ValueError: for statistics other than a number, or one for each channel (or color), or names
            that are not a list.
    """
    found: dict[str, list[Any]] = {}
    for key in ("mean", "std"):
        value = known.get(key)
        if value is None:
            continue
        try:
            plain = value.tolist() if isinstance(value, torch.Tensor) else value
            found[key] = np.asarray(plain, dtype=np.float64).ravel().tolist()
        except (TypeError, ValueError):
            found[key] = []
        if len(found[key]) not in (1, 3, channels):
            raise ValueError(
                f"pretrained_cfg[{key!r}] {value!r} must be a number, or one for each of "
                f"{channels} channels"
            )
    names = known.get("label_names")
    if names is None:
        return found
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"pretrained_cfg['label_names'] {names!r} must be a list of names")
    return {**found, "label_names": [*map(str, names)]}


class Publishable:
    """The methods of a model of :func:`~vision_xformer.create_model` for the Hugging Face Hub."""

    def save_pretrained(self, folder: str | os.PathLike[str], *, card: str | None = None) -> None:
        """Write a folder that :func:`~vision_xformer.from_pretrained` reads.

        Args:
            folder: created if it does not exist.
            card: text of README.md; by default that of :func:`vision_xformer.hub.model_card`,
                unless the folder has a README.md.

        Raises:
            ValueError: for a converted or pruned model, class names that do not match the classes,
                a file instead of a folder, or a missing package.
            OSError: if the folder cannot be written.
        """
        from ..hub import save_pretrained

        save_pretrained(self, folder, card)

    def push_to_hub(self, repo_id: str, *, card: str | None = None, **options: Any) -> str:
        """Upload the folder of :meth:`save_pretrained` to a repository, created if necessary.

        Args:
            repo_id: "user/name".
            card: text of README.md; by default that of :func:`vision_xformer.hub.model_card`.
            options: ``private`` for a new repository; ``token``; ``revision``, ``create_pr`` and
                ``commit_message`` of the upload.

        Returns:
            The URL of the commit.

        Raises:
            ValueError: as for :meth:`save_pretrained`, or if the upload fails.
        """
        from ..hub import push_to_hub

        return push_to_hub(self, repo_id, card, **options)
