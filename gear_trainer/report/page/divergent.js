// Where student and teacher part most: which tokens stand among the highest signals, and how often they stand there by chance.

import { choice, el, number, percent, visible } from "./text.js";
import { change, link, state } from "./state.js";
import { keyOf, read, runOf } from "./view.js";

const MOST = 50, EXAMPLES = 12, LOADED = 8, ROLLOUTS = 64;
// Discourse rather than content: words that carry a trace along. A token without a letter or a digit is style too.
const STYLE = new Set(["so", "now", "then", "thus", "hence", "wait", "okay", "ok", "hmm", "well", "first", "next", "finally", "let", "let's", "therefore", "alternatively", "however", "but", "and", "also", "actually", "maybe", "perhaps", "the", "a", "we", "i"]);

export const isStyle = (text) => !/[\p{L}\p{N}]/u.test(text) || STYLE.has(text.trim().toLowerCase());

/** Tokens by their count among the top share of |signal|: {text, count, base, mean, style, places}. spots: {r, key} pairs. */
export function divergent(spots, part) {
  const all = spots.flatMap(({ r, key }) => (r.columns.raw_signal ? r.policy.filter((i) => Number.isFinite(r.columns.raw_signal[i])).map((i) => ({ r, key, i, s: Math.abs(r.columns.raw_signal[i]) })) : []));
  const base = Map.groupBy(all, (spot) => spot.r.texts[spot.i]);
  all.sort((a, b) => b.s - a.s);
  const top = all.slice(0, Math.ceil(part * all.length));
  const found = [...Map.groupBy(top, (spot) => spot.r.texts[spot.i])].map(([text, own]) => ({
    text, count: own.length, base: base.get(text).length / all.length, style: isStyle(text), places: own,
    mean: own.reduce((sum, spot) => sum + spot.s, 0) / own.length,
  }));
  found.sort((a, b) => b.count - a.count || b.mean - a.mean);
  const style = top.filter((spot) => isStyle(spot.r.texts[spot.i])).length, anywhere = all.filter((spot) => isStyle(spot.r.texts[spot.i])).length;
  return { found, top: top.length, all: all.length, style: style / (top.length || 1), anywhere: anywhere / (all.length || 1) };
}

function spread(keys) {
  const steps = keys.filter((key) => typeof key === "number");
  if (steps.length <= LOADED) return steps.length ? steps : keys;
  return Array.from({ length: LOADED }, (_, k) => steps[Math.round((k * (steps.length - 1)) / (LOADED - 1))]);
}

async function spotsOf(source, run, keys) {
  const found = [];
  for (const key of keys) {
    let groups = null;
    if (source.partial) groups = [...new Set((await source.rows(run, key)).filter((row) => row.advantage).slice(0, ROLLOUTS).map((row) => row.group))];
    if (groups && !groups.length) continue;
    for (const r of await read(source, run, key, groups)) found.push({ r, key });
  }
  return found;
}

/** Draw the list of tokens anew in the section. */
export async function showTokens(section, manifest, source) {
  const run = runOf(manifest), whole = manifest.runs[run], keys = whole.sample ?? whole.recorded;
  if (!keys.length) return section.replaceChildren(el("p", {}, "No rollouts were kept."));
  const span = state("span", "step"), part = Number(state("top", "0.05")) || 0.05;
  const chosen = span === "run" ? spread(keys) : [keyOf(whole)];
  const { found, top, all, style, anywhere } = divergent(await spotsOf(source, run, chosen), part);
  const examples = el("div", { class: "examples" }, el("p", { class: "quiet" }, "Choose a token for its places."));
  const show = (entry) => examples.replaceChildren(el("h2", {}, el("code", {}, visible(entry.text)), ` ${entry.count} times`),
    el("ul", {}, entry.places.slice(0, EXAMPLES).map(({ r, key, i, s }) => el("li", {},
      el("a", { href: link({ view: "credit", run, step: key, group: r.row.group, sample: r.row.sample, token: i, colour: "signal" }) }, `step ${key}, group ${r.row.group}, sample ${r.row.sample}`),
      ` ${number(r.columns.raw_signal[i], 4)} nats: `, el("bdi", { class: "context" }, visible(r.texts.slice(Math.max(0, i - 6), i).join("")), el("mark", {}, visible(r.texts[i])), visible(r.texts.slice(i + 1, i + 5).join("")))))));
  const rows = found.slice(0, MOST).map((entry) => el("tr", {},
    el("td", {}, el("button", { class: "token", onclick: () => show(entry) }, el("code", {}, visible(entry.text)))),
    el("td", {}, number(entry.count)), el("td", {}, percent(entry.count / top)), el("td", {}, percent(entry.base)),
    el("td", {}, number(entry.count / top / entry.base, 3)), el("td", {}, number(entry.mean, 4)), el("td", {}, entry.style ? "style" : "")));
  section.replaceChildren(
    el("div", { class: "bar" },
      manifest.runs.length > 1 ? choice("run", manifest.runs.map((r, i) => [i, r.name]), run, (v) => change({ run: v })) : null,
      choice("over", [["step", "one step"], ["run", "the run"]], span, (v) => change({ span: v })),
      span === "step" ? choice("step", keys.map((key) => [key, String(key)]), keyOf(whole), (v) => change({ step: v })) : null,
      choice("highest", [["0.01", "1 %"], ["0.05", "5 %"], ["0.1", "10 %"]], part, (v) => change({ top: v }))),
    el("p", {}, `Of ${number(all)} policy tokens that a teacher scored, the ${number(top)} with the largest |signal|. `,
      el("b", {}, percent(style)), ` of them are style tokens (punctuation, space, discourse words), against ${percent(anywhere)} of all tokens. `,
      span === "run" ? `Steps ${chosen.join(", ")}.` : ""),
    el("div", { class: "divergent" },
      el("div", { class: "wide" }, el("table", { class: "grid" }, el("thead", {}, el("tr", {}, ["token", "times", "of the highest", "of all", "lift", "mean |signal|", ""].map((h) => (h ? el("th", { scope: "col" }, h) : el("td"))))), el("tbody", {}, rows))), examples));
}
