"""The page of the benchmark: its rows, figures and choices; nothing from a network; sorting."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs
from test_benchmark import put, row

from train import html
from train.benchmark import __main__ as program
from train.benchmark.fits import fits_section
from train.benchmark.page import choices, write
from train.benchmark.rows import label, read_rows, write_csv
from train.convert_cost import TEACHER, Cost
from train.convert_page import cost_table
from train.html import Section, Table, write_page

RESULTS = Path(__file__).parents[1] / "results" / "benchmark"
STEP, RATIO = "training step, median ms", "training step, time / fused softmax"
SCRIPT, NODE = Path(html.__file__).with_name("page.js"), shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Page(HTMLParser):
    """What a browser makes of a page: scripts, views with their tables, and addresses."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.scripts: list[tuple[dict, str]] = []
        self.views: list[dict] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.choices: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        self.open.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        if tag == "script":
            self.scripts.append((found, ""))
        if "data-choices" in found:
            self.choices = json.loads(found["data-choices"])
        if found.get("class") == "view":
            view = {"choice": json.loads(found["data-choice"]), "tables": [], "figure": None}
            self.views.append(view)
        if tag == "table":
            self.views[-1]["tables"].append([])
        if tag == "tr":
            self.views[-1]["tables"][-1].append([])
        if tag in ("td", "th"):
            self.views[-1]["tables"][-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
            if attributes.get("type") == "application/json":
                self.views[-1]["figure"] = json.loads(data)
        elif "td" in self.open or "th" in self.open:
            self.views[-1]["tables"][-1][-1][-1] += data

    def view(self, *choice: str | None) -> dict:
        (found,) = (view for view in self.views if view["choice"][-len(choice) :] == [*choice])
        return found


def page_of(files: list[Path], out: Path) -> Page:
    """The interactive section alone, without the pictures that `write` draws."""
    views, taken = [], set()
    for file in files:
        views += choices(file, *read_rows(file), taken)
    write_page(out, "page", [Section("rows", choices=["a", "b", "c", "d", "e"], views=views)])
    return Page(out)


def mixers(path: Path, *lines: str) -> Path:
    """Five lengths of softmax, four of another mixer, one of which is out of memory."""
    rows = [row("softmax", n, step_ms_p50=n**2 / 100) for n in (16, 64, 256, 1024)]
    rows += [row("nystrom", n, step_ms_p50=n / 10) for n in (16, 256, 1024)]
    rows += [row("talking_heads", 16, step_ms_p50=3.0)]
    rows += [row("talking_heads", 64, status="out of memory", step_ms_p50=None, peak_mib=None)]
    rows += [row("mlp", 64, status="rank <is> odd", step_ms_p50=None, peak_mib=None)]
    rows += [row("fourier", n, kept_mib=0.0) for n in (16, 64)]
    path.parent.mkdir(exist_ok=True)
    put(path, rows, lines or ("device: A", "versions: python 3, torch 2"))  # type: ignore[arg-type]
    return path


def test_every_row_of_the_results_is_on_the_page(tmp_path: Path) -> None:
    files = sorted(RESULTS.rglob("m*.csv"))
    page = page_of(files, tmp_path / "page.html")
    assert len(files) >= 3
    for file in files:
        comments, rows = read_rows(file)
        device = choices(file, comments, rows, set())[0].choice[0]
        for one in rows:
            measured = (
                f"{'single layers' if one['kind'] == 'mixer' else 'whole models'}: {file.stem}"
            )
            size = f"{one['size']:,} {'tokens' if one['kind'] == 'mixer' else 'pixels'}"
            precision = f"{one['dtype']}, batch {one['batch']}"
            (table,) = page.view(device, measured, precision, None, size)["tables"]
            (line,) = (cells for cells in table if cells[0] == label(one))
            cells = dict(zip(table[0], line, strict=True))
            for heading, column in (
                (STEP, "step_ms_p50"), ("peak memory of a training step, MiB", "peak_mib"),
                ("inference, median ms", "infer_ms_p50"), ("saved for backward, MiB", "kept_mib"),
            ):  # fmt: skip
                if one["status"] == "out of memory":
                    assert cells[heading] == "OOM"
                else:
                    shown = float(cells[heading].replace(",", "").rstrip("~"))
                    assert shown == pytest.approx(one[column], rel=0.006, abs=1e-9)
    assert len(page.text) < 6e6


def test_nothing_comes_from_a_network(tmp_path: Path) -> None:
    page = page_of([mixers(tmp_path / "mixers.csv")], tmp_path / "page.html")
    assert page.addresses == []
    assert "@import" not in page.text
    kinds = [attributes.get("type", "") for attributes, _ in page.scripts]
    assert kinds.count("text/plain") == 1  # the library, once
    assert kinds.count("") == 1
    library = next(text for found, text in page.scripts if found.get("id") == "plotly")
    assert gzip.decompress(base64.b64decode(library)).decode() == get_plotlyjs()
    assert "showSendToCloud: false" in page.text  # the library has a button for that


def test_figures_show_what_was_measured(tmp_path: Path) -> None:
    page = page_of([mixers(tmp_path / "mixers.csv")], tmp_path / "page.html")
    figure = page.view(STEP, "all lengths")["figure"]
    curves = {t["meta"]["curve"]: t for t in figure["data"] if t.get("yaxis") != "y2"}
    assert curves["nystrom"]["x"] == [16, 64, 256, 1024]
    assert curves["nystrom"]["y"] == [1.6, None, 25.6, 102.4]  # a gap
    assert not curves["nystrom"].get("connectgaps")
    assert curves["talking_heads"]["y"] == [3.0, None, None, None]
    assert curves["softmax"]["customdata"][0] == "2.56 ms (p20 to p80: 2.56 to 2.56)"
    (cross,) = (t for t in figure["data"] if t.get("yaxis") == "y2")
    assert (cross["meta"]["curve"], cross["x"]) == ("talking_heads", [64])
    assert cross["customdata"] == ["out of memory"]
    assert {name for name, t in curves.items() if t["visible"] is True} == {
        "softmax", "nystrom", "fourier",
    }  # fmt: skip
    assert (figure["layout"]["xaxis"]["type"], figure["layout"]["yaxis"]["type"]) == ("log", "log")
    title = figure["layout"]["title"]
    assert title["text"] == "Training step, median ms"
    assert title["subtitle"]["text"] == "A, torch 2<br>fp32, batch 8"
    relative = page.view(RATIO, "all lengths")["figure"]
    (ours,) = (t for t in relative["data"] if t["meta"]["curve"] == "nystrom")
    for n, shown in zip(ours["x"], ours["y"], strict=True):
        assert shown is None if n == 64 else shown == pytest.approx(10 / n, rel=1e-4)
    kept = page.view("saved for backward, MiB", "all lengths")["figure"]
    assert all(not y or y > 0 for t in kept["data"] for y in t["y"])  # a logarithm has no 0
    assert page.view(None, "64 tokens")["tables"][0][0][0] == "mixer"
    at = page.view(STEP, "64 tokens")["figure"]["data"]
    assert [name for trace in at for name in trace["y"]] == ["fourier", "softmax", "talking_heads"]
    assert "rank &lt;is&gt; odd" in page.text


def test_a_few_curves_are_shown_at_first(tmp_path: Path) -> None:
    files = [RESULTS / "intel-xeon-2-threads-torch-2.15.0" / "mixers.csv"]
    page = page_of(files, tmp_path / "page.html")
    data = page.view(STEP, "all lengths")["figure"]["data"]
    shown = [t["meta"]["curve"] for t in data if t["visible"] is True]
    assert shown == ["softmax", "linformer", "performer", "nystrom", "fourier"]
    assert len({t["meta"]["curve"] for t in data}) >= 26


def test_machines_precisions_and_files_are_chosen(tmp_path: Path) -> None:
    first = mixers(tmp_path / "x" / "mixers.csv")
    again = mixers(tmp_path / "y" / "mixers.csv")
    gpu = mixers(tmp_path / "z" / "mixers.csv", "device: NVIDIA H100", "versions: torch 3")
    both = [row("softmax", 64, dtype=dtype) for dtype in ("fp32", "bf16")]
    put(tmp_path / "both.csv", [*both, row("vit", 32, kind="model")])
    page = page_of([first, again, gpu, tmp_path / "both.csv"], tmp_path / "page.html")
    assert len(page.choices) == 5
    complete = [view["choice"] for view in page.views if None not in view["choice"]]
    assert len({tuple(choice) for choice in complete}) == len(complete)
    assert {tuple(choice[:3]) for choice in complete} == {
        ("A, torch 2", "single layers: mixers", "fp32, batch 8"),
        ("A, torch 2", "single layers: y-mixers", "fp32, batch 8"),
        ("NVIDIA H100, torch 3", "single layers: mixers", "fp32, batch 8"),
        ("A", "single layers: both", "fp32, batch 8"),
        ("A", "single layers: both", "bf16, batch 8"),
        ("A", "whole models: both", "fp32, batch 8"),
    }


def test_rows_without_a_value_have_a_table_and_no_figure(tmp_path: Path) -> None:
    lost = {"status": "out of memory"} | dict.fromkeys(
        ("step_ms_p50", "infer_ms_p50", "kept_mib", "peak_mib")
    )
    put(tmp_path / "a.csv", [row(size=n, **lost) for n in (4, 16)])
    page = page_of([tmp_path / "a.csv"], tmp_path / "page.html")
    view = page.view(STEP, "all lengths")
    assert view["figure"] is None
    assert view["tables"] == [[["tokens", "4", "16"], ["nystrom", "OOM", "OOM"]]]


def test_names_are_text(tmp_path: Path) -> None:
    name = "<b>A</b> & 'B' \"C\"</script><!--<script>"
    file = mixers(tmp_path / "mixers.csv", f"device: {name}", "versions: torch 2")
    text = file.read_text(encoding="utf-8").replace("talking_heads", "</script><img src=x>")
    file.write_text(text, encoding="utf-8")
    page = page_of([file], tmp_path / "page.html")
    assert {view["choice"][0] for view in page.views} == {f"{name}, torch 2"}
    assert page.addresses == []
    kinds = [attributes.get("type", "") for attributes, _ in page.scripts]
    assert kinds.count("application/json") == sum(view["figure"] is not None for view in page.views)
    assert len(kinds) == kinds.count("application/json") + 2
    layout = page.view(STEP, "all lengths")["figure"]["layout"]
    assert layout["title"]["subtitle"]["text"].startswith("&lt;b&gt;A&lt;/b&gt; &amp; 'B'")
    data = page.view(STEP, "all lengths")["figure"]["data"]
    assert "&lt;/script&gt;&lt;img src=x&gt;" in {trace["name"] for trace in data}
    assert "</script><img src=x>" in {trace["meta"]["curve"] for trace in data}


def test_tables_have_headings_to_sort_by(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "page", [Section("t", tables=[Table(["a", "b<"], [])])])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    heading = '<th><button type="button">{}</button></th>'
    assert f"<thead><tr>{heading.format('a')}{heading.format('b&lt;')}</tr></thead>" in text
    assert "sortBy" in text
    assert 'id="plotly"' not in text  # only where there is a figure for it
    assert len(text) < 20_000


def test_a_vertical_bar_does_not_end_a_cell_of_markdown() -> None:
    table = Table(["a|b", "c"], [["x|y", "1"]])
    assert table.markdown() == "| a\\|b | c |\n| --- | --- |\n| x\\|y | 1 |"


def test_the_cost_of_conversions_has_numbers_alone_and_empty_cells() -> None:
    rows = [
        Cost(tokens=tokens, name=name, ms=ms, mib=2.0)
        for name, times in (
            (TEACHER, {64: 1.0, 2048: 8.0}), ("linear", {64: 2.0, 2048: 4.0, 4096: 8.0}),
            ("performer", {2048: 4.0}), ("nystrom", {64: 2.0}), ("agent", {4096: 1.0}),
        )
        for tokens, ms in times.items()
    ]  # fmt: skip
    table = cost_table(rows)
    assert table.headings == ["mixer", "64", "2,048", "4,096", "faster from, tokens"]
    assert table.rows == [
        ["linear", "2.00, 1.00", "0.50, 1.00", "", "362"],
        ["performer", "", "0.50, 1.00", "", "2,048"],
        ["nystrom", "2.00, 1.00", "", "", "never"],
        ["agent", "", "", "", ""],
    ]


@pytest.mark.skipif(NODE is None, reason="needs Node.js")
def test_words_sort_as_the_numbers_that_they_mean() -> None:
    cells = ["12", "1,234", "none", "987", "never", "2.5%", "text", "OOM", "~3", "always"]
    comparison, _, _ = SCRIPT.read_text(encoding="utf-8").partition("function sortBy")
    steps = f"""{comparison}
    const cells = {json.dumps(cells)};
    const values = cells.map((text) => [valueOf({{ cells: [{{ textContent: text }}] }}, 0), text]);
    values.sort(([a], [b]) => compare(a, b));
    console.log(JSON.stringify(values.map(([, text]) => text)));
    """
    done = subprocess.run(
        [str(NODE), "-e", steps], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout) == [
        "none", "always", "2.5%", "~3", "12", "987", "1,234", "never", "OOM", "text",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "", "has no rows of python -m train.benchmark"),
        (lambda text: text[:-30], "has an incomplete row"),
        (lambda text: text.replace("\nmixer,", "\nlayer,"), "has kind 'layer', not mixer or model"),
        (lambda text: text.replace("eager", "fast"), "has mode 'fast', not compiled or eager"),
    ],
)  # fmt: skip
def test_broken_results_are_one_sentence(
    change, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = mixers(tmp_path / "mixers.csv")
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        program.main(["page", str(file), "--out", str(tmp_path / "page")])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert str(file) in error
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "page").exists()


