"""Compatibility with other tools, for every model and mixer in the registries.

Oracles are plain autograd, the same weights in another place, and masks written out.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import timm
import torch
from influence import shake
from test_contract import (
    GRIDS,
    TEST_MODELS,
    each_test_model,
    images,
    make,
    on_meta,
    one_block,
    tokens,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import vision_xformer as vx
from vision_xformer.layers import BATCH_NORM
from vision_xformer.names import parse_name
from vision_xformer.positions import FixedTable

# rotary angles add no layer
WITHOUT_ANGLES = [n for n in TEST_MODELS if not parse_name(n).rope]
each_set_of_layers = pytest.mark.parametrize("name", WITHOUT_ANGLES)
each_model_angles_slow = pytest.mark.parametrize(
    "name",
    [n if n in WITHOUT_ANGLES else pytest.param(n, marks=pytest.mark.slow) for n in TEST_MODELS],
)


def _is_new(name: str) -> bool:
    """Whether it is a backbone with its default mixer, or a ViT with any, and its default stem."""
    parsed = parse_name(name)
    plain = not (parsed.rope or parsed.hybrid)
    return plain and (parsed.backbone == "vit" or parsed.letter in ("t", None))


# of tests that take longer
each_backbone = pytest.mark.parametrize(
    "name", [n if _is_new(n) else pytest.param(n, marks=pytest.mark.slow) for n in TEST_MODELS]
)


def shaken(name: str, **overrides: Any) -> vx.VisionModel:
    """A model in float64 for evaluation, whose branches and statistics are not trivial."""
    model = vx.create_model(name, **overrides).double().eval()
    shake(model, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def assert_near(got: Any, want: Any, tolerance: float = 1e-9) -> None:
    """Whether the largest difference is small compared with the largest value."""
    got, want = (torch.cat([t.detach().flatten() for t in ts]) for ts in (got, want))
    assert want.any()
    assert float((got - want).abs().max() / want.abs().max()) <= tolerance


# Derivatives

# forward mode compiles PyTorch's own decompositions with torch.jit.script
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


def assert_transforms(module: nn.Module, x: Tensor, *rest: Any) -> None:
    """torch.func and derivatives of derivatives equal those of autograd."""
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    state = parameters or {"": x.new_zeros(())}  # some mixers have none
    direction = {key: torch.randn_like(value) for key, value in state.items()}

    def loss(state: dict[str, Tensor], x: Tensor) -> Tensor:
        given = {**state, **buffers} if parameters else buffers
        y: Tensor = functional_call(module, given, (x, *rest))
        return y.square().sum()

    def backward(x: Tensor, **more: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            module(x, *rest).square().sum(), [*parameters.values(), x], **more
        )

    x = x.detach().requires_grad_()
    tangents = [*(direction[key] for key in parameters), torch.randn_like(x)]
    once = backward(x)
    created = backward(x, create_graph=True)
    assert_near(created, once)
    products = sum((g * t).sum() for g, t in zip(created, tangents, strict=True))
    twice = torch.autograd.grad(products, [*parameters.values(), x])

    def of_all(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        """Gradients in the order of autograd."""
        by_name, of_x = grad(loss, argnums=(0, 1))(state, x)
        return [*(by_name[key] for key in parameters), of_x]

    # forward mode over reverse mode is the other way to second derivatives
    inputs = ((state, x.detach()), (direction, tangents[-1]))
    first, second = jvp(of_all, *inputs)
    assert_near(first, once)
    assert_near(second, twice)
    _, slope = jvp(loss, *inputs)
    assert_near([slope], [sum((g * t).sum() for g, t in zip(once, tangents, strict=True))])

    samples = [backward(sample[None].detach().requires_grad_()) for sample in x]
    for index, got in enumerate(zip(*vmap(of_all, (None, 0))(state, x[:, None]), strict=True)):
        assert_near(got, samples[index])


@forward_mode
@each_model_angles_slow
def test_torch_func_of_models(name: str) -> None:
    model = shaken(name, **one_block(name))
    assert_transforms(model, images(model, 2))


@forward_mode
@pytest.mark.parametrize("name", vx.list_mixers())
@pytest.mark.parametrize("axes", ["1-D", "2-D"])
def test_torch_func_of_mixers(name: str, axes: str) -> None:
    grid = GRIDS[axes]
    mixer = make(name, grid).eval()
    assert_transforms(mixer, tokens(grid, 2), grid)


@pytest.mark.parametrize("name", vx.list_mixers())
def test_second_derivatives_after_autocast(name: str) -> None:
    """As in a gradient penalty: the backward passes are not inside autocast."""
    grid = GRIDS["2-D"]
    mixer, x = make(name, grid).float().eval(), tokens(grid, 2).float().requires_grad_()
    weights = [p for p in mixer.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x, grid)
    (slope,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    if slope.requires_grad:
        found = torch.autograd.grad(slope.square().sum(), [x, *weights], allow_unused=True)
        assert all(g.isfinite().all() for g in found if g is not None)


@each_model_angles_slow
def test_ensembles(name: str) -> None:
    models = [shaken(name) for _ in range(2)]
    x = images(models[0], 2)
    state = stack_module_state(models)  # type: ignore[arg-type]

    def logits(state: tuple[dict[str, Tensor], ...], x: Tensor) -> Any:
        return functional_call(models[0], state, (x,))

    with torch.no_grad():
        got = vmap(logits, (0, None))(state, x)
        assert_near(got, [model(x) for model in models])


def test_torch_func_of_training_with_batch_statistics() -> None:
    model = shaken("levit_test").train()
    x, before = images(model, 3), copy.deepcopy(model.state_dict())
    wanted = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
    model.load_state_dict(before)
    state = dict(model.named_parameters())
    buffers = {key: value.clone() for key, value in model.named_buffers()}

    def loss(state: dict[str, Tensor]) -> Tensor:
        counted = {key: value.clone() for key, value in buffers.items()}
        y: Tensor = functional_call(model, {**state, **counted}, (x,))
        return y.square().sum()

    got = grad(loss)(state)
    assert_near(got.values(), wanted)


@forward_mode
@pytest.mark.parametrize("name", ["vit_test", "vin_test", "vip_test", "vif_test"])
def test_forward_mode_without_torch_func(name: str) -> None:
    model = shaken(name)
    x, direction = images(model, 2), images(model, 2)
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    assert_near([slope], [jvp(model, (x,), (direction,))[1]])
    weights = torch.randn_like(slope)
    x.requires_grad_()
    (backward,) = torch.autograd.grad((model(x) * weights).sum(), x)
    assert_near([(slope * weights).sum()], [(backward * direction).sum()])


def test_checkpoints_are_refused_within_torch_func() -> None:
    model = shaken("vit_test")
    model.set_grad_checkpointing()
    x = images(model, 2)
    with pytest.raises(ValueError, match=r"call set_grad_checkpointing\(False\) first"):
        grad(lambda x: model(x).sum())(x)
    model.set_grad_checkpointing(False)
    assert grad(lambda x: model(x).sum())(x).any()


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_of_one_sample_in_any_memory_format(axes: int, training: bool) -> None:
    """PyTorch's own has wrong gradients if the gradient has another format than the sample."""
    shape = (1, 8, 3, 2, 5)[: 2 + axes]
    norm = BATCH_NORM[axes](8).double().train(training)
    nn.init.normal_(norm.weight)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    last = (*range(2, 2 + axes), 0, 1)  # (*grid, B, C) in memory
    back = [last.index(axis) for axis in range(2 + axes)]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    d = torch.randn([shape[axis] for axis in last], dtype=torch.float64).permute(back)
    others = [0, *range(2, 2 + axes)]
    mean, variance = norm.running_mean, norm.running_var
    if training:
        mean, variance = x.mean(others), x.var(others, unbiased=False)
    cells = (slice(None), *[None] * axes)
    scale = norm.weight * (variance + norm.eps).rsqrt()
    want = (x - mean[cells]) * scale[cells] + norm.bias[cells]
    mean_before, count = norm.running_mean.clone(), x.numel() // 8
    got = norm(x)
    assert_near([got], [want])
    wanted = [x, norm.weight, norm.bias]
    assert_near(torch.autograd.grad(got, wanted, d), torch.autograd.grad(want, wanted, d))
    if training:
        assert_near([norm.running_mean], [0.9 * mean_before + 0.1 * x.mean(others)])
        assert norm.running_var.isfinite().all()
        assert count > 1


