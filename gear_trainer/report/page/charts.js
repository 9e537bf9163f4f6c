// Curves: a panel a number, linked cursors and zoom, several runs overlaid with their mean and its interval. Drawn by uPlot.

import { el, number, tick } from "./text.js";
import { change, state } from "./state.js";
import { inches, savers, svgOf } from "./figure.js";

export const COLORS = ["#0072b2", "#d55e00", "#009e73", "#b5609a", "#b8860b", "#3a9ad9", "#6a51a3", "#8c564b"];
const BY_NIGHT = { "#0072b2": "#5ab0ea", "#d55e00": "#f0955a", "#009e73": "#4cc9a2", "#b5609a": "#d995c3", "#6a51a3": "#a896dc", "#8c564b": "#c4948a" };
const GROUPS = [
  ["What was earned", /^(reward_mean|success|outcome|held_out|held_out_success|zero_advantage|mixed_groups|resampled_groups|overlong_penalty)(\/|$)/],
  ["Rollouts", /^(response_length|policy_tokens|tool_|truncated|texts_escaped|replies_cut|rollouts_|groups_|references_|reference_masks|token_age)/],
  ["The sampler against the trainer", /^(logprob_gap|mismatch_kl|effective_sample_size|importance)/],
  ["Credit", /^(share_|segments_per|mean_segment|mean_weight|silent_|mean_signal|wrong_hint|teacher_gain)/],
  ["The update", /^(loss|grad_norm|lr|entropy|clip_|dual_clip|approx_kl|divergence|reference_kl|updates_|nonfinite)/],
  ["The machine", /^(seconds|memory|mfu|tokens_per|idle|padding)/],
];
const FAMILIES = ["outcome", "seconds", "memory", "memory_planned", "mfu"]; // of which one panel shows all
const WHOLE = [1, 2, 5].flatMap((m) => [0, 1, 2, 3, 4, 5].map((p) => m * 10 ** p)).sort((a, b) => a - b); // steps between ticks
const GREY = "#70767f"; // of what others are held against
const NEAR = 300; // px below the window within which panels are drawn
const drawn = [];
let waiting = new Map(); // by their place in the page, panels that nobody has come near to yet

/** The panels of the page: {group, title, lines}, a line being {label, color, points, values, faint, band}; every number of every run is in one. */
export const panelsOf = (manifest) => [...ofStudies(manifest), ...ofRuns(manifest)];

function ofRuns(manifest) {
  const runs = manifest.runs.filter((run) => Object.keys(run.series).length);
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.series)))];
  const together = (name) => (runs.length === 1 ? FAMILIES.find((family) => name.startsWith(`${family}/`)) : undefined);
  const found = new Map();
  for (const name of names) {
    const title = together(name) ?? name;
    const panel = found.get(title) ?? { title, group: (GROUPS.find(([, rule]) => rule.test(name)) ?? ["Other"])[0], lines: [] };
    panel.lines.push(...(together(name) ? family(runs[0], name, panel.lines.length) : overlaid(manifest, runs, name)));
    found.set(title, panel);
  }
  const order = (panel) => GROUPS.findIndex(([group]) => group === panel.group) + 1 || GROUPS.length + 1;
  return [...found.values()].sort((a, b) => order(a) - order(b));
}

/** A line over steps, whose points are made where they are asked for: most lines of a long run are never looked at. */
function lineOf([steps, values], about) {
  return { ...about, values, get points() { return steps.map((step, i) => [step, values[i]]); } };
}

function family(run, name, place) {
  return [lineOf(run.series[name], { label: name.slice(name.indexOf("/") + 1), color: COLORS[place % COLORS.length], name })];
}

/** A panel an arm of a study: its runs, their mean with its interval, and the baseline's; of a few arms all means together. */
function ofStudies(manifest) {
  const meanOf = (arm, color) => ({ label: `${arm.name}, mean of ${arm.seeds}`, color, points: arm.curve.map(([step, mean]) => [step, mean]),
    values: arm.curve.map(([, mean]) => mean), band: arm.curve.filter(([, , low]) => low !== null).map(([step, , low, high]) => [step, low, high]), name: null });
  return manifest.runs.flatMap((run) => {
    const base = run.arms.find((arm) => arm.baseline), others = run.arms.filter((arm) => arm !== base);
    const reach = run.arms.flatMap((arm) => [...arm.curve.flatMap(([, ...values]) => values), ...arm.runs.flatMap((own) => own.points.map(([, value]) => value))]).filter((v) => v !== null);
    const about = { group: `${run.name}: ${run.arms[0]?.metric}`, own: true, reach: [Math.min(...reach), Math.max(...reach)] };
    const faint = (arm) => arm.runs.map((own) => lineOf([own.points.map(([step]) => step), own.points.map(([, value]) => value)], { label: own.name, color: COLORS[0], faint: true, name: null }));
    const panels = (others.length ? others : run.arms).map((arm) => ({ ...about, title: arm.name,
      lines: [...(base && base !== arm ? [meanOf(base, GREY)] : []), ...faint(arm), meanOf(arm, COLORS[0])] }));
    const all = { ...about, title: "all arms", lines: [...(base ? [meanOf(base, GREY)] : []), ...others.map((arm, i) => meanOf(arm, COLORS[i % COLORS.length]))] };
    return others.length > 1 && others.length <= COLORS.length ? [all, ...panels] : panels;
  });
}

