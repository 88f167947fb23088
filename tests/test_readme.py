"""The README: every Python snippet runs, every command exists, its tables are the tests'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matrix import markdown

import vision_xformer as vx
from train.__main__ import COMMANDS, parse
from train.commands import command_line, read_runs
from train.report import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def between(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert found, f"README.md has no marks for {name}"
    return found[1].strip()


def test_every_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vx.KERNELS, "_entries", dict(vx.KERNELS._entries))
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 6
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 5)
    assert names["features"].shape == (2, 4 + 12 * 8, 192)
    assert names["pooled"].shape == (2, 192)
    assert names["again"].config.num_classes == 7
    assert any("position" in key for key in names["report"].resized)
    assert names["model"].config.mixer == "elu"


def test_support_matrix_is_that_of_the_tests() -> None:
    assert between("support matrix") == markdown().strip()


def test_training_table_is_that_of_the_results() -> None:
    runs = read_runs([ROOT / "results"])
    assert between("training") == table(runs).markdown()
    for run in runs:
        assert (run["folder"] / "config.yaml").is_file()
        assert run["result"]["test_top1"] > 0


def test_commands_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
    commands = [c.split() for c in re.findall(r"^python -m train (.*)$", README, re.MULTILINE)]
    assert len(commands) >= 8
    for words in commands:
        if words[0] in COMMANDS:
            command_line().parse_args(words)
        elif words[0] != "--resume":
            parse([str(ROOT / w) if w.startswith("configs/") else w for w in words])


def test_pictures_are_there() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).stat().st_size > 10_000
