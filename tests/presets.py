"""A tiny size "test" for each backbone, so that ``create_model("vit_test")`` is fast.

Registering a size like this is all it takes; the library itself has none of them.
"""

from __future__ import annotations

from typing import Any

import vision_xformer as vx

_ISOTROPIC: dict[str, Any] = dict(
    input_shape=(3, 14, 10), num_classes=5, patch_size=2, dim=24, depth=2
)
_VIT = dict(heads=3, mlp_ratio=1.6, **_ISOTROPIC)
_CCT: dict[str, Any] = dict(num_classes=5, dim=24, depth=2, heads=3, mlp_ratio=1.6)

TEST_SIZES: dict[str, dict[str, Any]] = {
    "vit": _VIT,
    "simple_vit": _VIT,
    "mlp_mixer": dict(mlp_ratio=1.6, **_ISOTROPIC),
    "gmlp": _ISOTROPIC,
    "cait": dict(class_depth=1, class_heads=2, layer_scale=0.5, **_VIT),
    "xcit": dict(
        class_depth=1, class_heads=2, layer_scale=0.5, stem_options={"layers": 1}, **_VIT
    ),
    "cct": dict(
        input_shape=(3, 15, 9), patch_size=4, stem_options={"kernel": 3, "layers": 2}, **_CCT
    ),
    "cvt_lite": dict(input_shape=(3, 16, 12), **_CCT),
    "vit_lite": dict(input_shape=(3, 16, 12), **_CCT),
    "levit": dict(
        input_shape=(3, 14, 10), num_classes=5, patch_size=2, stem_layers=2, dims=(12, 20),
        depths=(2, 1), heads=(3, 2), key_dim=4,
    ),
    "cvt": dict(
        input_shape=(3, 14, 11), num_classes=5, dims=(12, 20), depths=(1, 2), heads=(3, 2),
        embed_kernels=(5, 3), embed_strides=(2, 2), mlp_ratio=2.0,
    ),
    "crossvit": dict(
        input_shape=(3, 20, 12), num_classes=5, patch_sizes=(2, 3), scales=(1.0, 0.75),
        dims=(12, 20), depths=(1, 2), heads=(3, 2), cross_heads=(2, 5), stages=2, mlp_ratio=2.0,
    ),
    "swin": dict(
        input_shape=(3, 20, 28), num_classes=5, patch_size=2, dims=(12, 20), depths=(2, 2),
        heads=(2, 5), window=3, mlp_ratio=2.0,
    ),
    "crossformer": dict(
        input_shape=(3, 16, 24), num_classes=5, patch_size=2, dims=(64, 96), depths=(2, 2),
        heads=(2, 3), window=3, mlp_ratio=2.0, stem_kernels=(2, 4), merge_kernels=(2, 4),
        intervals=(4, 2),
    ),
    "pvt": dict(
        input_shape=(3, 18, 14), num_classes=5, patch_size=2, dims=(12, 20), depths=(1, 2),
        heads=(3, 2), reductions=(2, 1), mlp_ratio=(2.0, 1.5),
    ),
    "convmixer": dict(
        input_shape=(3, 14, 10), num_classes=5, dim=12, depth=2, mixer_options={"kernel": 3}
    ),
    "fnet2d": dict(input_shape=(3, 14, 10), num_classes=5, dim=12, depth=2, mlp_ratio=20 / 12),
}  # fmt: skip

for _backbone, _fields in TEST_SIZES.items():
    vx.BACKBONES[_backbone].presets["test"] = _fields