function overlaid(manifest, runs, name) {
  const methods = [...new Set(runs.map((run) => run.credit))];
  const lines = [];
  const several = runs.filter((run) => run.series[name]).length > 1;
  for (const run of runs) {
    if (!run.series[name]) continue;
    const faint = manifest.bands.some((band) => band.series[name] && band.runs.includes(manifest.runs.indexOf(run)));
    const place = manifest.bands.length ? methods.indexOf(run.credit) : runs.indexOf(run);
    lines.push(lineOf(run.series[name], { label: several ? run.name : "", color: COLORS[place % COLORS.length], faint, name }));
  }
  for (const band of manifest.bands) {
    if (!band.series[name]) continue;
    const color = COLORS[methods.indexOf(manifest.runs[band.runs[0]].credit) % COLORS.length];
    const bounds = band.series[name].filter(([, , low]) => low !== null).map(([step, , low, high]) => [step, low, high]);
    const means = [band.series[name].map(([step]) => step), band.series[name].map(([, mean]) => mean)];
    lines.push(lineOf(means, { label: band.name, color, band: bounds, name: null }));
  }
  return lines;
}

/** uPlot's columns: the steps, then a column a line, and two for each band. */
function columnsOf(panel, log) {
  const points = panel.lines.map((line) => line.points);
  const steps = [...new Set(points.flatMap((own) => own.map(([step]) => step)))].sort((a, b) => a - b);
  const at = new Map(steps.map((step, i) => [step, i]));
  const column = (pairs) => {
    const out = new Array(steps.length).fill(null);
    for (const [step, value] of pairs) out[at.get(step)] = log && !(value > 0) ? null : value;
    return out;
  };
  const bands = panel.lines.filter((line) => line.band?.length);
  return [steps, ...points.map(column),
    ...bands.flatMap((line) => [column(line.band.map(([s, , high]) => [s, high])), column(line.band.map(([s, low]) => [s, low]))])];
}

/** The colour as this page's light wants it. */
function shade(color) {
  return getComputedStyle(document.body).getPropertyValue("color-scheme") === "dark" ? BY_NIGHT[color] ?? color : color;
}

function draw(panel, place, said, log) {
  const css = getComputedStyle(document.body), ink = css.getPropertyValue("--faint"), grid = css.getPropertyValue("--line");
  const bands = panel.lines.filter((line) => line.band?.length), first = panel.lines.length + 1;
  const series = [
    {},
    ...panel.lines.map((line) => ({ label: line.label, stroke: shade(line.color), width: line.faint ? 0.7 : 1.6, alpha: line.faint ? 0.5 : 1,
      spanGaps: true, points: { show: !line.faint && line.values.length < 30, size: 4 } })),
    ...bands.flatMap((line) => [1, 2].map(() => ({ stroke: line.color, width: 0, points: { show: false }, spanGaps: true }))),
  ];
  const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
  const chart = new uPlot({
    width: Math.max(place.clientWidth, 160), height: 170, legend: { show: false }, series,
    bands: bands.map((line, i) => ({ series: [first + 2 * i, first + 2 * i + 1], fill: `${shade(line.color)}2e` })),
    scales: { x: { time: false, range: (_, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) }, y: { distr: log ? 3 : 1, ...(log ? {} : { range: panel.reach ? () => room(null, ...panel.reach) : room }) } },
    axes: [{ ...axis, size: 26, incrs: WHOLE }, { ...axis, size: 52, values: (_, all) => all.map((v) => (v === null ? "" : tick(v))) }],
    cursor: { sync: { key: "step", scales: ["x", null] }, drag: { x: true, y: false }, points: { size: 6 } },
    hooks: { setCursor: [(u) => say(u, panel, said)] },
  }, columnsOf(panel, log), place);
  say(chart, panel, said);
  return chart;
}

/** Under the panel's name: each line's value at the cursor, or its last. */
function say(chart, panel, said) {
  const at = chart.cursor.idx;
  const told = panel.lines.filter((line) => !(panel.own && line.faint)).slice(0, 9);
  const cells = told.map((line) => {
    const column = chart.data[panel.lines.indexOf(line) + 1];
    const value = at === null || at === undefined ? column.findLast((v) => v !== null) : column[at];
    const mark = el("i", { class: "swatch" });
    mark.style.setProperty("background", shade(line.color));
    return el("span", { class: "value" }, panel.lines.length > 1 ? mark : null, line.label ? `${line.label} ` : "", el("b", {}, number(value)));
  });
  const step = at === null || at === undefined ? [] : [el("span", { class: "value" }, "step ", el("b", {}, number(chart.data[0][at])))];
  said.replaceChildren(...step, ...cells);
}

