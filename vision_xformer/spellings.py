"""How other packages name, split and order what we have: their state dicts in our words.

Every known spelling of a parameter is brought to one, ours; a spelling that splits one of ours in
parts (to_q, to_k, to_v) names the part. Names of the attention packages and of the published
vision_xformer are understood in both directions; a :class:`Family` is a model of another library,
whose tensors may have to be put into our order as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Spellings = list[tuple[str, str | Callable[[re.Match[str]], str]]]

# (pattern, our spelling), applied in this order
_WRAPPERS: Spellings = [  # of data parallel and torch.compile
    (r"^((module|_orig_mod)\.)+", ""),
    (r"\._orig_mod\.", "."),
]
_PACKAGES: Spellings = [
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
    # the norm after pooling is the norm
    (r"^fc_norm\.", "norm."),
    # performer-pytorch, nystrom-attention, linformer: alone, in our slot, in a published model
    (r"(^|\.)module\.", r"\1"),
    (r"(^|\.)to_qkv\.", r"\1projection.qkv."),
    (r"(^|\.)to_out\.(0\.)?", r"\1proj."),
    (r"(^|\.)res_conv\.weight$", r"\1kernel.residual"),
    (r"(^|\.)fast_attention\.", r"\1kernel."),
    (r"(^|mixer\.)(proj_[kv])$", r"\1kernel.\2"),
]
_TABLE = r"(?:.*\.)?(?:position|kernel\.proj_[kv]|position_bias(?:\.table)?)"
# (pattern, our spelling, which part of it this is)
_PARTS = [
    (r"(^|\.)to_q\.", r"\1projection.qkv.", 0),
    (r"(^|\.)to_k\.", r"\1projection.qkv.", 1),
    (r"(^|\.)to_v\.", r"\1projection.qkv.", 2),
    (r"(^|\.)projection_query\.", r"\1projection.qkv.", 0),
    (r"(^|\.)projection_key\.", r"\1projection.qkv.", 1),
    (r"(^|\.)projection_value\.", r"\1projection.qkv.", 2),
    (rf"^({_TABLE})\.prefix$", r"\1", 0),
    (rf"^({_TABLE})\.grid$", r"\1", 1),
]


class Family(NamedTuple):
    """The models of another library.

    Args:
        library: its name.
        telltale: what a key of theirs, and of no other family, matches.
        spellings: as above.
        convert: puts a tensor into our order: (key, tensor, the whole state) -> tensor.
    """

    library: str
    telltale: str
    spellings: Spellings
    convert: Callable[[str, Tensor, Mapping[str, Tensor]], Tensor]


def _patches(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """A convolution over one patch, (D, C, *patch), as the linear map of a flattened one."""
    return tensor.movedim(1, -1).flatten(1)


def _timm_vit(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    is_patch = re.fullmatch(r"(stem\.(proj|0)|patch_embed\.(\d\.)?proj)\.weight", key)
    return _patches(key, tensor, state) if is_patch else tensor


def _timm_swin(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Of four merged tokens, theirs are column by column, ours row by row."""
    if ".downsample." not in key:
        return tensor
    return tensor.unflatten(-1, (2, 2, -1)).transpose(-3, -2).flatten(-3)


