"""Register our classifiers in transformers: ``import vision_xformer.transformers``.

Folders and repositories of ``save_pretrained`` and ``push_to_hub`` then load with
``AutoModelForImageClassification`` and ``pipeline("image-classification")``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .factory import create_model
from .hub import SECTION
from .layers import init_linears
from .positions import FixedTable

try:
    from transformers import (
        AutoConfig,
        AutoModelForImageClassification,
        PretrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import ImageClassifierOutput
except ImportError as error:
    raise ImportError(
        "vision_xformer.transformers needs the package transformers: pip install transformers"
    ) from error


class VisionXformerConfig(PretrainedConfig):
    """The config.json of :meth:`VisionModel.save_pretrained`."""

    model_type = SECTION


class VisionXformerForImageClassification(PreTrainedModel):
    """A classifier of this package with the interface of transformers.

    Args:
        config: contains the configuration of the model as ``vision_xformer``, which is changed to
            the number of labels if that differs. Such a model has a new head.

    Attributes:
        model: the classifier, (B, C, H, W) -> (B, num_labels).
    """

    config_class = VisionXformerConfig
    base_model_prefix = "model"  # keys of weights do not have it
    main_input_name = "pixel_values"

    def __init__(self, config: VisionXformerConfig) -> None:
        super().__init__(config)
        section, classes = getattr(config, SECTION), config.num_labels or 0
        if classes != section["num_classes"]:
            pooled = classes > 0 or section["global_pool"]
            section = {**section, "num_classes": classes, "global_pool": pooled}
            setattr(config, SECTION, section)
        if hasattr(config, "label_names"):
            config.label_names = list((config.id2label or {}).values())
        self.model = create_model(section)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Fill what no weights were loaded for; all else is as the model drew it.

        transformers builds models on the meta device, and replaces computed tables and a head of
        another width by uninitialized memory.
        """
        if isinstance(module, FixedTable):
            module.to(module.table.device)  # computes the table
        elif any(module is part for part in self.model.get_classifier().modules()):
            init_linears(module)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **options: Any
    ) -> ImageClassifierOutput:
        """Classify images (B, C, H, W); with class indices (B,), the output contains the loss."""
        logits = self.model(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(SECTION, VisionXformerConfig, exist_ok=True)
AutoModelForImageClassification.register(
    VisionXformerConfig, VisionXformerForImageClassification, exist_ok=True
)
