// Figures of a paper: an SVG of its size in inches with 8-point text, or the same as a PNG of 600 dots an inch.

import { choice, el, number } from "./text.js";
import { change, state } from "./state.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const POINT = 72; // of the SVG's own units, an inch

function node(tag, given, ...children) {
  const made = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(given)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Round places of an axis, three to six of them; powers of ten on a logarithmic one that spans as many. */
export function ticks(low, high, log = false) {
  if (log) {
    const powers = [];
    for (let p = Math.ceil(Math.log10(low)); p <= Math.floor(Math.log10(high)); p++) powers.push(10 ** p);
    if (powers.length > 1) return powers;
  }
  const span = high - low || Math.abs(high) || 1;
  const rough = span / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-9; t += step) found.push(Number(t.toPrecision(12)));
  return found;
}

/** The panel as an SVG element. lines: {label, color, points [[step, value]], faint, band [[step, low, high]]}. */
export function svgOf({ title, lines, log, range }, width = 3.3, height = width * 0.62) {
  const w = width * POINT, h = height * POINT, box = { left: 34, right: w - 6, top: 16, bottom: h - 26 };
  const inside = ([step]) => !range || (step >= range[0] && step <= range[1]);
  const shown = lines.map((line) => ({ ...line, points: line.points.filter(inside), band: (line.band ?? []).filter(inside) }));
  const xs = shown.flatMap((line) => line.points.map((p) => p[0]));
  const ys = shown.flatMap((line) => [...line.points.map((p) => p[1]), ...line.band.flatMap((b) => [b[1], b[2]])])
    .filter((y) => y !== null && (!log || y > 0));
  const extent = (all) => [all.reduce((a, b) => Math.min(a, b), Infinity), all.reduce((a, b) => Math.max(a, b), -Infinity)];
  const [x0, x1] = extent(xs), [y0, y1] = extent(ys), scale = log ? Math.log10 : (v) => v;
  const pad = log ? 0 : (y1 - y0 || Math.abs(y1) || 1) * 0.05;
  const across = (from, to, low, high) => (v) => (high === low ? (from + to) / 2 : from + ((v - low) / (high - low)) * (to - from));
  const px = across(box.left, box.right, x0, x1), place = across(box.bottom, box.top, scale(y0 - pad), scale(y1 + pad));
  const py = (v) => place(scale(v)), r = (v) => v.toFixed(2);
  const svg = node("svg", { xmlns: NAMESPACE, viewBox: `0 0 ${r(w)} ${r(h)}`, width: `${width}in`, height: `${r(height)}in`,
    "font-family": "Helvetica, Arial, sans-serif", "font-size": 8 });
  svg.append(node("rect", { width: r(w), height: r(h), fill: "#fff" }), node("text", { x: box.left, y: 10, "font-weight": 600 }, title));
  for (const t of ticks(y0 - pad, y1 + pad, log))
    svg.append(node("line", { x1: box.left, x2: r(box.right), y1: r(py(t)), y2: r(py(t)), stroke: "#e3e6ea", "stroke-width": 0.5 }),
      node("text", { x: box.left - 4, y: r(py(t) + 2.8), "text-anchor": "end" }, number(t, 3)));
  for (const t of ticks(x0, x1)) svg.append(node("text", { x: r(px(t)), y: r(box.bottom + 10), "text-anchor": "middle" }, number(t, 5)));
  svg.append(node("line", { x1: box.left, x2: r(box.right), y1: r(box.bottom), y2: r(box.bottom), stroke: "#1c1f24", "stroke-width": 0.6 }),
    node("text", { x: r((box.left + box.right) / 2), y: r(h - 5), "text-anchor": "middle" }, "step"));
  for (const { band, color } of shown)
    if (band.length) {
      const way = [...band.map((b) => [b[0], b[2]]), ...band.map((b) => [b[0], b[1]]).reverse()];
      svg.append(node("polygon", { points: way.map(([x, y]) => `${r(px(x))},${r(py(y))}`).join(" "), fill: color, "fill-opacity": 0.18 }));
    }
  for (const { points, color, faint } of shown) {
    const way = points.filter(([, y]) => y !== null && (!log || y > 0)).map(([x, y]) => `${r(px(x))},${r(py(y))}`).join(" ");
    svg.append(node("polyline", { points: way, fill: "none", stroke: color, "stroke-width": faint ? 0.5 : 1.2, "stroke-opacity": faint ? 0.5 : 1 }));
  }
  const named = shown.filter((line) => line.label && !line.faint);
  if (named.length > 1)
    named.forEach(({ label, color }, i) =>
      svg.append(node("line", { x1: r(box.right - 70), x2: r(box.right - 58), y1: 22 + 10 * i, y2: 22 + 10 * i, stroke: color, "stroke-width": 1.2 }),
        node("text", { x: r(box.right - 55), y: 25 + 10 * i }, label)));
  return svg;
}