function panelElement(panel, log) {
  const place = el("div", { class: "plot", role: "img", "aria-label": `${panel.title} by step` }), said = el("div", { class: "values" });
  const box = el("figure", { class: "panel", "data-panel": panel.title },
    el("figcaption", {}, el("h3", {}, panel.own ? panel.title : panel.title.replaceAll("_", " ")), savers(panel.title, (width) => svgOf({ ...panel, log, range: rangeOf(chart) }, width))), said, place);
  let chart;
  return { box, start: () => {
    const beside = drawn[0]?.chart;
    chart = draw(panel, place, said, log);
    if (beside && zoomed(beside)) chart.setScale("x", { min: beside.scales.x.min, max: beside.scales.x.max });
    drawn.push({ panel, chart, place });
  } };
}

const zoomed = ({ data: [steps], scales }) => steps.length > 1 && typeof scales.x.min === "number" && (scales.x.min > steps[0] || scales.x.max < steps.at(-1));

const rangeOf = (chart) => (chart?.scales.x.min === null || !chart ? null : [chart.scales.x.min, chart.scales.x.max]);

/** The heights that a panel spans: a little more than its values, and half of a value around one that stands alone. */
function room(_, low, high) {
  return low === high ? [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2] : uPlot.rangeNum(low, high, 0.1, true);
}

/** Whether nothing moves in a panel: all of its lines are one number at all of their steps. */
function constant(panel) {
  if (panel.own) return false;
  const first = panel.lines[0].values[0];
  return panel.lines.some((line) => line.values.length > 1) && panel.lines.every((line) => line.values.every((value) => value === first));
}

/** What did not move, in a line rather than as panels. */
function still(panels) {
  if (!panels.length) return null;
  return el("p", { class: "quiet constants" }, "Constant: ", panels.flatMap((panel, i) => [i ? " \u00b7 " : "",
    el("span", { "data-panel": panel.title }, `${panel.title.replaceAll("_", " ")} `, el("b", {}, number(panel.lines[0].values[0])))]));
}

/** The charts that are drawn: {panel, chart}. */
export const charts = () => drawn;

/** Draw what waits, all of it or what these places hold. */
export function drawWaiting(places = [...waiting.keys()]) {
  for (const place of places) {
    nearness.unobserve(place);
    waiting.get(place)?.();
    waiting.delete(place);
  }
}

const nearness = new IntersectionObserver((seen) => drawWaiting(seen.filter((one) => one.isIntersecting).map((one) => one.target)), { rootMargin: `${NEAR}px` });
addEventListener("beforeprint", () => drawWaiting());

/** Lay out all panels anew in the section; what is returned draws those that are in sight, once the section is in the page. */
export function showCurves(section, manifest) {
  drawn.splice(0).forEach(({ chart }) => chart.destroy());
  nearness.disconnect();
  waiting = new Map();
  const log = state("log") === "1", panels = panelsOf(manifest);
  const made = panels.filter((panel) => !constant(panel)).map((panel) => [panel.group, panelElement(panel, log)]);
  const groups = [...new Set(panels.map((panel) => panel.group))];
  section.replaceChildren(
    el("div", { class: "bar" },
      el("label", { class: "field" }, el("input", { type: "checkbox", checked: log, onchange: (e) => change({ log: e.target.checked ? "1" : null }) }), el("span", {}, "logarithmic")),
      inches(),
      el("span", { class: "quiet" }, "Drag across a panel to zoom all of them, double-click for the whole run. ",
        panels.some((panel) => panel.own) ? "Thin: runs. Thick: their mean over seeds; shaded: its 95 % interval. Grey: the baseline. " : "",
        manifest.bands.length ? "Thick: the mean of a method's runs; shaded: its 95 % interval over runs." : "")),
    ...groups.map((group) => el("section", { class: "group" }, el("h2", {}, group),
      el("div", { class: "panels" }, made.filter(([own]) => own === group).map(([, panel]) => panel.box)),
      still(panels.filter((panel) => panel.group === group && constant(panel))))),
  );
  if (!panels.length) section.append(el("p", {}, "No step was made yet."));
  return () => {
    made.forEach(([, panel]) => waiting.set(panel.box, panel.start));
    drawWaiting(made.map(([, panel]) => panel.box).filter((box) => box.getBoundingClientRect().top < innerHeight));
    waiting.forEach((_, box) => nearness.observe(box));
  };
}

new ResizeObserver(() => drawn.forEach(({ chart, place }) => {
  if (place.clientWidth && Math.abs(chart.width - place.clientWidth) > 1) chart.setSize({ width: place.clientWidth, height: 170 });
})).observe(document.documentElement);