def test_no_results_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        program.main(["page"])
    assert stop.value.code == 2
    assert "results/benchmark has no CSV files: run mixers" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser(tmp_path: Path) -> None:
    """Sorting both ways, a choice, and switching a curve on; errors would leave no last step."""
    page = page_of([mixers(tmp_path / "mixers.csv")], tmp_path / "page.html")
    steps = """
    const said = [], say = (what) => said.push(what);
    const shown = () => document.querySelector(".view:not([hidden])");
    const rows = () => [...shown().querySelectorAll("tbody tr")];
    const column = (i) => rows().map((r) => r.cells[i].textContent);
    const names = () => plot.data.filter((t) => t.visible === true).map((t) => t.meta.curve);
    const plot = document.querySelector(".plot");
    const sleep = (ms) => new Promise((r) => setTimeout(r, ms));
    (async () => {
      while (!plot.data) await sleep(20);
      const heading = shown().querySelectorAll("th button")[2]; // 64 tokens
      heading.click(); say(column(2)); heading.click(); say(column(2)); say(names());
      document.querySelector('[data-curve="talking_heads"]').click();
      await sleep(100); say(names());
      const select = [...document.querySelectorAll("select")].at(-1);
      select.value = "1,024 tokens"; select.dispatchEvent(new Event("change"));
      await sleep(100); say(plot.data[0].y);
      say(document.querySelectorAll(".curves button").length);
      document.title = JSON.stringify(said);
    })();
    """
    script = tmp_path / "steps.html"
    script.write_text(page.text.replace("</html>", f"<script>{steps}</script></html>"), "utf-8")
    dom = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
         script.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    title = dom.partition("<title>")[2].partition("</title>")[0]
    up, down, before, after, at, buttons = json.loads(title)
    assert up == ["10", "41", "OOM", ""]
    assert down == ["OOM", "41", "10", ""]
    assert before == ["softmax", "nystrom", "fourier"]
    assert set(after) == {*before, "talking_heads"}
    assert at == ["nystrom", "softmax"]
    assert buttons == 0


