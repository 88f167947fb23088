"""Convert state-dict keys of other libraries to ours.

Every known key of a parameter is renamed to ours. Keys that split one of our parameters in parts
(to_q, to_k, to_v) name the part. The keys of the attention packages and of vision_xformer 0.2.0 are
understood in both directions. A :class:`Library` is a model family of another library, whose
tensors may have to be reordered as well. :mod:`.grouping` applies the tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

KeyPatterns = list[tuple[str, str | Callable[[re.Match[str]], str]]]

FC_NORM = r"^fc_norm\."  # grouped with the norm before the pool
_CVT_STAGE = r"\.stages\.\d+\.(?:embedding|layers|cls_token)"  # of transformers
# (pattern, replacement), applied in this order
WRAPPERS: KeyPatterns = [  # of data parallel, torch.compile and other wrapper modules
    (rf"^((module|_orig_mod|model|backbone|encoder(?!{_CVT_STAGE}))\.)+", ""),
    (r"\._orig_mod\.", "."),
]
PACKAGES: KeyPatterns = [
    # vision_xformer 0.1.8 to 0.2.0: ViN, ViP, ViL, FNet
    (r"^pos_embedding$", "position"),
    (r"^to_patch_embedding\.1\.", "stem.norm_in."),
    (r"^to_patch_embedding\.2\.", "stem.proj."),
    (r"^to_patch_embedding\.3\.", "stem.norm_out."),
    (r"^(transformer|token_mixer)\.layers\.(\d+)\.0\.norm\.", r"blocks.\2.norm1."),
    (r"^transformer\.layers\.(\d+)\.0\.fn\.", r"blocks.\1.mixer."),
    (r"^(transformer|token_mixer)\.layers\.(\d+)\.1\.norm\.", r"blocks.\2.norm2."),
    (r"^(transformer|token_mixer)\.layers\.(\d+)\.1\.fn\.net\.0\.", r"blocks.\2.mlp.fc1."),
    (r"^(transformer|token_mixer)\.layers\.(\d+)\.1\.fn\.net\.3\.", r"blocks.\2.mlp.fc2."),
    (r"^mlp_head\.0\.", "norm."),
    (r"^mlp_head\.1\.", "head."),
    # its FNet2D
    (r"^conv\.(\d)\.", r"stem.convs.\1."),
    (r"^layers\.(\d+)\.ff\.0\.", r"blocks.\1.norm."),
    (r"^layers\.(\d+)\.ff\.1\.net\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.ff\.1\.net\.3\.", r"blocks.\1.mlp.fc2."),
    (r"^pool\.2\.", "head."),
    (FC_NORM, "norm."),
    # performer-pytorch, nystrom-attention, linformer: alone, in a mixer, in a model of 0.2.0
    (r"(^|\.)module\.", r"\1"),
    (r"(^|\.)to_qkv\.", r"\1projection.qkv."),
    (r"(^|\.)to_out\.(0\.)?", r"\1proj."),
    (r"(^|\.)res_conv\.weight$", r"\1kernel.residual"),
    (r"(^|\.)fast_attention\.", r"\1kernel."),
    (r"(^|mixer\.)(proj_[kv])$", r"\1kernel.\2"),
]
_TABLE = r"(?:.*\.)?(?:position|kernel\.proj_[kv]|position_bias(?:\.table)?|mixer\.filter)"
# (pattern, replacement, which part of that parameter this is)
PARTS = [
    (r"(^|\.)to_q\.", r"\1projection.qkv.", 0),
    (r"(^|\.)to_k\.", r"\1projection.qkv.", 1),
    (r"(^|\.)to_v\.", r"\1projection.qkv.", 2),
    (r"(^|\.)projection_query\.", r"\1projection.qkv.", 0),
    (r"(^|\.)projection_key\.", r"\1projection.qkv.", 1),
    (r"(^|\.)projection_value\.", r"\1projection.qkv.", 2),
    (r"(^|\.)projection\.q\.(weight|bias)$", r"\1projection.qkv.\2", 0),
    (r"(^|\.)projection\.(k|kv)\.(weight|bias)$", r"\1projection.qkv.\3", 1),
    (r"(^|\.)projection\.v\.(weight|bias)$", r"\1projection.qkv.\2", 2),
    (rf"^({_TABLE})\.prefix$", r"\1", 0),
    (rf"^({_TABLE})\.grid$", r"\1", 1),
]


class Library(NamedTuple):
    """A model family of another library.

    Args:
        name: its name.
        signature_key: pattern of a key that identifies this family; the first library in
            ``LIBRARIES`` that matches is used.
        key_patterns: renaming of its keys, as above.
        convert: puts a tensor into our order: (key, tensor, the whole state) -> tensor.
    """

    name: str
    signature_key: str
    key_patterns: KeyPatterns
    convert: Callable[[str, Tensor, Mapping[str, Tensor]], Tensor]


def _patches(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """A convolution over one patch, (D, C, *patch), as a linear layer on a flattened patch."""
    return tensor.movedim(1, -1).flatten(1)


def _timm_vit(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    is_patch = re.fullmatch(r"(stem\.(proj|0)|patch_embed\.(\d\.)?proj)\.weight", key)
    return _patches(key, tensor, state) if is_patch else tensor


def _dinov2(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """With registers, the position of the class token is added to it, as in timm."""
    if "register_tokens" in state:
        if key == "pos_embed":
            return tensor[:, 1:]
        if key == "cls_token":
            return tensor + state["pos_embed"][:, :1]
    return _timm_vit(key, tensor, state)


def _timm_swin(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """timm merges the four tokens in column-major order, ours in row-major order."""
    if ".downsample." not in key:
        return tensor
    return tensor.unflatten(-1, (2, 2, -1)).transpose(-3, -2).flatten(-3)


def _compact_patches(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    is_patch = key == "tokenizer.conv_layers.0.0.weight"
    return _patches(key, tensor, state) if is_patch else tensor


def _unchanged(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    return tensor


def _timm_levit(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Reorder rows: timm has q, k, v of each head, ours has q, k, v of all heads; biases (H, M)."""
    if key.endswith(".attention_biases"):
        return tensor.mT
    found = re.match(r"(.+\.)(qkv|kv)\.(linear|bn)\.(?!num_batches)", key)
    if found is None:
        return tensor
    heads = state[found[1] + "attention_biases"].shape[0]
    value_dim = state[found[1] + "proj.ln.linear.weight"].shape[1] // heads
    keys = len(found[2]) - 1  # q and k, or k alone
    key_dim = (tensor.shape[0] // heads - value_dim) // keys
    rows = torch.arange(tensor.shape[0], device=tensor.device).view(heads, -1)
    ours = [part.flatten() for part in rows.split([key_dim] * keys + [value_dim], 1)]
    return tensor[torch.cat(ours)]


_LEVIT: KeyPatterns = [
    (r"^stem\.conv(\d+)\.", lambda m: f"stem.convs.{int(m[1]) - 1}."),
    (r"^(stem\.convs\.\d+)\.linear\.", r"\1.conv."),
    (r"^stages\.(\d+)\.downsample\.", r"stages.\1.downsample.block."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"\.attn(_downsample)?\.", ".mixer."),
    (r"\.mixer\.(qkv|kv)\.", r".mixer.projection.\1."),
    (r"\.mixer\.q\.ln\.", ".mixer.projection.q."),
    (r"\.mixer\.proj\.ln\.", ".mixer.proj.1."),
    (r"\.attention_biases$", ".position_bias"),
    (r"\.mlp\.ln1\.", ".mlp.0."),
    (r"\.mlp\.ln2\.", ".mlp.2."),
    (r"\.bn\.", ".norm."),
]
_VIT: KeyPatterns = [
    (r"^pos_embed$", "position"),
    (r"^patch_embed\.", "stem."),
    (r"\.attn\.qkv\.", ".mixer.projection.qkv."),
    (r"\.attn\.", ".mixer."),
]
_COMPACT: KeyPatterns = [
    (r"^tokenizer\.conv_layers\.(\d+)\.0\.", r"stem.convs.\1."),
    (r"^classifier\.", ""),
    (r"^positional_emb$", "position"),
    (r"^class_emb$", "cls_token"),
    (r"^attention_pool\.", "pool.attention."),
    (r"\.norm1\.", ".norm2."),
    (r"\.pre_norm\.", ".norm1."),
    (r"\.self_attn\.qkv\.", ".mixer.projection.qkv."),
    (r"\.self_attn\.proj\.", ".mixer.proj."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"^fc\.", "head."),
]
_CVT = r"^(?:cvt\.)?encoder\.stages\.(\d+)\."
_CVT_CONV = r"\.convolution_projection\."
LIBRARIES = [
    Library(
        "timm LeViT with two heads",
        r"^head_dist\.(bn|linear)\.",
        [(r"^head\.", "head.labels."), (r"^head_dist\.", "head.teacher."), *_LEVIT],
        _timm_levit,
    ),
    Library("timm LeViT", r"\.attention_biases$", _LEVIT, _timm_levit),
    Library(
        "timm CaiT",
        r"^blocks_token_only\.",
        [
            (r"^cls_token$", "class_stage.cls_token"),
            (r"^(blocks_token_only\.\d+)\.attn\.([qkv])\.", r"\1.mixer.to_\2."),
            (r"^blocks_token_only\.", "class_stage.blocks."),
            (r"\.attn\.proj_l\.", ".mixer.kernel.before."),
            (r"\.attn\.proj_w\.", ".mixer.kernel.after."),
            (r"\.gamma_([12])$", r".scale\1.gamma"),
            *_VIT,
        ],
        _timm_vit,
    ),
    Library(
        "timm XCiT",
        r"^cls_attn_blocks\.",
        [
            (r"^cls_token$", "class_stage.cls_token"),
            (r"^patch_embed\.proj\.(\d)\.0\.", lambda m: f"stem.convs.{int(m[1]) // 2}.conv."),
            (r"^patch_embed\.proj\.(\d)\.1\.", lambda m: f"stem.convs.{int(m[1]) // 2}.norm."),
            (r"^pos_embed\.token_projection\.", "position.proj."),
            (r"^(cls_attn_blocks\.\d+)\.attn\.([qkv])\.", r"\1.mixer.to_\2."),
            (r"^cls_attn_blocks\.", "class_stage.blocks."),
            (r"\.local_mp\.bn\.", ".local.norm."),
            (r"\.local_mp\.", ".local."),
            (r"\.gamma([123])$", r".scale\1.gamma"),
            (r"\.attn\.", ".mixer."),
        ],
        _unchanged,
    ),
    Library(
        "timm CrossViT",
        r"^cls_token_0$",
        [
            (r"^pos_embed_(\d)$", r"branches.\1.position"),
            (r"^cls_token_(\d)$", r"branches.\1.cls_token"),
            (r"^patch_embed\.(\d)\.", r"branches.\1.stem."),
            (r"^norm\.(\d)\.", r"norms.\1."),
            (r"^head\.(\d)\.", r"head.heads.\1."),
            (r"^blocks\.(\d+)\.blocks\.", r"stages.\1.branches."),
            (r"^blocks\.(\d+)\.projs\.(\d)\.", r"stages.\1.exchanges.\2.proj_in."),
            (r"^blocks\.(\d+)\.revert_projs\.(\d)\.", r"stages.\1.exchanges.\2.proj_out."),
            (r"^blocks\.(\d+)\.fusion\.(\d)\.", r"stages.\1.exchanges.\2.block."),
            (r"\.attn\.w([qkv])\.", r".mixer.to_\1."),
            *_VIT,
        ],
        _timm_vit,
    ),
    Library(
        "timm Swin",
        r"\.relative_position_bias_table$",
        [
            (r"^patch_embed\.proj\.", "stem."),
            (r"^patch_embed\.norm\.", "stem_norm."),
            (r"^layers\.(\d+)\.downsample\.reduction\.", r"stages.\1.downsample.linear."),
            (r"^layers\.(\d+)\.downsample\.", r"stages.\1.downsample."),
            (r"^layers\.(\d+)\.blocks\.", r"stages.\1."),
            (r"\.attn\.relative_position_bias_table$", ".mixer.position_bias.table"),
            (r"^head\.fc\.", "head."),
            *_VIT,
        ],
        _timm_swin,
    ),
    Library(
        "timm ConvMixer",
        r"^blocks\.\d+\.0\.fn\.0\.",
        [
            (r"^stem\.0\.", "stem.proj."),
            (r"^stem\.2\.", "stem_norm."),
            (r"^(blocks\.\d+)\.0\.fn\.0\.", r"\1.mixers.0.conv."),
            (r"^(blocks\.\d+)\.0\.fn\.2\.", r"\1.mixer_norms.0."),
            (r"^(blocks\.\d+)\.1\.", r"\1.linear."),
            (r"^(blocks\.\d+)\.3\.", r"\1.norm."),
        ],
        _timm_vit,
    ),
    Library(
        "timm MLP-Mixer",
        r"\.mlp_tokens\.",
        [(r"\.mlp_tokens\.", ".mixer."), (r"\.mlp_channels\.", ".mlp.")],
        _timm_vit,
    ),
    Library(
        "timm gMLP",
        r"\.mlp_channels\.gate\.",
        [
            (r"\.mlp_channels\.gate\.norm\.", ".mixer.norm."),
            (r"\.mlp_channels\.gate\.proj\.", ".mixer.gate."),
            (r"\.mlp_channels\.", ".mixer."),
            (r"^(blocks\.\d+)\.norm\.", r"\1.norm1."),
        ],
        _timm_vit,
    ),
    Library(
        "timm PVT v2",
        r"\.mlp\.dwconv\.",
        [
            (r"^patch_embed\.proj\.", "stages.0.downsample.conv."),
            (r"^patch_embed\.norm\.", "stages.0.downsample.norm."),
            (r"\.downsample\.proj\.", ".downsample.conv."),
            (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
            (r"\.attn\.(q|kv)\.", r".mixer.projection.\1."),
            (r"\.attn\.sr\.", ".mixer.projection.reduce."),
            (r"\.attn\.norm\.", ".mixer.projection.norm."),
            (r"\.attn\.proj\.", ".mixer.proj."),
            (r"\.mlp\.dwconv\.", ".mlp.conv."),
        ],
        _unchanged,
    ),
    Library(
        "DINOv2",  # by its authors; without registers and chunks of blocks, its keys are timm's
        r"^register_tokens$|^blocks\.\d+\.\d+\.attn\.qkv\.",
        [
            (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
            (r"^register_tokens$", "reg_token"),
            (r"\.ls([12])\.", r".scale\1."),
            *_VIT,
        ],
        _dinov2,
    ),
    Library(
        "timm ViT",
        r"^patch_embed\.proj\.weight$",
        [(r"\.ls([12])\.", r".scale\1."), (FC_NORM, "norm."), *_VIT],
        _timm_vit,
    ),
    Library(
        "transformers CvT",
        _CVT,
        [
            (_CVT, r"stages.\1."),
            (r"\.cls_token$", ".downsample.cls_token"),
            (r"\.embedding\.convolution_embeddings\.projection\.", ".downsample.conv."),
            (r"\.embedding\.convolution_embeddings\.normalization\.", ".downsample.norm."),
            (r"\.layers\.(\d+)\.", r".\1."),
            (r"\.attention\.attention\.", ".mixer."),
            (rf"\.convolution_projection_query{_CVT_CONV}", ".projection.convs.0."),
            (rf"\.convolution_projection_key{_CVT_CONV}", ".projection.convs.1."),
            (rf"\.convolution_projection_value{_CVT_CONV}", ".projection.convs.2."),
            (r"(\.convs\.\d)\.convolution\.", r"\1.conv."),
            (r"(\.convs\.\d)\.normalization\.", r"\1.norm."),
            (r"\.attention\.output\.dense\.", ".mixer.proj."),
            (r"\.intermediate\.dense\.", ".mlp.fc1."),
            (r"\.output\.dense\.", ".mlp.fc2."),
            (r"\.layernorm_before\.", ".norm1."),
            (r"\.layernorm_after\.", ".norm2."),
            (r"^layernorm\.", "norm."),
            (r"^classifier\.", "head."),
        ],
        _unchanged,
    ),
    Library(
        "Compact-Transformers with patches",
        r"^tokenizer\.conv_layers\.0\.0\.bias$",
        [(r"^tokenizer\.conv_layers\.0\.0\.", "stem.proj."), *_COMPACT],
        _compact_patches,
    ),
    Library("Compact-Transformers", r"^tokenizer\.conv_layers\.", _COMPACT, _unchanged),
]
