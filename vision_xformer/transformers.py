"""Register our classifiers in transformers: ``import vision_xformer.transformers``.

Folders and repositories of ``save_pretrained`` and ``push_to_hub`` then load with
``AutoModelForImageClassification`` and ``pipeline("image-classification")``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

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
        elif any(module is part for part in self._new_parts()):
            if isinstance(module, nn.Linear):
                init_linears(module)
            elif hasattr(module, "reset_parameters"):  # batch norm
                module.reset_parameters()

    def _new_parts(self) -> Iterator[nn.Module]:
        """The modules that a model without a head lacks: the classifier and a learned pooling."""
        for part in (self.model.get_classifier(), getattr(self.model, "pool", None)):
            if isinstance(part, nn.Module):
                yield from part.modules()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Classify images (B, C, H, W).

        Args:
            pixel_values: the images.
            labels: class indices (B,), or as the ``problem_type`` of the configuration requires;
                with them, the output contains the loss of transformers for it.
            output_attentions: not supported, see :func:`~vision_xformer.attention_maps`.
            output_hidden_states: not supported, see ``forward_intermediates`` of ``model``.
            return_dict: False returns a tuple.
            options: of the loss.

        Raises:
            ValueError: for attention maps or hidden states.
        """
        if output_attentions or output_hidden_states:
            raise ValueError(
                "output_attentions and output_hidden_states are not supported: use "
                "vx.attention_maps(model.model, images) or model.model.forward_intermediates"
            )
        logits = self.model(pixel_values)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **options)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


AutoConfig.register(SECTION, VisionXformerConfig, exist_ok=True)
AutoModelForImageClassification.register(
    VisionXformerConfig, VisionXformerForImageClassification, exist_ok=True
)
