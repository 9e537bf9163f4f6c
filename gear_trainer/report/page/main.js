// The page: its head, its views, and what a live run adds.

import { el, number } from "./text.js";
import { embedded, kept, parsePack, rolloutsOf, served } from "./data.js";
import { change, link, onChange, state } from "./state.js";
import { charts, drawWaiting, showCurves } from "./charts.js";
import { creditWeights } from "./credit.js";
import { needsOf, packed } from "./tokens.js";
import { showFigures } from "./tables.js";
import { showCredit, showing } from "./view.js";
import { showTokens } from "./divergent.js";
import { showCompare } from "./compare.js";

const AGAIN = 5000; // ms between looks at a live run
const source = kept(embedded() ?? served());
const main = document.getElementById("main"), top = document.getElementById("top");
let manifest;

const scored = (run) => run.kind === "run" || run.kind === "audit";
const VIEWS = { // name, what draws it, and of which runs there is such a view
  figures: ["Figures", showFigures, (run) => run.tables.length],
  curves: ["Curves", showCurves, (run) => run.kind === "run" || run.arms.length],
  credit: ["Credit", showCredit, (run) => run.kind === "run" || run.recorded.length],
  tokens: ["Divergent tokens", showTokens, scored],
  health: ["Health", showHealth, (run) => run.kind === "run"],
  compare: ["Compare", showCompare, (run) => run.recorded.length > (manifest.runs.length === 1)],
  setup: ["Set-up", showSetup, () => true],
};

const views = () => Object.keys(VIEWS).filter((name) => manifest.runs.some(VIEWS[name][2]));

const titleOf = (name) => (name === "credit" && !manifest.runs.some(scored) ? "Rollouts" : VIEWS[name][0]);

function viewOf() {
  const known = views();
  return known.includes(state("view")) ? state("view") : known.find((name) => name !== "curves" || manifest.runs.some((run) => run.arms.length || Object.keys(run.series).length));
}

function facts(run) {
  const held = run.series.held_out_success?.[1] ?? [];
  const parts = [run.credit || null, run.task || null, run.steps ? `step ${run.step} of ${run.steps}` : null, run.state, run.said || null];
  if (held.length > 1) parts.push(`held-out success ${number(held[0], 3)} \u2192 ${number(held.at(-1), 3)}`);
  return el("p", { class: "facts" }, manifest.runs.length > 1 ? el("b", {}, `${run.name}  `) : null, parts.filter(Boolean).join(" \u00b7 "), run.why ? ` (${run.why})` : "");
}

function sampled(run) {
  if (!run.sample || run.sample.length === run.recorded.length) return null;
  const name = manifest.runs.length > 1 ? `${run.name}: ` : "";
  return el("p", { class: "quiet" }, `${name}this page carries the rollouts of ${run.sample.length} of the ${run.recorded.length} steps that were kept; `, el("code", {}, "gear-trainer report --serve"), " shows all of them.");
}

function head() {
  const warned = manifest.runs.reduce((sum, run) => sum + run.warnings.length, 0), now = viewOf();
  const tabs = views().map((name) => el("a", { href: link({ ...(name === "credit" || name === "tokens" ? keep() : {}), view: name }), "aria-current": name === now ? "page" : null },
    titleOf(name), name === "health" && warned ? el("span", { class: "count" }, String(warned)) : null));
  top.replaceChildren(el("div", { class: "title" }, el("h1", {}, manifest.title), theme()), ...manifest.runs.slice(0, 12).map(facts), ...manifest.runs.map(sampled).filter(Boolean), el("nav", { "aria-label": "views" }, tabs));
}

const keep = () => Object.fromEntries(["run", "step", "group", "sample"].map((name) => [name, state(name)]).filter(([, value]) => value !== ""));

function theme() {
  const themes = ["", "light", "dark"], said = { "": "as the system", light: "light", dark: "dark" };
  const set = (name) => (name ? (document.documentElement.dataset.theme = name) : delete document.documentElement.dataset.theme);
  set(state("theme"));
  return el("button", { class: "small", "aria-label": "light or dark", onclick: () => change({ theme: themes[(themes.indexOf(state("theme")) + 1) % 3] || null }) }, said[state("theme")] ?? said[""]);
}

function showHealth(section) {
  const parts = manifest.runs.filter((run) => run.kind === "run").flatMap((run) => [
    manifest.runs.length > 1 ? el("h2", {}, run.name) : null,
    ...run.warnings.map((w) => el("article", { class: "warning" }, el("h3", {}, w.found), el("p", {}, w.reason), el("p", {}, el("b", {}, "Mend: "), w.mend), el("p", { class: "quiet" }, "look at ", el("code", {}, w.metric)))),
    run.warnings.length ? null : el("p", {}, Object.keys(run.series).length ? "Nothing to warn of." : "No steps, so nothing to judge."),
  ]);
  section.replaceChildren(...parts.filter(Boolean));
}

function showSetup(section) {
  section.replaceChildren(...manifest.runs.flatMap((run) => [el("h2", {}, run.name), el("pre", { tabIndex: 0, "aria-label": `configuration of ${run.name}` }, run.config)]));
}

async function show() {
  head();
  const section = el("section", { class: "view" });
  section.setAttribute("aria-label", titleOf(viewOf()));
  let inPlace; // what can be done only where the section stands in the page: to measure, to focus
  try {
    inPlace = await VIEWS[viewOf()][1](section, manifest, source);
  } catch (error) {
    section.replaceChildren(el("p", { class: "bad" }, `Not shown: ${error.message}`));
  }
  main.replaceChildren(section);
  inPlace?.();
  document.documentElement.dataset.ready = String(Number(document.documentElement.dataset.ready ?? 0) + 1);
}

async function again() {
  try {
    const next = await source.manifest(manifest.stamp);
    const moved = next && JSON.stringify(next) !== JSON.stringify(manifest);
    manifest = next ?? manifest;
    if (moved) viewOf() === "curves" || viewOf() === "health" ? await show() : head();
  } catch { /* the host is gone for now: what is shown stays */ }
  setTimeout(again, AGAIN);
}

let showingNow = Promise.resolve();
onChange(() => (showingNow = showingNow.then(show)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (showingNow = showingNow.then(show)));
manifest = await source.manifest();
document.title = manifest.title;
globalThis.gear = { charts, drawWaiting, showing, creditWeights, needsOf, packed, parsePack, rolloutsOf, source, manifest: () => manifest }; // for the console
await show();
if (manifest.live) setTimeout(again, AGAIN);