# Weights that are assigned instead of copied


def assigned(model: vx.VisionModel) -> vx.VisionModel:
    """The same model, built on the meta device, with the tensors of the other assigned."""
    same = on_meta(model.config)
    same.load_state_dict(model.state_dict(), assign=True)
    return same.eval()


def emptied(model: vx.VisionModel) -> vx.VisionModel:
    same = on_meta(model.config).to_empty(device="cpu").to(next(model.parameters()).dtype)
    same.load_state_dict(model.state_dict())
    return same.eval()


def replaced(model: vx.VisionModel) -> vx.VisionModel:
    """As tools do that replace only parameters and saved buffers."""
    same = on_meta(model.config)
    for key, value in model.state_dict().items():
        accelerate.utils.set_module_tensor_to_device(same, key, "cpu", value, value.dtype)
    return same.eval()


def moved(model: vx.VisionModel) -> vx.VisionModel:
    same = vx.create_model(model.config).to("meta").to_empty(device="cpu")
    same.to(next(model.parameters()).dtype).load_state_dict(model.state_dict())
    return same.eval()


WAYS: dict[str, Callable[[vx.VisionModel], vx.VisionModel]] = {
    "assign": assigned,
    "to_empty": emptied,
    "replace": replaced,
    "to": moved,
}


