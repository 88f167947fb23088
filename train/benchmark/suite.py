"""Everything that is measured on a CUDA machine, in calls of a few minutes: ``benchmark gpu``."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

import vision_xformer as vx

from ..data.cifar import CIFAR10
from ..lock import hold
from .budget import Budget
from .cases import Case, mixer_cases, model_cases
from .checks import run_tests
from .controls import CONTROLS
from .measuring import run
from .rows import Row
from .training import ROOT, train_models

PARTS = ("tests", "mixers", "models", "training")
PAPER = ("vi?", "hybrid_vi?", "levi?", "cv?", "cc?", "fnet2d")
SIZED = tuple(f"vi{letter}_{size}" for size in ("tiny", "small") for letter in "tlpnf")
# the names with a published accuracy on CIFAR-10, and the other families of the paper
TRAINED = (
    "HybridViN-RoPE", "HybridViP-RoPE", "HybridViL-RoPE", "HybridViT-RoPE", "CvP", "CvN", "CvT",
    "CCN", "CCP", "CCT", "LeViN", "LeViP", "LeViT", "ViN-RoPE", "ViP-RoPE", "ViL-RoPE", "ViT-RoPE",
    "FNet2D",
)  # fmt: skip
MODES = ("eager", "compiled")
PRECISIONS = ("bf16", "fp32")
BATCH = 8


@dataclasses.dataclass(frozen=True)
class Suite:
    """What is measured.

    Args:
        cases: pairs of a CSV file's name and cases for it, in the order in which they are measured;
            a name may come several times.
        trained: models to train.
        recipe: other arguments of ``python -m train fit``; none without images.
        most_epochs: largest number of epochs.
    """

    cases: Sequence[tuple[str, list[Case]]]
    trained: Sequence[str]
    recipe: Sequence[str]
    most_epochs: int


def full(data: Path | None) -> Suite:
    """All measurements: bf16 first, and the slow starts of compiled layers last.

    Args:
        data: folder with CIFAR-10, if there is one.
    """
    names, lengths = [*vx.list_mixers(), *CONTROLS], (64, 256, 1024, 4096, 16384)
    recipe = ["--config", str(ROOT / "configs" / "cifar10" / "base.yaml"), "--data.root"]
    mixers = {
        (mode, dtype): ("mixers", mixer_cases(names, lengths, BATCH, dtype, [mode]))
        for mode in MODES
        for dtype in PRECISIONS
    }
    models = [("models", model_cases(PAPER, [32], BATCH, dtype)) for dtype in PRECISIONS]
    by_size = ("models-by-size", model_cases(SIZED, (224, 384, 512, 1024), BATCH, "bf16"))
    return Suite(
        [mixers.pop(("eager", "bf16")), models[0], by_size, *models[1:], *mixers.values()],
        TRAINED,
        [] if data is None else [*recipe, str(data)],
        40,  # those of the recipe
    )


def toy() -> Suite:
    """The same parts in a minute on a CPU."""
    recipe = ["--model.options", "{dim: 8, depth: 1, mlp_ratio: 2.0}", "--data.name", "digits",
              "--data.batch_size", "500", "--data.workers", "0"]  # fmt: skip
    return Suite(
        [
            ("mixers", mixer_cases(["fourier"], [16], 1, "bf16")),
            ("models", model_cases(["vif"], [8], 1, "bf16")),
            ("models-by-size", model_cases(["vif_tiny"], [16, 32], 1, "bf16")),
            ("mixers", mixer_cases(["fourier"], [16], 1, "fp32")),
        ],
        ("ViF",),
        recipe,
        1,
    )  # fmt: skip


def check(out: Path, data: Path | None, is_toy: bool) -> None:
    """Raise a ValueError for arguments that cannot work."""
    if not torch.cuda.is_available() and not is_toy:
        raise ValueError("this needs a CUDA GPU, and PyTorch finds none; --toy tries it without")
    if out.is_file() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out} must be a folder in one that exists")
    if data is not None and is_toy:
        raise ValueError(f"--data {data} has no effect with --toy, which trains on digits")
    if data is not None and not (data / CIFAR10.base_folder).is_dir():
        raise ValueError(f"--data {data} must contain {CIFAR10.base_folder}, CIFAR-10 as unpacked")


def gpu(
    out: Path, minutes: float, parts: Sequence[str], data: Path | None, is_toy: bool, command: str
) -> str:
    """Measure what is missing in a folder, for some minutes.

    Args:
        out: folder, created if necessary; its files are extended.
        minutes: time after which nothing new is started.
        parts: some of ``PARTS``.
        data: folder with CIFAR-10; without it nothing is trained.
        is_toy: whether sizes are so small that a CPU is enough.
        command: command line, recorded in the files.

    Returns:
        A line for each part, and whether something is missing.

    Raises:
        ValueError: for an invalid argument, or files of another device or of other versions.
    """
    check(out, data, is_toy)
    budget, suite = Budget(minutes), toy() if is_toy else full(data)
    said, missing = [], 0
    with hold(out):
        if "tests" in parts:
            text, missing = run_tests(out / "tests.csv", budget.left, command)
            said.append(f"tests: {text}")
        found, wanted = defaultdict[str, list[Row]](list), Counter[str]()
        for name, cases in suite.cases:
            if name.partition("-")[0] in parts:
                file = out / f"{name}.csv"
                found[name] += run(cases, file, command, retry=False, take=budget.take)
                wanted[name] += len(cases)
        said += [counted(name, found[name], count) for name, count in wanted.items()]
        missing += wanted.total() - sum(map(len, found.values()))
        if "training" in parts and not suite.recipe:
            said.append("training: skipped, as --data names no folder with CIFAR-10")
        elif "training" in parts and missing:
            said.append("training: starts when the other parts are complete")
        elif "training" in parts:
            file = out / "training.csv"
            rows = train_models(
                file, suite.trained, suite.recipe, suite.most_epochs, budget, command
            )
            missing += len(suite.trained) - len(rows)
            said.append(counted("training", rows, len(suite.trained)))
    end = "the same command measures the rest" if missing else "complete"
    return "\n".join([*said, f"{end}; everything is in {out}"])


def counted(name: str, rows: Sequence[Row], wanted: int) -> str:
    """Say how many rows there are, and how many of them are not measurements."""
    lost = sum(row["status"] == "out of memory" for row in rows)
    failed = sum(row["status"] not in ("ok", "out of memory") for row in rows)
    notes = [f"{lost} out of memory"] * bool(lost) + [f"{failed} failed"] * bool(failed)
    return ", ".join([f"{name}: {len(rows)} of {wanted} rows", *notes])
