"use strict";

// A click on the heading of a column sorts its table; empty cells stay at the end.
const WORDS = new Map([["OOM", Infinity], ["never", Infinity], ["always", 0], ["none", 0]]);

function valueOf(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = WORDS.get(text) ?? Number(text.replace(/[,~%]/g, ""));
  return text === "" || Number.isNaN(number) ? text : number;
}

function compare(a, b) {
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  if (typeof a === "number") return a === b ? 0 : a - b;
  return a.localeCompare(b, undefined, { numeric: true });
}

function sortBy(heading) {
  const body = heading.closest("table").tBodies[0];
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...body.rows].map((row) => [valueOf(row, heading.cellIndex), row]);
  rows.sort(([a], [b]) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    return down ? compare(b, a) : compare(a, b);
  });
  body.append(...rows.map(([, row]) => row));
}

document.addEventListener("click", (event) => {
  const heading = event.target.closest("th");
  if (heading !== null && event.target.closest("button") !== null) sortBy(heading);
});

// Sections with choices show the views that match what was chosen; null matches everything.
const NARROW = window.matchMedia("(max-width: 600px)");
const LINES = { solid: "solid", dash: "dashed", dot: "dotted", dashdot: "dashed" };

function element(tag, parent, properties) {
  const made = Object.assign(document.createElement(tag), properties);
  parent.append(made);
  return made;
}

// The library is compressed: as text it would be most of the page.
async function loadPlotly() {
  const packed = document.getElementById("plotly").textContent;
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  element("script", document.head, { textContent: await new Response(stream).text() });
  return Plotly;
}

