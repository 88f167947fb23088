"""Files of weights and models: round trips, torn and foreign files, and tables that are resized.

What does not fit is a ValueError that says what, and not one weight has changed.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vision_xformer as vx
import vision_xformer.factory
from vision_xformer.names import parse_name

TEST_MODELS = [n for n in vx.list_models() if parse_name(n).size == "test"]
State = dict[str, Tensor]


def create(name: str = "vit_test", **overrides: Any) -> vx.VisionModel:
    return vx.create_model(name, **overrides).eval()


def images(model: vx.VisionModel) -> Tensor:
    return torch.randn(3, *model.config.input_shape)


def state_of(module: nn.Module) -> State:
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype
        assert torch.equal(got[key], value), key


def assert_not_loaded(module: nn.Module, weights: Any, *words: str, resize: bool = False) -> None:
    """Refused with all of the words, and the module is as it was."""
    before = state_of(module)
    with pytest.raises(ValueError, match=r"\w") as caught:
        vx.load_weights(module, weights, resize=resize)
    for word in words:
        assert word in str(caught.value)
    assert_same(module.state_dict(), before)


def save_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    save_file({k: v.contiguous() for k, v in state.items()}, path)


def save_torch(state: Mapping[str, Tensor], path: Path) -> None:
    torch.save(dict(state), path)


FORMATS: dict[str, Callable[[Mapping[str, Tensor], Path], None]] = {
    ".safetensors": save_safetensors,
    ".pt": save_torch,
    ".pth": save_torch,
}
each_format = pytest.mark.parametrize("suffix", FORMATS)


# Round trips


@pytest.mark.parametrize("name", TEST_MODELS)
def test_save_and_load_model(name: str, tmp_path: Path) -> None:
    model = vx.create_model(name)
    model(images(model))  # statistics of batch norms, where there are any
    path = tmp_path / "model.safetensors"
    vx.save_model(model, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert model.training
    loaded = vx.load_model(path)
    assert not any(m.training for m in loaded.modules())
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert_same(loaded.state_dict(), model.state_dict())
    x = images(model)
    assert torch.equal(loaded(x), model.eval()(x))


def test_save_model_of_other_memory_formats_and_heads(tmp_path: Path) -> None:
    model = create("hybrid_vin_test").to(memory_format=torch.channels_last)
    assert not model.get_parameter("stem.convs.1.weight").is_contiguous()
    model.reset_classifier(7)
    vx.save_model(model, str(tmp_path / "model.safetensors"))
    loaded = vx.load_model(str(tmp_path / "model.safetensors"))
    x = images(model)
    torch.testing.assert_close(loaded(x), model(x))
    assert loaded.config.num_classes == 7


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("levit_test", {"distilled": True}),
        ("levip_test", {"patch_size": 1}),
        ("cvt_test", {"class_token": False}),
        ("cvl_test", {"kernel": 5}),
        ("ccn_test", {"position": "raster_sincos", "registers": 2}),
        ("cvt_lite_test", {"layer_scale": 0.1}),
        ("vit_lite_test", {"pool": "seq", "class_token": True}),
    ],
    ids=str,
)
def test_save_model_of_other_types_and_heads(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = vx.create_model(name, **fields).to(torch.float64, memory_format=torch.channels_last)
    model.reset_classifier(7)
    model(images(model).double())  # statistics of batch norms, where there are any
    vx.save_model(model.eval(), tmp_path / "model.safetensors")
    loaded = vx.load_model(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert_same(loaded.state_dict(), model.state_dict())
    x = images(model).double()
    assert loaded(x).shape == (3, 7)
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize("distilled", [False, True])
def test_fused_models_are_other_models(distilled: bool, tmp_path: Path) -> None:
    """Their files come back fused; the weights of one do not fit the other."""
    model = vx.create_model("levit_test", distilled=distilled)
    model(images(model))
    plain, x = state_of(model), images(model)
    want = model.eval()(x)
    model.fuse()
    vx.save_model(model, tmp_path / "model.safetensors")
    loaded = vx.load_model(tmp_path / "model.safetensors")
    assert loaded.config.fused
    assert_same(loaded.state_dict(), model.state_dict())
    torch.testing.assert_close(loaded(x), want)
    assert_not_loaded(model, plain, "LeViT", "missing", "not in the module")
    fresh = create("levit_test", distilled=distilled)
    assert_not_loaded(fresh, model.state_dict(), "LeViT", "missing", "not in the module")
    vx.load_weights(fresh, plain)
    torch.testing.assert_close(fresh(x), want)


def test_save_model_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for name in ("vit_test", "vin_test_rope"):
        vx.save_model(create(name), path)
        assert vx.load_model(path).config == create(name).config
    assert list(tmp_path.iterdir()) == [path]


@each_format
@pytest.mark.parametrize(
    "name",
    ["hybrid_vil_test", "vip_test_rope", "fnet2d_test", "levit_test", "levif_test", "cvl_test",
     "ccp_test", "vin_lite_test"],
)  # fmt: skip
def test_state_dict_files(name: str, suffix: str, tmp_path: Path) -> None:
    source, target, again = create(name), create(name), create(name)
    path = tmp_path / f"weights{suffix}"
    FORMATS[suffix](source.state_dict(), path)
    for where, module in ((path, target), (str(path), again)):
        report = vx.load_weights(module, where)
        assert report.used == sorted(source.state_dict())
        assert report.resized == []
        assert_same(module.state_dict(), source.state_dict())


@pytest.mark.parametrize("name", ["vit_test", "levin_test", "cvt_test", "cct_test"])
def test_state_dicts_of_wrapped_models_and_other_types(name: str) -> None:
    source, target = create(name), create(name)

    def cast(dtype: torch.dtype) -> State:  # but for the number of batches
        state = source.state_dict()
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}

    vx.load_weights(target, {f"module.{k}": v for k, v in cast(torch.float64).items()})
    assert_same(target.state_dict(), source.state_dict())
    low = create(name).bfloat16()
    vx.load_weights(low, source.state_dict())
    assert_same(low.state_dict(), cast(torch.bfloat16))


def test_the_module_keeps_no_memory_of_the_source() -> None:
    source, target = create(), create()
    vx.load_weights(target, source.state_dict())
    before = state_of(target)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    assert_same(target.state_dict(), before)
    assert all(p.requires_grad for p in target.parameters())


# Files that are no files of weights


@each_format
@pytest.mark.parametrize("part", [0.0, 0.001, 0.02, 0.3, 0.5, 0.9, 0.99])
def test_torn_files(suffix: str, part: float, tmp_path: Path) -> None:
    whole, torn = tmp_path / f"whole{suffix}", tmp_path / f"torn{suffix}"
    FORMATS[suffix](create().state_dict(), whole)
    data = whole.read_bytes()
    torn.write_bytes(data[: int(part * len(data))])
    assert_not_loaded(create(), torn, str(torn))
    with pytest.raises(ValueError, match=torn.name):
        vx.load_model(torn)


def test_a_torn_model_file_by_single_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    vx.save_model(create(), path)
    data = path.read_bytes()
    for length in (1, 7, 8, 9, 100, len(data) - 1):
        path.write_bytes(data[:length])
        assert_not_loaded(create(), path, str(path))
        with pytest.raises(ValueError, match=path.name):
            vx.load_model(path)
    path.write_bytes(data)
    assert vx.load_model(path).config == create().config


@each_format
def test_files_of_anything_else(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    assert_not_loaded(create(), path, "no weights at", str(path))
    with pytest.raises(ValueError, match="no weights at"):
        vx.load_model(path)
    assert_not_loaded(create(), tmp_path, str(tmp_path))
    for data in (b"", b"not weights, " * 99, b"\x80\x04N.", bytes(99)):
        path.write_bytes(data)
        assert_not_loaded(create(), path, str(path))
        with pytest.raises(ValueError, match=path.name):
            vx.load_model(path)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_pickles_are_not_run(save: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    path, touched = tmp_path / "weights.pt", tmp_path / "touched"
    save({**create().state_dict(), "trap": Trap(touched)}, path)
    assert_not_loaded(create(), path, str(path))
    assert not touched.exists()


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(3)],
        torch.ones(3),
        {"layers": {"head.bias": torch.ones(5)}, "epoch": 3},
        {"head.bias": [1.0, 2.0]},
        None,
    ],
    ids=["list", "tensor", "nested", "numbers", "nothing"],
)
def test_files_of_other_things(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    assert_not_loaded(create(), path, str(path), "state dict")


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_load_model_needs_save_models_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    save_torch(create().state_dict(), path)
    with pytest.raises(ValueError, match=f"{path.name}.*save_model"):
        vx.load_model(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, r"no model configuration.*save_model"),
        ({"format": "pt"}, r"no model configuration.*save_model"),
        ({"config": "{"}, r"line 1 column 2"),
        ({"config": "[3]"}, r"'backbone'"),
        ({"config": "{}"}, r"'backbone'"),
        ({"config": '{"backbone": "vitt"}'}, r"'vitt'.*'vit'"),
        ({"config": '{"backbone": "vit", "dept": 2}'}, r"'dept'.*'depth'"),
        ({"config": json.dumps(create("vin_test").config.to_dict())}, r"kernel\.residual"),
        ({"config": json.dumps(create("cvt_test").config.to_dict())}, r"of this CvT: missing"),
    ],
    ids=["none", "other", "torn", "list", "empty", "backbone", "field", "weights", "family"],
)
def test_load_model_of_another_configuration(
    metadata: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(create().state_dict(), path, metadata)
    with pytest.raises(ValueError, match=message) as caught:
        vx.load_model(path)
    assert str(path) in str(caught.value)
    vx.load_weights(create(), path)


# Weights of something else


def test_another_models_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_safetensors(create("vil_test").state_dict(), path)
    words = [str(path), "ViT", "not in the module", "mixer.kernel.proj_k.grid"]
    assert_not_loaded(create(), path, *words)
    words = ["missing", "blocks.0.mixer.kernel.proj_k.grid"]
    assert_not_loaded(create("vil_test"), create().state_dict(), *words)
    words = ["head.bias", "(5,)", "(7,)", "head.weight", "(5, 24)", "(7, 24)"]
    assert_not_loaded(create(num_classes=7), create().state_dict(), *words)
    words = ["missing", "blocks.2.", "and 6 more"]
    assert_not_loaded(create(depth=3), create().state_dict(), *words)
    words = ["not in the module", "blocks.2.", "and 6 more"]
    assert_not_loaded(create(), create(depth=3).state_dict(), *words)
    assert_not_loaded(
        create(dim=18), create().state_dict(), "cls_token", "(1, 1, 24)", "(1, 1, 18)"
    )
    assert_not_loaded(create(), {}, "missing")


FAMILIES = {"vit_test": "ViT", "levit_test": "LeViT", "cvt_test": "CvT",
            "cct_test": "CCT", "vit_lite_test": "ViTLite"}  # fmt: skip


@pytest.mark.parametrize("target", FAMILIES)
@pytest.mark.parametrize("source", FAMILIES)
def test_another_familys_weights(source: str, target: str) -> None:
    """Of a like name and size, they are refused; their own are not."""
    state = create(source).state_dict()
    if source == target:
        vx.load_weights(create(target), state)
    else:
        assert_not_loaded(create(target), state, f"of this {FAMILIES[target]}: ")


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("vit_test", "stem.proj.weight"),
        ("vit_test", "blocks.1.mlp.fc2.bias"),
        ("vit_test", "head.weight"),
        ("levit_test", "stem.convs.1.norm.running_var"),
        ("levit_test", "stages.1.downsample.block.mixer.projection.kv.linear.weight"),
        ("levit_test", "head.norm.bias"),
        ("cvt_test", "stages.1.downsample.conv.weight"),
        ("cvt_test", "stages.1.0.mixer.projection.convs.2.conv.weight"),
        ("cct_test", "stem.convs.1.weight"),
        ("cct_test", "pool.attention.weight"),
    ],
)
def test_one_wrong_key_of_many(name: str, key: str, resize: bool) -> None:
    module, good = create(name), state_of(create(name))
    missing = {k: v for k, v in good.items() if k != key}
    assert_not_loaded(module, missing, "missing", key, resize=resize)
    renamed = {**missing, "spam": good[key]}
    assert_not_loaded(module, renamed, "missing", key, "spam", resize=resize)
    words = [key, str(tuple(good[key].shape))]
    assert_not_loaded(module, {**good, key: good[key][1:]}, *words, resize=resize)
    more = {**good, "epoch": torch.tensor(3)}
    assert_not_loaded(module, more, "not in the module", "epoch", resize=resize)
    vx.load_weights(module, good, resize=resize)
    assert_same(module.state_dict(), good)


def test_one_tensor_under_two_names() -> None:
    good = state_of(create())
    twice = {**good, "mlp_head.1.bias": good["head.bias"]}
    assert_not_loaded(create(), twice, "head.bias", "mlp_head.1.bias")


# Another grid


def assert_resized(source: vx.VisionModel, target: vx.VisionModel, tables: set[str]) -> State:
    """Refused without resize=True; with it only the tables change. Returns the new state."""
    state = state_of(source)
    grids = [k for k in tables if k.endswith(".grid")]
    assert_not_loaded(target, state, "resize=True", *grids)
    report = vx.load_weights(target, state, resize=True)
    assert set(report.resized) == tables
    assert set(report.used) == set(state) - tables
    new = state_of(target)
    for key in state.keys() - set(grids):
        assert torch.equal(new[key], state[key]), key
    assert target(images(target)).isfinite().all()
    return new


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((3, 14, 10), (3, 22, 26)),
        ((3, 14, 10), (3, 10, 14)),
        ((3, 22, 26), (3, 6, 4)),
        ((3, 14), (3, 22)),
        ((3, 4, 6, 10), (3, 6, 4, 14)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("registers", "pool"), [(0, "cls"), (2, "cls"), (3, "mean"), (0, "mean")])
def test_learned_positions_are_resized(
    old: tuple[int, ...], new: tuple[int, ...], registers: int, pool: str
) -> None:
    """A constant stays a constant, a slope rises along its own axis; prefix rows stay."""
    fields: dict[str, Any] = dict(registers=registers, pool=pool)
    source = create(input_shape=old, **fields)
    table = source.get_parameter("position.grid")
    with torch.no_grad():
        table.zero_()
        table[..., 0] = 3.0
        for axis in range(table.ndim - 1):
            slope = torch.linspace(-1, 1, table.shape[axis])
            table[..., 1 + axis] = slope.view(-1, *(1,) * (table.ndim - 2 - axis))
    prefix = {"position.prefix"} if "position.prefix" in source.state_dict() else set()
    assert bool(prefix) == (registers > 0 or pool == "cls")
    target = create(input_shape=new, **fields)
    grid = assert_resized(source, target, {"position.grid", *prefix})["position.grid"]
    assert grid.shape[:-1] == tuple(s // 2 for s in new[1:])
    torch.testing.assert_close(grid[..., 0], torch.full(grid.shape[:-1], 3.0))
    for axis in range(grid.ndim - 1):
        slope = grid[..., 1 + axis].movedim(axis, 0)
        assert (slope.diff(dim=0) > 0).all()
        torch.testing.assert_close(slope, -slope.flip(0))
        across = slope.reshape(len(slope), -1)
        torch.testing.assert_close(across, across[:, :1].expand_as(across))


@pytest.mark.parametrize(
    ("old", "new"), [((14, 10), (22, 26)), ((14, 10), (10, 14)), ((22, 6), (4, 10))], ids=str
)
@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("share_kv", [True, False])
def test_length_projections_are_resized(
    old: tuple[int, int], new: tuple[int, int], registers: int, share_kv: bool
) -> None:
    """They weigh a sum over the tokens, and the sum stays as large."""
    fields: dict[str, Any] = dict(
        registers=registers, mixer_options={"rank": 5, "share_kv": share_kv}
    )
    source = create("vil_test", image_size=old, **fields)
    projections = [k for k in source.state_dict() if ".kernel.proj_" in k and k.endswith(".grid")]
    assert len(projections) == 2 * (1 if share_kv else 2)
    constant = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    with torch.no_grad():
        for key in projections:
            source.get_parameter(key).copy_(constant.expand_as(source.get_parameter(key)))
    prefixes = {k.replace(".grid", ".prefix") for k in projections}
    tables = {*projections, *prefixes, "position.grid", "position.prefix"}
    state = assert_resized(source, create("vil_test", image_size=new, **fields), tables)
    cells = old[0] * old[1] // 4
    for key in projections:
        torch.testing.assert_close(state[key].sum((0, 1)), constant * cells)
        torch.testing.assert_close(state[key], state[key][:1, :1].expand_as(state[key]))


@pytest.mark.parametrize(("old", "new"), [((64,), (16,)), ((8, 8, 8), (2, 4, 2))])
def test_fresh_length_projections_keep_their_sums(
    old: tuple[int, ...], new: tuple[int, ...]
) -> None:
    """Of signals and volumes too: what lies between two new places is not skipped."""
    options = {"rank": 4}
    source, target = (
        vx.create_model("vil_test", input_shape=(1, *s), patch_size=1, mixer_options=options)
        for s in (old, new)
    )
    vx.load_weights(target, source.state_dict(), resize=True)
    before, after = (
        m.blocks[0].mixer.kernel.proj_k.grid.detach().flatten(0, -2).sum(0)
        for m in (source, target)
    )
    torch.testing.assert_close(after, before, rtol=0.1, atol=0.1)


def test_a_table_without_its_grid_is_refused() -> None:
    model = vx.create_model("vit_test")
    state = model.state_dict()
    del state["position.grid"]
    for resize in (False, True):
        with pytest.raises(ValueError, match=r"position.prefix"):
            vx.load_weights(model, state, resize=resize)


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone.", "encoder.",
            "model.encoder.", "module.backbone._orig_mod."]  # fmt: skip
WRAPPERS = ["model", "state_dict", "state_dict_ema", "model_ema"]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["cvt_test", "levit_test", "pvt_test", "cait_test"])
def test_prefixes_of_modules_around_a_model(name: str, prefix: str) -> None:
    """Also if the head is next to the backbone."""
    source = create(name)
    for state in (
        {prefix + k: v for k, v in source.state_dict().items()},
        {k if k.startswith("head.") else prefix + k: v for k, v in source.state_dict().items()},
    ):
        target = create(name)
        vx.load_weights(target, state)
        assert_same(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("prefix", ["student.", "mode.", "head.model."])
def test_other_prefixes_are_not_ignored(prefix: str) -> None:
    state = {prefix + k: v for k, v in create().state_dict().items()}
    assert_not_loaded(create(), state, "missing", "not in the module", prefix)


@each_format
@pytest.mark.parametrize("key", WRAPPERS)
def test_state_dicts_in_checkpoints(key: str, suffix: str, tmp_path: Path) -> None:
    source, path = create(), tmp_path / f"weights{suffix}"
    checkpoint = {"epoch": 3, key: {f"module.{k}": v for k, v in source.state_dict().items()}}
    given: list[Any] = [checkpoint, {"state_dict": checkpoint}]
    if suffix != ".safetensors":
        torch.save({**checkpoint, "args": argparse.Namespace(lr=0.1)}, path)
        given.append(path)
    for weights in given:
        target = create()
        vx.load_weights(target, weights)
        assert_same(target.state_dict(), source.state_dict())
    assert_not_loaded(create(), {key: {"epoch": 3}}, "tensors by name", "'epoch'")


def test_averaged_weights_come_first() -> None:
    """As in timm."""
    models = {key: create() for key in WRAPPERS}
    checkpoint: dict[str, Any] = {key: model.state_dict() for key, model in models.items()}
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        target = create()
        vx.load_weights(target, checkpoint)
        assert_same(target.state_dict(), models[key].state_dict())
        del checkpoint[key]


def test_create_model_carries_weights_over_to_another_input() -> None:
    """Another size, number of channels and number of classes; a warning reports it."""
    source = create(num_classes=5)
    message = r"2 resized: position\.grid.*1 adapted to other channels: stem\.proj\.weight; 2 left"
    with pytest.warns(UserWarning, match=message):
        model = create(image_size=22, channels=1, num_classes=7, weights=source.state_dict())
    stem = source.get_parameter("stem.proj.weight").unflatten(1, (4, 3)).sum(2)
    torch.testing.assert_close(model.get_parameter("stem.proj.weight"), stem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create(image_size=22, channels=4, weights=source.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_parallel_and_compiled_models(prefix: str) -> None:
    source, target = (vx.create_model("vin_test", pool="mean") for _ in range(2))
    vx.load_weights(target, {prefix + k: v for k, v in source.state_dict().items()})
    assert torch.equal(target.fc_norm.weight, source.fc_norm.weight)
    assert torch.equal(target.head.weight, source.head.weight)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vit_test", {"position": "sincos"}),
        ("vit_test_rope", {}),
        ("levit_test", {}),
        ("levit_test_rope", {}),
        ("cvt_test_rope", {}),
        ("cct_test", {"position": "raster_sincos"}),
    ],
    ids=str,
)
def test_a_model_made_on_the_meta_device_gets_its_fixed_tables(
    name: str, fields: dict[str, Any]
) -> None:
    model = vx.create_model(name, **fields).eval()
    with torch.device("meta"):
        empty = vx.create_model(name, **fields)
    empty = empty.to_empty(device="cpu").eval()
    empty.load_state_dict(model.state_dict())
    x = images(model)
    assert torch.equal(empty(x), model(x))


@pytest.mark.parametrize(
    ("name", "fields", "key", "width"),
    [
        ("vit_test", {}, "position.grid", 24),
        ("vil_test", {}, "position.grid", 24),
        ("levit_test", {}, "stages.1.downsample.block.mixer.position_bias.grid", 3),
        ("cvl_test", {"embed_strides": (1, 1), "mixer_options": {"rank": 5}},
         "stages.0.0.mixer.kernel.proj_k.grid", 5),
        ("cct_test", {"stem_options": {"layers": 1, "pool_stride": 1}}, "position.grid", 24),
    ],
    ids=["vit", "vil", "levit", "cvl", "cct"],
)  # fmt: skip
def test_as_many_rows_of_another_grid(
    name: str, fields: dict[str, Any], key: str, width: int
) -> None:
    """(4, 8) and (8, 4) have as many tokens, at other places."""
    if not name.startswith("cv"):
        fields = {**fields, "patch_size": 1}
    kv_stride = 2 if name.startswith("cv") else 1
    low, high = 4 // kv_stride, 8 // kv_stride
    wide, tall, again = (create(name, image_size=s, **fields) for s in ((4, 8), (8, 4), (4, 8)))
    words = [key, f"({low}, {high}, {width})", f"({high}, {low}, {width})", "resize=True"]
    assert_not_loaded(tall, wide.state_dict(), *words)
    assert key in vx.load_weights(tall, wide.state_dict(), resize=True).resized
    assert vx.load_weights(again, wide.state_dict(), resize=True).resized == []


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (dict(input_shape=(3, 32)), dict(input_shape=(3, 4, 8)), ["position", "(32, 24)"]),
        (dict(registers=2), dict(), ["reg_token", "not in the module"]),
        (dict(), dict(registers=2), ["reg_token", "missing"]),
        (dict(pool="mean"), dict(pool="mean", class_token=True), ["cls_token", "missing"]),
        (dict(), dict(position="sincos"), ["position.grid", "not in the module"]),
        (dict(position="none"), dict(), ["position.grid", "missing"]),
        (dict(), dict(dim=30), ["position.grid", "(14, 10, 24)", "(14, 10, 30)"]),
    ],
    ids=str,
)
def test_what_resizing_cannot_do(
    old: dict[str, Any], new: dict[str, Any], words: list[str], resize: bool
) -> None:
    source, target = (create(patch_size=1, **fields) for fields in (old, new))
    assert_not_loaded(target, source.state_dict(), *words, resize=resize)


def published_spelling(state: State) -> State:
    """Positions as the published package saves them: one table without a grid."""
    rows = torch.cat((state.pop("position.prefix"), state.pop("position.grid").flatten(0, -2)))
    return {**state, "pos_embedding": rows[None]}


@pytest.mark.parametrize(
    ("old", "new"),
    [((8, 8), (6, 6)), ((4, 8), (6, 12)), ((8, 8), (6, 10)), ((6, 12), (4, 8))],
    ids=str,
)
def test_tables_that_do_not_say_their_grid(old: tuple[int, int], new: tuple[int, int]) -> None:
    """Their grid has the proportions of the target's, or else is square."""
    source = create(patch_size=1, image_size=old)
    same, other, want = (create(patch_size=1, image_size=s) for s in (old, new, new))
    state = published_spelling(state_of(source))
    assert "pos_embedding" in vx.load_weights(same, state).used
    assert_same(same.state_dict(), source.state_dict())
    assert_not_loaded(other, state, "pos_embedding", "resize=True")
    assert vx.load_weights(other, state, resize=True).resized == ["pos_embedding"]
    vx.load_weights(want, source.state_dict(), resize=True)
    assert_same(other.state_dict(), want.state_dict())