def _compact_patches(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    is_patch = key == "tokenizer.conv_layers.0.0.weight"
    return _patches(key, tensor, state) if is_patch else tensor


def _as_it_is(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    return tensor


def _timm_levit(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Theirs is head by head (q, k, v of each), ours is q, k and v of all heads; biases (H, M)."""
    if key.endswith(".attention_biases"):
        return tensor.mT
    found = re.match(r"(.+\.)(qkv|kv)\.(linear|bn)\.(?!num_batches)", key)
    if found is None:
        return tensor
    heads = state[found[1] + "attention_biases"].shape[0]
    value_dim = state[found[1] + "proj.ln.linear.weight"].shape[1] // heads
    keys = len(found[2]) - 1  # q and k, or k alone
    key_dim = (tensor.shape[0] // heads - value_dim) // keys
    rows = torch.arange(tensor.shape[0]).view(heads, -1)
    ours = [part.flatten() for part in rows.split([key_dim] * keys + [value_dim], 1)]
    return tensor[torch.cat(ours)]


_LEVIT: Spellings = [
    (r"^stem\.conv(\d+)\.", lambda m: f"stem.convs.{int(m[1]) - 1}."),
    (r"^(stem\.convs\.\d+)\.linear\.", r"\1.conv."),
    (r"^stages\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) - 1}.shrink."),
    (r"\.attn(_downsample)?\.", ".mixer."),
    (r"\.mixer\.(qkv|kv)\.", r".mixer.projection.\1."),
    (r"\.mixer\.q\.ln\.", ".mixer.projection.q."),
    (r"\.mixer\.proj\.ln\.", ".mixer.proj.1."),
    (r"\.attention_biases$", ".position_bias"),
    (r"\.mlp\.ln1\.", ".mlp.0."),
    (r"\.mlp\.ln2\.", ".mlp.2."),
    (r"\.bn\.", ".norm."),
]
_VIT: Spellings = [
    (r"^pos_embed$", "position"),
    (r"^patch_embed\.", "stem."),
    (r"\.attn\.qkv\.", ".mixer.projection.qkv."),
    (r"\.attn\.", ".mixer."),
]
_COMPACT: Spellings = [
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
_FAMILIES = [
    Family(
        "timm LeViT with two heads",
        r"^head_dist\.(bn|linear)\.",
        [(r"^head\.", "head.labels."), (r"^head_dist\.", "head.teacher."), *_LEVIT],
        _timm_levit,
    ),
    Family("timm LeViT", r"\.attention_biases$", _LEVIT, _timm_levit),
    Family(
        "timm CaiT",
        r"^blocks_token_only\.",
        [
            (r"^blocks_token_only\.(\d+)\.attn\.([qkv])\.", r"class_blocks.\1.mixer.to_\2."),
            (r"^blocks_token_only\.", "class_blocks."),
            (r"\.attn\.proj_l\.", ".mixer.kernel.before."),
            (r"\.attn\.proj_w\.", ".mixer.kernel.after."),
            (r"\.gamma_([12])$", r".scale\1.gamma"),
            *_VIT,
        ],
        _timm_vit,
    ),
    Family(
        "timm CrossViT",
        r"^cls_token_0$",
        [
            (r"^pos_embed_(\d)$", r"branches.\1.position"),
            (r"^cls_token_(\d)$", r"branches.\1.cls_token"),
            (r"^patch_embed\.(\d)\.", r"branches.\1.stem."),
            (r"^norm\.(\d)\.", r"norms.\1."),
            (r"^head\.(\d)\.", r"head.heads.\1."),
            (r"^blocks\.(\d+)\.blocks\.", r"stages.\1.branches."),
            (r"^blocks\.(\d+)\.projs\.(\d)\.", r"stages.\1.exchanges.\2.there."),
            (r"^blocks\.(\d+)\.revert_projs\.(\d)\.", r"stages.\1.exchanges.\2.back."),
            (r"^blocks\.(\d+)\.fusion\.(\d)\.", r"stages.\1.exchanges.\2.block."),
            (r"\.attn\.w([qkv])\.", r".mixer.to_\1."),
            *_VIT,
        ],
        _timm_vit,
    ),
    Family(
        "timm Swin",
        r"\.relative_position_bias_table$",
        [
            (r"^patch_embed\.proj\.", "stem."),
            (r"^patch_embed\.norm\.", "stem_norm."),
            (r"^layers\.(\d+)\.downsample\.", lambda m: f"merges.{int(m[1]) - 1}."),
            (r"^(merges\.\d+)\.reduction\.", r"\1.linear."),
            (r"^layers\.(\d+)\.blocks\.", r"stages.\1."),
            (r"\.attn\.relative_position_bias_table$", ".mixer.position_bias.table"),
            (r"^head\.fc\.", "head."),
            *_VIT,
        ],
        _timm_swin,
    ),
    Family(
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
    Family(
        "timm MLP-Mixer",
        r"\.mlp_tokens\.",
        [(r"\.mlp_tokens\.", ".mixer."), (r"\.mlp_channels\.", ".mlp.")],
        _timm_vit,
    ),
    Family(
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
    Family(
        "timm ViT",
        r"^patch_embed\.proj\.weight$",
        [(r"\.ls([12])\.", r".scale\1."), (r"^fc_norm\.", "norm."), *_VIT],
        _timm_vit,
    ),
    Family(
        "transformers CvT",
        _CVT,
        [
            (_CVT, r"stages.\1."),
            (r"\.embedding\.convolution_embeddings\.projection\.", ".embed."),
            (r"\.embedding\.convolution_embeddings\.normalization\.", ".embed_norm."),
            (r"\.layers\.(\d+)\.", r".blocks.\1."),
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
        _as_it_is,
    ),
    Family(
        "Compact-Transformers with patches",
        r"^tokenizer\.conv_layers\.0\.0\.bias$",
        [(r"^tokenizer\.conv_layers\.0\.0\.", "stem.proj."), *_COMPACT],
        _compact_patches,
    ),
    Family("Compact-Transformers", r"^tokenizer\.conv_layers\.", _COMPACT, _as_it_is),
]


class Part(NamedTuple):
    """A tensor under its own key, and its place among those that are one of ours."""

    order: int
    key: str
    tensor: Tensor


def _spelled(name: str, spellings: Spellings) -> str:
    for pattern, ours in spellings:
        name = re.sub(pattern, ours, name)
    return name


def family_of(state: Mapping[str, Tensor]) -> Family | None:
    """The library whose model has these keys; None where it is ours or a package's."""
    keys = [_spelled(key, _WRAPPERS) for key in state]
    for family in _FAMILIES:
        if any(re.search(family.telltale, key) for key in keys):
            return family
    return None


def by_our_name(state: Mapping[str, Tensor]) -> dict[str, list[Part]]:
    """Group tensors by our spelling of their names; parts in order, in our order of rows."""
    family = family_of(state)
    unwrapped = {_spelled(key, _WRAPPERS): tensor for key, tensor in state.items()}
    groups: dict[str, list[Part]] = {}
    for key, tensor in state.items():
        name, order = _spelled(key, _WRAPPERS), 0
        if family is None:
            name = _spelled(name, _PACKAGES)
        else:
            try:
                tensor = family.convert(name, tensor, unwrapped)
                name = _spelled(name, family.spellings)
            except (KeyError, IndexError, RuntimeError, ZeroDivisionError):
                pass  # what it takes to convert it is not there: it stays what it is, unknown
        for pattern, ours, part in _PARTS:
            name, found = re.subn(pattern, ours, name)
            order = part if found else order
        groups.setdefault(name, []).append(Part(order, key, tensor))
    return {name: sorted(parts, key=lambda p: p.order) for name, parts in groups.items()}
