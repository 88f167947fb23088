"""What each mixer costs: ``python -m train.benchmark mixers``.

One layer, forward and backward, beside the public package with the same weights. Times are of one
process, interleaved, medians; peak memory is of a process of its own for each row, above what
it held before the step. On a GPU it is the GPU that is measured.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import multiprocessing
import platform
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import vision_xformer as vx
from vision_xformer.mixers import takes_heads

from .files import write_whole
from .measure import bytes_kept, interleaved_seconds, peak_bytes, reset_peak

BATCH, HEADS, HEAD_DIM = 8, 4, 64
DIM = HEADS * HEAD_DIM
# ours, its peer, and the options that make the two compute the same
PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "performer": ("performer-pytorch", {"stabilizer": "package"}, {}),
    "nystrom": ("nystrom-attention", {"segments": "sequence", "landmarks": 64}, {"landmarks": 64}),
    "linformer": ("linformer-pytorch", {"rank": 64}, {"rank": 64}),
}


class Fft2(nn.Module):
    """The peer of Fourier mixing: the whole complex transform, its real part kept."""

    def forward(self, x: Tensor, layout: vx.Layout) -> Tensor:
        return torch.fft.fft2(x).real


def layout_of(tokens: int) -> vx.Layout:
    """A square grid of that many tokens."""
    side = math.isqrt(max(tokens, 0))
    if side < 1 or side * side != tokens:
        raise ValueError(f"length {tokens} must be a square: the tokens of a picture")
    return vx.Layout((side, side))


def build(name: str, tokens: int) -> nn.Module:
    """One layer, by a mixer's name or "fft2"; the same weights for ours and its peer."""
    torch.manual_seed(0)
    layout = layout_of(tokens)
    if name == "fft2":
        return Fft2()
    peers = {peer: (ours, options) for ours, (peer, _, options) in PAIRS.items()}
    options = PAIRS[name][1] if name in PAIRS else peers[name][1] if name in peers else {}
    heads = HEADS if takes_heads(name) else None
    mixer = vx.create_mixer(name, dim=DIM, heads=heads, layout=layout, **options)
    if name in peers:
        vx.load_weights(mixer, build(peers[name][0], tokens).state_dict())
    return mixer


def training_step(layer: Callable[..., Tensor], tokens: int, device: str) -> Callable[[], None]:
    """Forward and backward of one batch, gradients of input and weights."""
    layout = layout_of(tokens)
    x = torch.randn(BATCH, tokens, DIM, device=device, requires_grad=True)
    target = torch.randn(BATCH, tokens, DIM, device=device)

    def step() -> None:
        x.grad = None
        layer(x, layout).backward(target)

    return step


def _peak_of_step(name: str, tokens: int, device: str, threads: int, answer: Any) -> None:
    """In a process of its own: the peak of a step above what was there before."""
    torch.set_num_threads(threads)
    layer = build(name, tokens).to(device)
    training_step(build(name, 64).to(device), 64, device)()  # libraries are loaded, threads begun
    step = training_step(layer, tokens, device)
    before = reset_peak()
    step()
    answer.put(peak_bytes() - before)


def peak_of_step(name: str, tokens: int, device: str) -> int:
    """Bytes of memory that a training step takes at its peak."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    arguments = (name, tokens, device, torch.get_num_threads(), answer)
    process = context.Process(target=_peak_of_step, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"measuring {name} at {tokens} tokens ended with {process.exitcode}")
    peak: int = answer.get()
    return peak


def measure(
    names: list[str], tokens: int, repeats: int, device: str, with_compile: bool
) -> list[dict[str, Any]]:
    """A row for each mixer at one length; what is timed together is in one process."""
    layers = {name: build(name, tokens).to(device) for name in names}
    steps = {name: training_step(layer, tokens, device) for name, layer in layers.items()}
    if with_compile:
        torch._dynamo.reset()
        for name, layer in layers.items():
            run: Callable[..., Tensor] = torch.compile(layer, dynamic=False)
            steps[f"{name} (compiled)"] = training_step(run, tokens, device)
    seconds = interleaved_seconds(steps, max(3, repeats * 1024 // max(tokens, 1024)))
    x = torch.randn(BATCH, tokens, DIM, device=device, requires_grad=True)
    rows = []
    for label in steps:
        name, _, mode = label.partition(" ")
        layer = layers[name]
        row: dict[str, Any] = {"mixer": name, "mode": mode.strip("()") or "eager", "tokens": tokens}
        row["ms"] = seconds[label] * 1e3
        if not mode:
            row["kept_mib"] = bytes_kept(layer, partial(layer, x, layout_of(tokens))) / 2**20
            row["peak_mib"] = peak_of_step(name, tokens, device) / 2**20
            row["parameters"] = sum(p.numel() for p in layer.parameters())
        rows.append(row)
    for row in rows:
        row |= _ratios(row, rows)
    return rows


def _ratios(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Package time / our time, against the package eager and compiled; peak / fused softmax's."""
    peers = {ours: peer for ours, (peer, _, _) in PAIRS.items()} | {"fourier": "fft2"}
    ratios = {}
    for other in rows:
        if other["mixer"] == peers.get(row["mixer"]):
            ratios[f"times_{other['mode']}_package"] = other["ms"] / row["ms"]
        if other["mixer"] == "softmax" and "peak_mib" in other and "peak_mib" in row:
            ratios["peak_to_softmax"] = row["peak_mib"] / other["peak_mib"]
    return ratios


