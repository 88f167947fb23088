"""Models as folders and repositories of the Hugging Face Hub; :mod:`vision_xformer.hub` does it."""

from __future__ import annotations

import os
from typing import Any


class Publishable:
    """The methods of a model of :func:`~vision_xformer.create_model` for the Hugging Face Hub."""

    def save_pretrained(self, folder: str | os.PathLike[str], *, card: str | None = None) -> None:
        """Write a folder that :func:`~vision_xformer.from_pretrained` reads.

        Args:
            folder: created if it does not exist.
            card: text of README.md; by default :func:`vision_xformer.hub.model_card`, unless the
                folder has a README.md.

        Raises:
            ValueError: for a converted model, or a missing package.
            OSError: if it cannot be written.
        """
        from ..hub import save_pretrained

        save_pretrained(self, folder, card)

    def push_to_hub(self, repo_id: str, *, card: str | None = None, **options: Any) -> str:
        """Upload the folder of :meth:`save_pretrained` to a repository, created if necessary.

        Args:
            repo_id: "user/name".
            card: text of README.md; by default :func:`vision_xformer.hub.model_card`.
            options: ``private`` for a new repository; ``token``; ``revision``, ``create_pr`` and
                ``commit_message`` of the upload.

        Returns:
            The address of the commit.

        Raises:
            ValueError: for a converted model, a missing package or an upload that fails.
        """
        from ..hub import push_to_hub

        return push_to_hub(self, repo_id, card, **options)
