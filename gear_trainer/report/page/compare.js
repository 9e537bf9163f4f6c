// Two runs, or two steps of one, on the problems that both sampled.

import { choice, el, number } from "./text.js";
import { change, link, state } from "./state.js";

const MOST = 300;

function byProblem(rows) {
  return new Map([...Map.groupBy(rows, (row) => row.problem)].map(([problem, own]) => {
    const known = own.filter((row) => row.reward !== null);
    return [problem, { rows: own, success: own.filter((row) => row.success).length / own.length, reward: known.reduce((sum, row) => sum + row.reward, 0) / (known.length || 1) }];
  }));
}

/** The problems of both sides: {problem, a, b}, those first where success differs most. */
export function common(a, b) {
  const left = byProblem(a), right = byProblem(b);
  return [...left.keys()].filter((problem) => right.has(problem)).map((problem) => ({ problem, a: left.get(problem), b: right.get(problem) }))
    .sort((x, y) => Math.abs(y.b.success - y.a.success) - Math.abs(x.b.success - x.a.success));
}

/** Draw the comparison anew in the section. */
export async function showCompare(section, manifest, source) {
  const sides = manifest.runs.flatMap((run, i) => (run.sample ?? run.recorded).map((key) => [`${i}:${key}`, `${run.name}, ${typeof key === "number" ? `step ${key}` : key.replace("/", " ")}`]));
  if (sides.length < 2) return section.replaceChildren(el("p", {}, "There is one set of rollouts only: nothing to compare it with."));
  const has = (name, fallback) => (sides.some(([key]) => key === state(name)) ? state(name) : fallback);
  const other = sides.findLast(([key]) => !key.startsWith("0:")) ?? sides[0], last = sides.findLast(([key]) => key.startsWith("0:"));
  const a = has("a", last[0]), b = has("b", other[0]);
  const place = (side) => [Number(side.slice(0, side.indexOf(":"))), side.slice(side.indexOf(":") + 1)].map((part, i) => (i && /^\d+$/.test(part) ? Number(part) : part));
  const [left, right] = await Promise.all([a, b].map((side) => source.rows(...place(side))));
  const found = common(left, right), mean = (side) => found.reduce((sum, row) => sum + row[side].success, 0) / (found.length || 1);
  const cell = (side, own) => {
    const [run, key] = place(side);
    return el("td", {}, el("a", { href: link({ view: "credit", run, step: key, group: own.rows[0].group, sample: own.rows[0].sample }) }, number(own.success, 3)), el("small", {}, ` of ${own.rows.length}, reward ${number(own.reward, 3)}`));
  };
  section.replaceChildren(
    el("div", { class: "bar" }, choice("A", sides, a, (v) => change({ a: v })), choice("B", sides, b, (v) => change({ b: v }))),
    el("p", {}, found.length ? `${found.length} problems are in both: success ${number(mean("a"), 4)} in A, ${number(mean("b"), 4)} in B.` : "No problem is in both: runs of one seed sample the same problems at the same step, audits of one task the same held-out ones."),
    found.length ? el("div", { class: "wide" }, el("table", { class: "grid" }, el("thead", {}, el("tr", {}, ["problem", "success in A", "in B", "B less A"].map((h) => el("th", { scope: "col" }, h)))),
      el("tbody", {}, found.slice(0, MOST).map((row) => el("tr", {}, el("th", { scope: "row" }, el("bdi", {}, row.problem)), cell(a, row.a), cell(b, row.b), el("td", {}, number(row.b.success - row.a.success, 3))))))) : "");
}
