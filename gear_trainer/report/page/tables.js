// Figures of a study or an evaluation: intervals drawn one under the other, and the tables that hold all numbers.

import { el } from "./text.js";
import { forestOf, inches, savers } from "./figure.js";

const LONG = 40; // rows from which on a table is folded

/** What a page draws with its own colours, by day and by night. */
const OF_THE_PAGE = { ink: "var(--ink)", faint: "var(--faint)", grid: "var(--line)", paper: "none", sure: "var(--accent)" };

function forest([title, differences, rows]) {
  const shown = { title, differences, rows: rows.map(([name, mean, low, high, sure]) => ({ name, mean, low, high, sure })) };
  const said = differences ? "Mean differences with their 95 % intervals. Blue and filled: below 0.05 after Holm's correction; hollow: not." : "Means with their 95 % intervals.";
  const drawn = forestOf(shown, Math.min(6.9, Math.max(3.3, innerWidth / 130)), OF_THE_PAGE); // so that its text is as large as the page's
  drawn.setAttribute("role", "img");
  drawn.setAttribute("aria-label", `${title}, the numbers are in the tables`);
  return el("figure", { class: "panel forest", "data-panel": title },
    el("figcaption", {}, el("h3", {}, title), savers(title, (width) => forestOf(shown, width))), drawn, el("p", { class: "quiet" }, said));
}

function tableOf([title, head, rows, said]) {
  const grid = el("table", { class: "grid" }, el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) => (i ? el("td", {}, el("bdi", {}, cell)) : el("th", { scope: "row" }, el("bdi", {}, cell))))))));
  const wide = el("div", { class: "wide", tabIndex: 0, role: "group", "aria-label": title }, grid);
  return el("section", { class: "group", "data-table": title }, el("h2", {}, title),
    rows.length > LONG ? el("details", {}, el("summary", { class: "quiet" }, `${rows.length} rows`), wide) : wide,
    said ? el("p", { class: "quiet told" }, said) : null);
}

/** Draw the figures of all studies and evaluations anew in the section. */
export function showFigures(section, manifest) {
  const own = manifest.runs.filter((run) => run.tables.length);
  section.replaceChildren(...own.flatMap((run) => [own.length > 1 ? el("h2", {}, run.name) : "",
    ...(run.intervals.length ? [el("h2", {}, "With intervals"), el("div", { class: "bar" }, inches())] : []), el("div", { class: "forests" }, run.intervals.map(forest)), ...run.tables.map(tableOf)]));
}
