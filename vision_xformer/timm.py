"""Add our models to timm's registry: ``import vision_xformer.timm`` adds each name as ``vx_name``.

``timm.create_model("vx_ccn_7_3x1", num_classes=10)`` then builds one of them, and timm's training
script accepts it. The arguments ``num_classes``, ``in_chans``, ``img_size``, ``drop_path_rate``,
``dynamic_img_size``, ``global_pool``, ``features_only`` and ``out_indices`` mean what they do in
timm; all others are those of :func:`~vision_xformer.create_model`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

try:
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ImportError as error:
    raise ImportError("vision_xformer.timm needs timm: pip install timm") from error

from .backbones import VisionModel
from .backbones.vit import POOLS, ViTConfig
from .factory import create_model
from .names import list_models, name_to_config
from .stems import Stem

_FIELDS = {
    "in_chans": "channels",
    "img_size": "image_size",
    "drop_path_rate": "drop_path",
    "dynamic_img_size": "dynamic_size",
}


def _default_cfg(name: str) -> dict[str, Any]:
    """Return the entries that timm's data transforms read."""
    config = name_to_config(name)
    return {
        "input_size": config.input_shape,
        "num_classes": config.num_classes,
        "fixed_input_size": not config.dynamic_size,
        "crop_pct": 1.0 if config.input_shape[1] < 64 else 0.9,
    }


def _layer_names(model: VisionModel) -> dict[str, str | tuple[str, ...] | None]:
    """Return the names of the classifiers and of the layers on pixels, a string if it is one."""
    head = set(model.get_classifier().modules())
    heads = [n for n, m in model.named_modules() if m in head and isinstance(m, nn.Linear)]
    stems = [f"{n}." for n, m in model.named_modules() if isinstance(m, Stem)] or [""]
    maps = [n for n, p in model.named_parameters() if n.endswith(".weight") and p.ndim > 1]
    firsts = [next((n for n in maps if n.startswith(stem)), None) for stem in stems]
    convs = [n.removesuffix(".weight") for n in firsts if n is not None]
    return {"classifier": _plain(heads), "first_conv": _plain(convs)}


def _plain(names: list[str]) -> str | tuple[str, ...] | None:
    return tuple(names) if len(names) > 1 else next(iter(names), None)


def _build(name: str, arguments: dict[str, Any]) -> VisionModel:
    """Build the model of that name from timm's arguments."""
    global_pool = arguments.pop("global_pool", None)
    # timm's training script always passes it, for dropout before the classifier
    if arguments.pop("drop_rate", 0):
        raise ValueError(
            "drop_rate must be 0: there is no dropout before the classifier; the field dropout is "
            "that of the MLPs"
        )
    config = name_to_config(name)
    for theirs in ("drop_path_rate", "dynamic_img_size"):
        if theirs in arguments and not hasattr(config, _FIELDS[theirs]):
            raise ValueError(f"{theirs} {arguments[theirs]!r} has no meaning for vx_{name}")
    fields = {_FIELDS.get(key, key): value for key, value in arguments.items()}
    pool = POOLS.get(global_pool)
    if isinstance(config, ViTConfig) and pool:  # as in timm, the norm follows average pooling
        if "pool" in fields:
            raise ValueError(f"global_pool {global_pool!r} and pool {fields['pool']!r}: give one")
        token = config.has_class_token or pool == "cls"
        fields = {"pool": pool, "class_token": token} | fields
        global_pool = None
    model = create_model(name, **fields)
    if global_pool is not None:
        model.reset_classifier(model.num_classes, global_pool)
    return model


def _entrypoint(name: str) -> Callable[..., Any]:
    def create(pretrained: bool = False, **arguments: Any) -> Any:
        if pretrained:
            raise ValueError(
                f"vx_{name} has no pretrained weights: pretrained must be False; "
                "vision_xformer.load_weights loads those of timm's models"
            )
        model = build_model_with_cfg(
            lambda **rest: _build(name, rest),
            create.__name__,
            pretrained=False,
            feature_cfg={"feature_cls": "getter", "out_indices": None},
            **arguments,
        )
        built = model if isinstance(model, VisionModel) else model.model
        model.pretrained_cfg |= _layer_names(built)
        model.pretrained_cfg["input_size"] = built.config.input_shape  # for timm's transforms
        return model

    create.__name__ = create.__qualname__ = f"vx_{name}"
    create.__module__ = __name__
    return create


default_cfgs = generate_default_cfgs({f"vx_{name}": _default_cfg(name) for name in list_models()})
__all__: list[str] = []  # filled by register_model
for _name in list_models():
    globals()[f"vx_{_name}"] = register_model(_entrypoint(_name))