@each_test_model
def test_built_on_meta(name: str) -> None:
    model = shaken(name)
    x = images(model, 2)
    with torch.no_grad():
        want = model(x)
        for way, build in WAYS.items():
            same = build(model)
            assert torch.equal(same(x), want), way
            assert torch.equal(same(x), want), way


TABLES = {
    "sincos": ("vit_test", dict(position="sincos")),
    "raster": ("vit_test", dict(rope="raster")),
    "fft": ("vit_test", dict(stem="fft", position="raster_sincos")),
    "offsets": ("levit_test", {}),
    "windows": ("swin_test", {}),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_follow_the_type(table: str, way: str, dtype: torch.dtype) -> None:
    name, fields = TABLES[table]
    model = vx.create_model(name, **fields).to(dtype).eval()
    x = images(model, 2)
    same = WAYS[way](model)
    assert any(isinstance(module, FixedTable) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(same(x), model(x))
        with torch.autocast("cpu"):
            assert torch.equal(same(x), model(x))
    twins = zip(model.named_buffers(), same.named_buffers(), strict=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for (_, a), (_, b) in twins)


@pytest.mark.parametrize("table", TABLES)
def test_a_table_made_in_inference_mode_serves_training(table: str) -> None:
    name, fields = TABLES[table]
    model = replaced(vx.create_model(name, **fields))
    with torch.inference_mode():
        model(images(model, 2))
    model(images(model, 2)).sum().backward()


@pytest.mark.parametrize(
    "table", [t if t == "raster" else pytest.param(t, marks=pytest.mark.slow) for t in TABLES]
)
def test_assigned_models_can_be_compiled_and_exported_at_once(table: str) -> None:
    name, fields = TABLES[table]
    model = shaken(name, **fields, **one_block(name))
    x = images(model, 3)
    torch._dynamo.reset()
    compiled = torch.compile(assigned(model), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(assigned(model), (x,)).module()
    for same in (compiled, exported):
        torch.testing.assert_close(same(x), model(x), rtol=0, atol=1e-10)


@each_backbone
def test_saved_files_load_with_accelerate(name: str, tmp_path: Path) -> None:
    model = shaken(name).float()
    x, path = images(model, 2), tmp_path / "model.safetensors"
    vx.save_model(model, path)
    with accelerate.init_empty_weights():
        empty = vx.create_model(model.config)
    same = accelerate.load_checkpoint_and_dispatch(empty, str(path), device_map={"": "cpu"}).eval()
    with torch.no_grad():
        assert torch.equal(same(x), model(x))
        state = accelerate.utils.modeling.load_state_dict(str(path))
        assert state.keys() == model.state_dict().keys()


# Copies and traces


@each_set_of_layers
def test_averages_of_weights(name: str) -> None:
    model = shaken(name).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    average.update_parameters(model)
    other = copy.deepcopy(model)
    shake(other)
    average.update_parameters(other)
    want = copy.deepcopy(model)
    with torch.no_grad():
        states = (m.state_dict().values() for m in (want, model, other))
        for mean, a, b in zip(*states, strict=True):
            mean.copy_((a + b) / 2 if a.is_floating_point() else a)
        x = images(model, 2)
        assert_near([average.eval()(x)], [want.eval()(x)])


@each_backbone
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces(name: str) -> None:
    model = shaken(name)
    x = images(model, 2)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (x,), check_trace=False), file)
    file.seek(0)
    traced = torch.jit.load(file)
    with torch.no_grad():
        for batch in (x, images(model, 2)):
            assert_near([traced(batch)], [model(batch)], 1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"), [("cvt", torch.float32), ("cvt", torch.bfloat16), ("vit", torch.float32)]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_pass_their_check(name: str, dtype: torch.dtype) -> None:
    # torch.jit.trace traces again without gradients and compares the graphs
    model = shaken(name).to(dtype)
    torch.jit.trace(model, (images(model, 2).to(dtype),))


# Layers that are replaced, wrapped or masked

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layers(model: nn.Module, kinds: Any = LAYERS) -> Iterator[tuple[str, nn.Module]]:
    return ((key, module) for key, module in model.named_modules() if isinstance(module, kinds))


@each_set_of_layers
def test_low_rank_adapters(name: str) -> None:
    """Each has a gradient, and the merged model has the logits of the adapted one."""
    model = shaken(name)
    x = images(model, 2)
    config = peft.LoraConfig(
        r=2, target_modules=[key for key, _ in layers(model, nn.Linear)], init_lora_weights=False
    )
    before, linear = model(x), [*layers(model, nn.Linear)]
    adapted = peft.get_peft_model(model, config).double().eval()
    logits = adapted(x)
    assert (logits - before).abs().max() > 1e-6
    logits.square().sum().backward()
    added = {key: p.grad for key, p in adapted.named_parameters() if "lora_" in key}
    assert len(added) == 2 * len(linear)
    assert all(grad is not None and grad.any() for grad in added.values())
    assert_near([adapted.merge_and_unload()(x)], [logits])


@each_set_of_layers
def test_pruning(name: str) -> None:
    """Masks apply in the forward pass, and remain after optimizer steps."""
    model = shaken(name)
    x, masked = images(model, 2), copy.deepcopy(model)
    for key, layer in layers(model):
        prune.l1_unstructured(layer, "weight", 0.5)
        with torch.no_grad():
            masked.get_submodule(key).weight.mul_(layer.weight_mask)  # type: ignore[operator]
    for _ in range(2):
        logits = model(x)
        assert_near([logits], [masked(x)])
        logits.square().sum().backward()
    for key, layer in layers(model):
        gradient = layer.weight_orig.grad
        assert not gradient[layer.weight_mask == 0].any(), key


@each_set_of_layers
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantization(name: str) -> None:
    model = vx.create_model(name).eval()
    shake(model, std=0.1)
    x = images(model, 2)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(True for _ in layers(quantized, nn.Linear))
    with torch.no_grad():
        got, want = quantized(x), model(x)
    assert 0 < float((got - want).norm() / want.norm()) < 0.2


@pytest.mark.parametrize("name", TEST_MODELS)
def test_replicas_of_data_parallel(name: str) -> None:
    """As nn.DataParallel makes them: their parameters are plain attributes."""
    model = shaken(name).eval()

    def replica(module: nn.Module) -> nn.Module:
        copied = module._replicate_for_data_parallel()
        for key, value in module._parameters.items():
            copied._parameters.pop(key, None)
            setattr(copied, key, None if value is None else value.detach())
        for key, child in module._modules.items():
            copied._modules[key] = None if child is None else replica(child)
        return copied

    x = images(model, 2)
    with torch.no_grad():
        assert_near([replica(model)(x)], [model(x)])


def test_a_default_device_does_not_reach_the_data(tmp_path: Path) -> None:
    """Tensors of one device stay together under ``torch.set_default_device``."""
    theirs = timm.create_model("levit_128s", num_classes=5)
    ours, softmax = vx.create_model("levit_128s", num_classes=5), vx.create_model("vit_test")
    images = torch.randn(4, *softmax.config.input_shape)
    with torch.device("meta"):
        vx.load_weights(ours, theirs.state_dict())
        vx.convert(softmax, "linear", feature_map="hedgehog")
        vx.align(softmax, None, images, steps=(2, 2), batch_size=2, precision="fp32")
        vx.export_onnx(softmax, tmp_path / "model.onnx")
    assert softmax(images).isfinite().all()
