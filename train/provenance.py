"""Provenance of a run: command, revision, versions and device."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import vision_xformer as vx

from .atomic import read_json, write_whole

_PACKAGES = ("torch", "torchvision", "accelerate", "einops")


def digest(data: bytes) -> str:
    """Return a hash of what a figure is drawn from, for its metadata."""
    return hashlib.sha256(data).hexdigest()[:16]


def fingerprint(file: Path) -> str:
    """Return the hash of a file that a figure is drawn from."""
    return digest(file.read_bytes())


def git_revision() -> dict[str, Any]:
    """Return the commit of this code and whether it was modified; empty outside a checkout."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(
            ["git", "-C", root, *arguments],
            capture_output=True,
            text=True,
            check=True,
            encoding="utf-8",
        ).stdout.strip()

    try:
        return {
            "revision": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {}


def versions() -> dict[str, str]:
    """Return the versions of what affects results: packages and, on a GPU, CUDA and its driver."""
    found = {"vision_xformer": vx.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda or torch.version.hip), "driver": driver_version()}
    return found


def driver_version() -> str:
    """Return the version of NVIDIA's driver, or "unknown"."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # not installed, another vendor's GPU, or no permission
        return "unknown"


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or that of the CPU and the number of threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    name = known.get("cpu_name") or platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def note_session(path: Path, accelerator: Accelerator, step: int) -> None:
    """Append this process to the list of sessions of a run.

    Args:
        path: JSON file of the sessions, created if missing.
        accelerator: accelerator of the run.
        step: step that the session starts from.
    """
    sessions = read_json(path, list) if path.is_file() else []
    sessions.append(
        {
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "from_step": step,
            "command": [Path(sys.executable).name, *sys.orig_argv[1:]],
            "git": git_revision(),
            "versions": versions(),
            "device": device_name(accelerator.device),
            "processes": accelerator.num_processes,
            "precision": accelerator.mixed_precision,
        }
    )
    write_whole(path, json.dumps(sessions, indent=2) + "\n")