COLUMNS = [
    "mixer", "mode", "tokens", "ms", "times_eager_package", "times_compiled_package", "kept_mib",
    "peak_mib", "peak_to_softmax", "parameters",
]  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with a line for each mixer; a cell holds a figure for each length."""
    lengths = sorted({int(row["tokens"]) for row in rows})
    at = {(row["mixer"], row["mode"], int(row["tokens"])): row for row in rows}

    def cell(mixer: str, mode: str, column: str, digits: int) -> str:
        figures = [at.get((mixer, mode, n), {}).get(column) for n in lengths]
        if all(f in (None, "") for f in figures):
            return ""
        return " / ".join("-" if f in (None, "") else f"{float(f):,.{digits}f}" for f in figures)

    columns = [
        ("ms", "eager", "ms", 0),
        ("ms, compiled", "compiled", "ms", 0),
        ("package / ours", "eager", "times_eager_package", 2),
        ("compiled package / ours eager", "eager", "times_compiled_package", 2),
        ("kept for backward, MiB", "eager", "kept_mib", 0),
        ("peak, MiB", "eager", "peak_mib", 0),
    ]
    lines = [["mixer", *(title for title, *_ in columns)], ["---"] * (len(columns) + 1)]
    for mixer in dict.fromkeys(row["mixer"] for row in rows):
        cells = [cell(mixer, mode, column, digits) for _, mode, column, digits in columns]
        lines.append([f"`{mixer}`", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def device_name(device: str) -> str:
    """What was measured on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def write_csv(path: Path, rows: list[dict[str, Any]], device: str, arguments: list[str]) -> None:
    """Rows under comment lines that say how they came about; whole or not at all."""
    text = io.StringIO()
    text.write(f"# python -m train.benchmark {' '.join(arguments)}\n")
    text.write(f"# {device_name(device)}, torch {torch.__version__}, float32, forward + backward\n")
    text.write(f"# batch {BATCH}, {HEADS} heads of width {HEAD_DIM}\n")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m train.benchmark")
    mixers = parser.add_subparsers(dest="what", required=True).add_parser(
        "mixers", help="one layer: time, bytes kept for backward and peak memory of each mixer"
    )
    known = [*vx.list_mixers(), "fft2"]
    mixers.add_argument("--only", nargs="+", choices=known, default=known, metavar="MIXER",
                        help=f"of {', '.join(known)}")  # fmt: skip
    mixers.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096],
                        help="numbers of tokens, squares (default: 256 1024 4096)")  # fmt: skip
    mixers.add_argument("--repeats", type=int, default=15, help="of each step, at 1024 tokens")
    mixers.add_argument("--compile", action="store_true", help="also under torch.compile")
    mixers.add_argument("--out", type=Path, help="a CSV file to write")
    args = parser.parse_args(arguments)
    try:
        for tokens in args.lengths:
            layout_of(tokens)
    except ValueError as error:
        parser.error(str(error))
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} must be at least 1")
    if args.out and (args.out.is_dir() or not args.out.parent.is_dir()):
        parser.error(f"--out {args.out} must be a file in a folder that exists")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for tokens in tqdm(args.lengths, unit="length", disable=None):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*complex operators.*")
            rows += measure(args.only, tokens, args.repeats, device, args.compile)
    print(f"{device_name(device)}, torch {torch.__version__}, forward + backward, float32;")
    print(f"figures at {' / '.join(map(str, args.lengths))} tokens\n")
    print(summary(rows))
    if args.out:
        write_csv(args.out, rows, device, arguments)


if __name__ == "__main__":
    main()