function explore(section, library) {
  const [choices, curves, plot] = [".choices", ".curves", ".plot"].map((name) =>
    section.querySelector(name),
  );
  const names = JSON.parse(section.dataset.choices);
  const views = [...section.querySelectorAll(".view")].map((view) => ({
    view,
    choice: JSON.parse(view.dataset.choice),
  }));
  const complete = views.filter(({ choice }) => !choice.includes(null));
  const switched = new Map(); // curves that were switched on or off, for all figures
  let chosen = complete[0].choice;

  function choose(i, value) {
    let left = complete;
    [...chosen.slice(0, i), value, ...chosen.slice(i + 1)].forEach((wanted, j) => {
      const some = left.filter(({ choice }) => choice[j] === wanted);
      if (some.length > 0) left = some;
    });
    chosen = left[0].choice;
    show();
    choices.children[i].querySelector("select").focus();
  }

  function show() {
    choices.replaceChildren();
    names.forEach((name, i) => {
      const label = element("label", choices, { textContent: name });
      const same = complete.filter(({ choice }) => chosen.slice(0, i).every((c, j) => c === choice[j]));
      const values = [...new Set(same.map(({ choice }) => choice[i]))];
      if (values.length === 1) {
        element("output", label, { textContent: values[0] });
        return;
      }
      const select = element("select", label, { onchange: () => choose(i, select.value) });
      for (const value of values) element("option", select, { value, textContent: value });
      select.value = chosen[i];
    });
    for (const { view, choice } of views) {
      view.hidden = !choice.every((value, i) => value === null || value === chosen[i]);
    }
    draw();
  }

  function current() {
    const data = section.querySelector('.view:not([hidden]) script[type="application/json"]');
    if (data === null) return null;
    const figure = JSON.parse(data.textContent);
    for (const trace of figure.data) {
      if (switched.has(trace.meta?.curve)) {
        trace.visible = switched.get(trace.meta.curve) ? true : "legendonly";
      }
    }
    return figure;
  }

  function drawCurves(figure) {
    curves.replaceChildren();
    const found = new Map(); // the first trace of each curve
    for (const trace of figure.data) {
      const name = trace.meta?.curve;
      if (name !== undefined && !found.has(name)) found.set(name, trace);
    }
    if (found.size < 2) return;
    const groups = new Map();
    for (const [name, trace] of found) {
      if (!groups.has(trace.meta.group)) {
        const line = element("div", curves);
        element("span", line, { textContent: trace.meta.group });
        groups.set(trace.meta.group, line);
      }
      const on = trace.visible !== "legendonly";
      const button = element("button", groups.get(trace.meta.group), {
        type: "button",
        onclick: () => turn([name], !on),
      });
      button.dataset.curve = name;
      button.setAttribute("aria-pressed", on);
      button.style.setProperty("--color", trace.line.color);
      element("i", button).style.borderTopStyle = LINES[trace.line.dash];
      button.append(name);
    }
    const line = element("div", curves);
    element("span", line, { textContent: "show" });
    for (const [text, act] of [
      ["default", () => turn([...found.keys()])],
      ["all", () => turn([...found.keys()], true)],
      ["none", () => turn([...found.keys()], false)],
    ]) {
      element("button", line, { type: "button", textContent: text, onclick: act });
    }
  }

  function turn(some, on) {
    for (const name of some) on === undefined ? switched.delete(name) : switched.set(name, on);
    const focused = document.activeElement?.dataset.curve;
    draw();
    if (focused !== undefined) curves.querySelector(`[data-curve="${CSS.escape(focused)}"]`)?.focus();
  }

  // Names at the ends of the curves, moved apart where they would overlap.
  function nameCurves() {
    const { layout } = plot;
    if (NARROW.matches || layout.meta?.names !== true) return;
    const [low, high] = layout.yaxis.range;
    const [bottom, top] = layout.yaxis.domain;
    const last = Math.max(...plot.data.map((trace) => Math.max(...trace.x)));
    const [start, end] = layout.xaxis.range;
    const inside = start <= Math.log10(last) && Math.log10(last) <= end; // not zoomed away
    const ends = [];
    for (const trace of plot.data) {
      const value = trace.yaxis === "y2" ? null : trace.y[trace.x.indexOf(last)];
      if (trace.visible === "legendonly" || value === null || value === undefined) continue;
      const share = (Math.log10(value) - low) / (high - low);
      if (inside && share >= 0 && share <= 1) ends.push({ y: bottom + share * (top - bottom), trace });
    }
    ends.sort((a, b) => a.y - b.y);
    if (ends.length > 14) ends.length = 0; // the pointer tells them apart
    const gap = 16 / (layout.height - layout.margin.t - layout.margin.b);
    for (let round = 0; round < 50; round++) {
      for (let i = 1; i < ends.length; i++) {
        const overlap = gap - (ends[i].y - ends[i - 1].y);
        if (overlap > 0) {
          ends[i].y += overlap / 2;
          ends[i - 1].y -= overlap / 2;
        }
      }
    }
    const annotations = ends.map(({ y, trace }) => ({
      xref: "paper", x: 1, xanchor: "left", xshift: 6, yref: "paper", y, yanchor: "middle",
      text: trace.name, font: { color: trace.line.color, size: 12 }, showarrow: false,
    }));
    const longest = Math.max(0, ...ends.map(({ trace }) => trace.name.length));
    Plotly.relayout(plot, { annotations, "margin.r": 20 + 7 * longest });
  }

  async function draw() {
    const figure = current();
    plot.hidden = curves.hidden = figure === null;
    if (figure === null) return;
    drawCurves(figure);
    if ((await library) === null) {
      plot.textContent = "This browser is too old for the figures; the tables are complete.";
      return;
    }
    if (NARROW.matches) {
      Object.assign(figure.layout.margin, { l: 50, r: figure.layout.meta?.names ? 26 : 54 });
      figure.layout.title.font.size = 15;
      figure.layout.dragmode = false; // so that a finger scrolls the page
    }
    const config = { displaylogo: false, responsive: true, displayModeBar: !NARROW.matches,
                     showSendToCloud: false, // no data leave this page
                     modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
    await Plotly.react(plot, figure.data, figure.layout, config);
    nameCurves();
    plot.removeAllListeners("plotly_relayout");
    plot.on("plotly_relayout", (what) => "annotations" in what || nameCurves()); // zoomed
  }

  NARROW.addEventListener("change", draw);
  show();
}

const sections = document.querySelectorAll("[data-choices]");
if (sections.length > 0) {
  const library = loadPlotly().catch(() => null);
  for (const section of sections) explore(section, library);
}
