"""The documentation site: every public name, every family and every page is in it."""

from __future__ import annotations

import re
from pathlib import Path

import nbclient
import nbformat
import pytest
import yaml
from blocks import between

import vision_xformer as vx

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def documented() -> list[str]:
    """Names with an entry in the pages of the API."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("api*.md")))
    return re.findall(r"^::: vision_xformer\.(\w+)$", text, re.MULTILINE)


def test_every_public_name_is_documented() -> None:
    names = documented()
    assert len(names) == len(set(names))
    assert set(vx.__all__) - set(names) == set(), "add these to docs/api.md"
    assert set(names) - set(vx.__all__) == set(), "these are in docs/api.md and not public"


@pytest.mark.parametrize("name", [n for n in vx.__all__ if isinstance(getattr(vx, n), type)])
def test_every_public_class_begins_with_a_sentence(name: str) -> None:
    """Else the entry of the class begins with its arguments."""
    first = (getattr(vx, name).__doc__ or "").split("\n")[0]
    assert len(first.split()) >= 2, f"help(vision_xformer.{name}) begins with nothing"


def test_families_are_those_of_the_registry() -> None:
    text = between((DOCS / "models.md").read_text(encoding="utf-8"), "families")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    shown = {row[1].strip("`"): set(re.findall(r"`(\w+)`", row[2])) for row in rows}
    known = {
        name: {size for size in vx.BACKBONES[name].presets if size not in ("", "test")}
        for name in vx.BACKBONES.names()
    }
    assert shown == known


def test_names_in_tables_are_names_of_models() -> None:
    models = (DOCS / "models.md").read_text(encoding="utf-8")
    letters = re.findall(r"^\| [TLPNFE] \|(.*)$", models, re.MULTILINE)
    readme = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("## Families")[1].split("\n\n")[1]
    )
    examples = [line.split("|")[2] for line in readme.splitlines()[2:]]
    assert len(letters) == 6
    assert len(examples) == 10
    for cell in [*letters, *examples]:
        for name in re.findall(r"`(\w+)`", cell):
            assert name in vx.list_models(), name


def test_every_mixer_is_described() -> None:
    text = (DOCS / "mixers.md").read_text(encoding="utf-8")
    assert [name for name in vx.list_mixers() if f"`{name}`" not in text] == []
    for name in vx.list_mixers():
        for option in vx.mixer_options(name):
            assert f"`{option}`" in text, f"{option} of {name}"


def site() -> dict[str, object]:
    """The settings of the site."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert isinstance(settings, dict)
    return settings


def test_every_page_is_in_the_navigation() -> None:
    pages = {page for entry in site()["nav"] for page in entry.values()}  # type: ignore[attr-defined]
    assert pages == {path.name for path in DOCS.glob("*.md")}


def test_site_is_strict_and_needs_no_network() -> None:
    settings = site()
    assert settings["strict"] is True
    assert settings["theme"]["font"] is False  # type: ignore[index]
    assert settings["validation"]["links"]["anchors"] == "warn"  # type: ignore[index]
    for path in settings["extra_css"]:  # type: ignore[attr-defined]
        text = (DOCS / path).read_text(encoding="utf-8")
        assert "http" not in text
        assert "@import" not in text


def test_spelling_is_american_and_terms_are_those_of_the_field() -> None:
    wrong = re.compile(
        r"\b(\w*colour\w*|\w+ise[ds]?(?<!wise)(?<!noise)(?<!otherwise)(?<!precise)(?<!exercise)"
        r"(?<!raise)(?<!raised)(?<!raises)(?<!promise)|licence|stabiliser|Nystromformer|beside)\b"
        r"|\d %"
    )
    for path in [*ROOT.glob("*.md"), *DOCS.glob("*.md")]:
        # tables of results have headings of their own
        text = re.sub(
            r"<!-- (?!/)([\w ]+) -->.*?<!-- /\1 -->",
            "",
            path.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        )
        assert [match[0] for match in wrong.finditer(text)] == [], path.name


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(DOCS / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    outputs = str([cell.get("outputs") for cell in notebook.cells])
    scores = [float(score) for score in re.findall(r"test top-1 ([\d.]+)%", outputs)]
    assert len(scores) == 3
    assert min(scores) > 90
    assert "image/png" in outputs