const OF_A_PAPER = { ink: "#1c1f24", faint: "#5d6570", grid: "#e3e6ea", paper: "#fff", sure: "#0072b2" };

/** Intervals one under the other. rows: {name, mean, low, high, sure}; differences: around 0, else from 0 to 1. */
export function forestOf({ title, differences, rows }, width = 6.9, look = OF_A_PAPER) {
  const names = Math.min(0.45 * width * POINT, 12 + 4.6 * rows.reduce((most, row) => Math.max(most, row.name.length), 0));
  const w = width * POINT, top = look === OF_A_PAPER ? 18 : 4, line = 12, bottom = top + line * rows.length, left = names, right = w - 106, r = (v) => v.toFixed(2);
  const ends = rows.flatMap((row) => [row.low ?? row.mean, row.high ?? row.mean]);
  const [low, high] = differences ? [Math.min(0, ...ends), Math.max(0, ...ends)] : [Math.min(0, ...ends), Math.max(1, ...ends)];
  const pad = differences ? (high - low || 1) * 0.05 : 0;
  const px = (v) => left + ((v - low + pad) / (high - low + 2 * pad)) * (right - left);
  const svg = node("svg", { xmlns: NAMESPACE, viewBox: `0 0 ${r(w)} ${r(bottom + 18)}`, width: `${width}in`, height: `${r((bottom + 18) / POINT)}in`,
    "font-family": "Helvetica, Arial, sans-serif", "font-size": 8 });
  svg.append(node("rect", { width: r(w), height: r(bottom + 18), fill: look.paper }), look === OF_A_PAPER ? node("text", { x: 2, y: 10, "font-weight": 600, fill: look.ink }, title) : "");
  for (const t of ticks(low - pad, high + pad))
    svg.append(node("line", { x1: r(px(t)), x2: r(px(t)), y1: top, y2: bottom, stroke: t === 0 && differences ? look.ink : look.grid, "stroke-width": 0.6 }),
      node("text", { x: r(px(t)), y: r(bottom + 11), "text-anchor": "middle", fill: look.faint }, number(t, 3)));
  const said = (v) => `${differences && v > 0 ? "+" : ""}${v.toFixed(3)}`.replace("-", "\u2212");
  rows.forEach((row, i) => {
    const y = top + line * (i + 0.5), color = row.sure ? look.sure : look.faint;
    if (row.low !== null) svg.append(node("line", { x1: r(px(row.low)), x2: r(px(row.high)), y1: r(y), y2: r(y), stroke: color, "stroke-width": 1.2 }));
    svg.append(node("text", { x: r(left - 6), y: r(y + 2.8), "text-anchor": "end", fill: look.ink }, row.name),
      node("circle", { cx: r(px(row.mean)), cy: r(y), r: 2.4, fill: row.sure ? color : look.paper === "none" ? "var(--paper)" : look.paper, stroke: color }),
      node("text", { x: r(right + 6), y: r(y + 2.8), fill: look.ink }, row.low === null ? said(row.mean) : `${said(row.mean)} (${said(row.low)}, ${said(row.high)})`));
  });
  return svg;
}

export const svgText = (svg) => new XMLSerializer().serializeToString(svg);

function save(blob, name) {
  const a = document.createElement("a");
  a.href = URL.createObjectURL(blob);
  a.download = name;
  a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 10000);
}

/** The choice of how wide figures are saved. */
export const inches = () => choice("figures saved", [["3.3", "one column, 3.3 in"], ["6.9", "two columns, 6.9 in"]], state("inches", "3.3"), (v) => change({ inches: v }, true));

/** Two buttons, which save a figure as SVG and as PNG, as wide as the page's `inches` say. make(width): the figure's SVG. */
export function savers(title, make) {
  const save = (kind) => download(make(Number(state("inches", "3.3"))), kind, title.replaceAll("/", "-"));
  return ["svg", "png"].map((kind) => el("button", { class: "small", title: `save as ${kind}`, "aria-label": `save ${title} as ${kind}`, onclick: () => save(kind) }, kind.toUpperCase()));
}

/** Have the browser save the figure as NAME.svg or NAME.png. */
export async function download(svg, kind, name) {
  const blob = new Blob([svgText(svg)], { type: "image/svg+xml" });
  if (kind === "svg") return save(blob, `${name}.svg`);
  const image = new Image();
  image.src = URL.createObjectURL(blob);
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = ["width", "height"].map((side) => Math.round(Number.parseFloat(svg.getAttribute(side)) * 600));
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  URL.revokeObjectURL(image.src);
  canvas.toBlob((png) => save(png, `${name}.png`), "image/png");
}