def test_a_table_of_no_known_grid() -> None:
    state = published_spelling(state_of(create(patch_size=1, image_size=(3, 11))))
    words = ["pos_embedding", "(1, 34, 24)"]
    assert_not_loaded(create(patch_size=1, image_size=8), state, *words, resize=True)


# Writing


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_save_leaves_the_old_file(
    error: BaseException, existed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    old = create()
    if existed:
        vx.save_model(old, path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real = vision_xformer.factory.save_file

    def half(state: State, file: Path, metadata: dict[str, str]) -> None:
        real(state, file, metadata)
        data = Path(file).read_bytes()
        Path(file).write_bytes(data[: len(data) // 2])
        raise error

    monkeypatch.setattr(vision_xformer.factory, "save_file", half)
    with pytest.raises(type(error)):
        vx.save_model(create(), path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    if existed:
        assert_same(vx.load_model(path).state_dict(), old.state_dict())


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    """Anything that reads safetensors reads it; the configuration is in its metadata."""
    model, path = create("vin_test"), tmp_path / "model.safetensors"
    vx.save_model(model, path)
    assert_same(load_file(path), model.state_dict())
    header = path.read_bytes()
    length = int.from_bytes(header[:8], "little")
    metadata = json.loads(header[8 : 8 + length])["__metadata__"]
    assert vx.create_model(json.loads(metadata["config"])).config == model.config


# What is no state dict


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "must be a state dict or the path of a file, not NoneType"),
        (3, "not int"),
        ({1: torch.zeros(2)}, "tensors by name; 1 is of type Tensor"),
        ({"head.bias": [0.0]}, "'head.bias' is of type list"),
        ({"head.bias": torch.zeros(5).numpy()}, "'head.bias' is of type ndarray"),
        ({"head.bias": torch.zeros(5, device="meta")}, "dense, real and in memory; 'head.bias'"),
        ({"head.bias": torch.zeros(5).to_sparse()}, "dense, real and in memory; 'head.bias'"),
        ({"head.bias": torch.zeros(5, dtype=torch.complex64)}, "dense, real and in memory"),
    ],
    ids=str,
)
def test_what_cannot_be_copied_changes_nothing(weights: Any, message: str) -> None:
    model = vx.create_model("vit_test")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if isinstance(weights, dict):
        weights = {**vx.create_model("vit_test").state_dict(), **weights}
    for strict in (True, False):
        with pytest.raises(ValueError, match=re.escape(message)):
            vx.load_weights(model, weights, strict=strict)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_on_the_meta_device_holds_nothing() -> None:
    weights = vx.create_model("levin_test").state_dict()
    with torch.device("meta"):
        model = vx.create_model("levin_test")
    with pytest.raises(ValueError, match=r"LeViT is on the meta device: call to_empty"):
        vx.load_weights(model, weights)
    assert vx.load_weights(model.to_empty(device="cpu"), weights).missing == []


def test_save_model_says_where_it_cannot(tmp_path: Path) -> None:
    model = vx.create_model("vit_test")
    for path in (tmp_path / "nowhere" / "a.safetensors", tmp_path / "folder.safetensors"):
        (tmp_path / "folder.safetensors").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"must be a file in a folder that exists"):
            vx.save_model(model, path)
    with pytest.raises(ValueError, match=r"takes a model of create_model, not a Linear"):
        vx.save_model(torch.nn.Linear(2, 3), tmp_path / "a.safetensors")