def test_files_of_plan_are_a_figure_and_tables(tmp_path: Path) -> None:
    lines = ["device: here", "versions: torch 2", "memory of a training step"]
    rows = [
        {"name": "vit", "mixer": mixer, "size": size, "status": status, "model_mib": 1.0,
         "image_mib": 2.0, "batch in 8GB": batch, "batch in 80GB": 10 * batch}
        for mixer, size, status, batch in (
            ("", 224, "ok", 1200), ("", 512, "ok", 30), ("performer", 224, "ok", 7),
            ("performer", 512, "ok", 0), ("conv", 224, "no class token", 0),
        )
    ]  # fmt: skip
    file = tmp_path / "plan.csv"
    write_csv(file, lines, list(rows[0]), rows)
    page, picture = write([file], [], tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    assert picture.name == f"{tmp_path.name}-plan.png"
    assert "largest batch in 80GB" in text
    for cell in ("<td>softmax</td><td>1,200</td><td>30</td>", "<td>7</td><td>none</td>"):
        assert cell in text
    assert "conv" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    write_csv(file, lines, list(rows[0])[:6], rows)
    with pytest.raises(ValueError, match=r"plan\.csv: no largest batches: run plan with --memory"):
        write([file], [], tmp_path / "out")


def test_models_planned_with_every_mixer_have_a_curve_each(tmp_path: Path) -> None:
    rows = [
        {"name": name, "mixer": mixer, "size": str(size), "status": "ok", "batch in 8GB": batch}
        for name, mixers in (
            ("vit_tiny", ("", "nystrom", "performer", "fourier", "conv")),
            ("cct_2_3x2", ("", "linformer", "nystrom", "softmax_eager", "agent")),
        )
        for batch, mixer in enumerate(mixers, start=len(name))
        for size in (224, 512)
    ]
    section = fits_section(["device: here", "versions: torch 2"], rows)
    [table] = section.tables
    assert len(table.rows) == 10
    assert table.rows[:2] == [["vit_tiny", "8", "8"], ["vit_tiny, nystrom", "9", "9"]]
    assert section.figure is not None
    named = {row[0] for row in table.rows} - {"vit_tiny, conv", "cct_2_3x2, agent"}
    [legend] = section.figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {*named, "other mixers"}
    lines = [line.get_color() for line in section.figure.axes[0].lines]
    assert len(set(lines)) == len(named) + 1
    section.figure.draw_without_rendering()
    below = section.figure.axes[0].xaxis.label.get_window_extent()
    assert not legend.get_window_extent().overlaps(below)
