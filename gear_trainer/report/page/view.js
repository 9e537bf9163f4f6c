// The credit view: which rollouts, beside which others, under which method and settings, in which colour.

import { choice, el, number, percent } from "./text.js";
import { rolloutsOf } from "./data.js";
import { change, link, state } from "./state.js";
import { COLOURS, TEACHERS, chosen, fullAt, giveCredit, taught } from "./tokens.js";
import { card, firstDifference, inspector, paint } from "./rollout.js";

const RANGES = { // of sliders: least, most, step
  kl_threshold: [0, 1, 0.01], entropy_ratio: [0.5, 5, 0.05], alpha: [0, 1.99, 0.01], quantile: [0.01, 1, 0.01], signal_floor: [0, 0.1, 0.001],
  entropy_floor: [0, 2, 0.01], mix: [0, 1, 0.01], clip: [0.01, 0.99, 0.01], slope: [0, 2, 0.05], floor: [0.01, 1, 0.01], share: [0.01, 1, 0.01],
  gamma: [0, 5, 0.05], cap: [1, 5, 0.05], stable: [1, 5, 0.05], up: [0, 2, 0.05], down: [0, 2, 0.05], margin: [0, 2, 0.01], bound: [0.1, 20, 0.1],
  least: [0.0001, 0.1, 0.0001], weight: [0, 5, 0.05],
};
const NORMALIZERS = ["relu_max", "max", "minmax", "abs_max", "quantile", "none"];
const FIRST = ["kl_threshold", "entropy_ratio", "alpha", "normalizer"];
const OF_THE_PACK = ["egrsd", "cl_egrsd", "sc_grpo", "high_entropy"]; // whose level is taken over all rollouts together
const shown = { seats: [], all: [], method: null };

/** The cards that are shown, and all rollouts that the method was run over. */
export const showing = () => shown;

const keysOf = (run) => run.sample ?? run.recorded;

export const keyOf = (run) => {
  const keys = keysOf(run), steps = keys.filter((key) => typeof key === "number");
  const wanted = keys.find((key) => String(key) === state("step"));
  return wanted ?? steps.at(-1) ?? keys[0];
};

/** The run that is chosen, the first with rollouts where none is. */
export const runOf = (manifest) => {
  const first = Math.max(0, manifest.runs.findIndex((run) => keysOf(run).length));
  return manifest.runs[state("run")] ? Number(state("run")) : first;
};

// --- filters ---

const FILTERS = {
  task: (row, wanted) => row.problem.split("/")[0] === wanted,
  outcome: (row, wanted) => (wanted === "solved") === row.success,
  teaches: (row, wanted) => (wanted === "yes") === Boolean(row.advantage),
  end: (row, wanted) => row.end === wanted,
  least: (row, wanted) => row.reward >= Number(wanted),
  most: (row, wanted) => row.reward <= Number(wanted),
  problem: (row, wanted) => row.problem.toLowerCase().includes(wanted.toLowerCase()),
};

export const filtered = (rows) => rows.filter((row) => Object.entries(FILTERS).every(([name, rule]) => !state(name) || rule(row, state(name))));

function filters(manifest, rows) {
  const run = manifest.runs[runOf(manifest)];
  const some = (name, all) => [["", `any ${name}`], ...[...new Set(all)].filter((v) => v !== null).sort().map((v) => [v, v])];
  const tasks = rows.filter((row) => row.problem.includes("/")).map((row) => row.problem.split("/")[0]);
  const bound = (name, said) => el("label", { class: "field" }, el("span", {}, said),
    el("input", { type: "number", step: "any", value: state(name), onchange: (e) => change({ [name]: e.target.value || null }) }));
  return el("div", { class: "bar filters" },
    manifest.runs.length > 1 ? choice("run", manifest.runs.map((r, i) => [i, r.name]), runOf(manifest), (v) => change({ run: v, group: null, sample: null, token: null })) : null,
    keysOf(run).length > 1 && choice("step", keysOf(run).map((key) => [key, typeof key === "number" ? `step ${key}` : key.replace("/", " ")]), keyOf(run), (v) => change({ step: v, group: null, sample: null, token: null })),
    tasks.length ? choice("task", some("task", tasks), state("task"), (v) => change({ task: v || null })) : null,
    choice("outcome", [["", "any outcome"], ["solved", "solved"], ["failed", "failed"]], state("outcome"), (v) => change({ outcome: v || null })),
    run.kind === "evaluation" ? null : choice("advantage", [["", "any"], ["yes", "not 0"], ["no", "0"]], state("teaches"), (v) => change({ teaches: v || null })),
    choice("end", some("end", rows.map((row) => row.end)), state("end"), (v) => change({ end: v || null })),
    bound("least", "reward from"), bound("most", "to"),
    el("label", { class: "field" }, el("span", {}, "problem"), el("input", { type: "search", value: state("problem"), onchange: (e) => change({ problem: e.target.value || null }) })));
}

// --- the list of rollouts ---

function list(rows, current) {
  const groups = Map.groupBy(rows, (row) => row.group);
  const entries = [...groups].slice(0, 200).map(([group, own]) => el("li", {},
    el("p", {}, el("b", {}, `group ${group}`), ` ${own[0].problem} \u00b7 ${own.filter((row) => row.success).length} of ${own.length} solved`),
    el("div", { class: "samples" }, own.map((row) => el("button", {
      class: row.success ? "good" : "bad", "aria-pressed": String(row === current),
      "aria-label": `group ${group}, sample ${row.sample}, ${row.success ? "solved" : "failed"}`,
      title: `reward ${number(row.reward)}, A ${number(row.advantage)}, ${row.end ?? ""}`,
      onclick: () => change({ group, sample: row.sample, token: null }),
    }, String(row.sample))))));
  return el("nav", { class: "list", "aria-label": "rollouts" },
    el("p", { class: "quiet" }, `${rows.length} rollouts in ${groups.size} groups${groups.size > 200 ? ", of which 200 are listed: filter for others" : ""}. Green solved, red failed.`),
    el("ol", {}, entries));
}

// --- the method and its settings ---

function settings(manifest, again) {
  const run = runOf(manifest), key = keyOf(manifest.runs[run]), method = chosen(manifest, run, key), own = manifest.runs[run].method;
  const set = (field, value) => {
    change({ [`set.${field}`]: value }, true);
    again();
  };
  const control = (field) => {
    const value = method.fields[field], label = field.replaceAll("_", " ");
    if (field === "normalizer") return choice(label, NORMALIZERS.map((n) => [n, n]), value, (v) => set(field, v));
    if (typeof value === "boolean")
      return el("label", { class: "field" }, el("input", { type: "checkbox", checked: value, "data-field": field, onchange: (e) => set(field, String(e.target.checked)) }), el("span", {}, label));
    if (!RANGES[field])
      return el("label", { class: "field" }, el("span", {}, label), el("input", { type: "number", min: field === "look_ahead" ? 0 : 1, value: value ?? "", placeholder: "none", "data-field": field,
        onchange: (e) => set(field, e.target.value || (field === "max_segment_len" ? "none" : null)) }));
    const [least, most, step] = RANGES[field], said = el("output", {}, number(value, 4));
    const slider = el("input", { type: "range", min: least, max: most, step, "data-field": field, "aria-label": label, oninput: (e) => {
      said.textContent = number(Number(e.target.value), 4);
      set(field, e.target.value);
    } });
    slider.value = value;
    return el("label", { class: "field" }, el("span", {}, label), slider, said);
  };
  const order = [...FIRST.filter((f) => method.offered.includes(f)), ...method.offered.filter((f) => !FIRST.includes(f))];
  const others = order.filter((f) => !FIRST.includes(f));
  const names = Object.keys(manifest.methods).map((name) => [name, name === own?.name ? `${name} (the run's)` : name]);
  const clear = Object.fromEntries(Object.keys(manifest.methods).flatMap((name) => manifest.methods[name].offered).map((f) => [`set.${f}`, null]));
  return el("div", { class: "bar method" },
    choice("method", names, method.name, (v) => change({ ...clear, method: v })),
    order.filter((f) => FIRST.includes(f)).map(control),
    others.length ? el("details", { class: "field", open: state("all") === "1", ontoggle: (e) => change({ all: e.target.open ? "1" : null }, true) },
      el("summary", {}, "more"), el("div", { class: "bar" }, others.map(control))) : null,
    el("button", { class: "small", onclick: () => change({ ...clear, method: null }) }, own ? "as the run had it" : "as by default"),
    OF_THE_PACK.includes(method.name) ? el("p", { class: "quiet" }, "This method's level is taken over the rollouts that are read here, in training over all of the step.") : null);
}

function looks(manifest, audit, rollouts) {
  const others = rollouts.filter((r) => String(r.row.group) === String(state("group", rollouts[0]?.row.group)));
  const beside = [["none", "nothing"], ...others.map((r) => [r.row.sample, `sibling ${r.row.sample}, ${r.row.success ? "solved" : "failed"}`]), ["all", "all siblings"],
    ...manifest.runs.map((run, i) => [`run${i}`, `${run.name}, same problem`]).filter((_, i) => i !== runOf(manifest) && keysOf(manifest.runs[i]).length)];
  const colours = Object.entries(COLOURS).filter(([, c]) => audit || !c.audit).map(([name, c]) => [name, c.said]);
  const plain = rollouts[0]?.plain;
  return el("div", { class: "bar" }, plain ? null : choice("colour", colours, colourOf(audit), (v) => change({ colour: v })),
    choice("beside it", beside, state("beside", "none"), (v) => change({ beside: v === "none" ? null : v })),
    audit ? choice("teacher", TEACHERS.map((t) => [t, t]), state("teacher", "truth"), (v) => change({ teacher: v })) : null,
    audit ? choice("signal", [["k1", "k1"], ["reverse_kl", "full KL"]], state("divergence", "k1"), (v) => change({ divergence: v })) : null,
    plain ? null : el("div", { class: "legend", "aria-hidden": "true" }));
}

const colourOf = (audit) => (COLOURS[state("colour")] && (audit || !COLOURS[state("colour")].audit) ? state("colour") : audit ? "truth" : "weight");

function legend(place, colour, full) {
  const scale = COLOURS[colour], about = scale.about;
  place.className = `legend ${scale.ends ? "lost" : scale.two ? "two" : "one"}`;
  const [low, high] = scale.ends ?? [number(scale.two ? about - full : 0, 3), number(about + full, 3)];
  place.replaceChildren(el("span", {}, low), el("i"), el("span", {}, high));
}

// --- the whole ---

/** The rollouts of a step as the view reads them: of an audit, with the chosen teacher's columns. */
export async function read(source, run, key, groups) {
  const pack = await source.pack(run, key, groups);
  return rolloutsOf(pack).map((r) => taught(r, state("teacher", "truth"), state("divergence", "k1")));
}

async function others(source, manifest, own, rollouts) {
  const beside = state("beside", "none"), siblings = rollouts.filter((r) => r.row.group === own.row.group && r !== own);
  if (beside === "all") return siblings;
  if (!beside.startsWith("run")) return siblings.filter((r) => String(r.row.sample) === beside);
  const run = Number(beside.slice(3)), key = manifest.runs[run] && keyOf(manifest.runs[run]);
  if (key === undefined) return [];
  const rows = await source.rows(run, key), same = rows.find((row) => row.problem === own.row.problem);
  if (!same) return [];
  const theirs = await read(source, run, key, [same.group]);
  giveCredit(theirs, chosen(manifest, run, key));
  const match = theirs.filter((r) => r.row.problem === own.row.problem);
  return [Object.assign(match.find((r) => r.row.sample === own.row.sample) ?? match[0], { from: manifest.runs[run].name })];
}

/** Draw the credit view anew in the section; what is returned goes to the linked token, once the section is in the page. */
export async function showCredit(section, manifest, source) {
  const run = runOf(manifest), key = keyOf(manifest.runs[run]);
  if (key === undefined) return section.replaceChildren(el("p", {}, "No rollouts were kept."));
  const all = await source.rows(run, key), rows = filtered(all);
  const sameAs = (row) => String(row.group) === state("group") && (state("sample") === "" || String(row.sample) === state("sample"));
  const linked = rows.find(sameAs), absent = state("group") !== "" && !linked;
  const current = linked ?? rows.find((row) => row.advantage && row.deviation >= 0) ?? rows.find((row) => row.advantage) ?? rows[0];
  const work = el("div", { class: "work" }), box = el("div", { class: "credit" }, list(rows, current), work);
  section.replaceChildren(filters(manifest, all), box);
  if (!current) return work.replaceChildren(el("p", {}, "No rollout fits the filters."));
  const rollouts = await read(source, run, key, [current.group]);
  const own = rollouts.find((r) => r.row.group === current.group && r.row.sample === current.sample);
  const beside = await others(source, manifest, own, rollouts);
  const audit = Boolean(own.columns.true_advantage), cards = [own, ...beside], apart = cards.length > 1 ? firstDifference(cards) : null;
  const panel = el("aside", { class: "inspector", "aria-live": "polite", "aria-label": "the token's numbers" }, el("p", { class: "quiet" }, "Point at a token, or walk with the arrow keys: left and right by token, up and down by segment."));
  const look = (seat, i, focused) => {
    const r = seat.r, where = { view: "credit", run, step: key, group: r.row.group, sample: r.row.sample, token: i };
    if (!r.plain) panel.replaceChildren(...inspector(r, i, link(where)));
    if (focused && !r.from) change({ view: "credit", run: run || null, step: key, group: own.row.group, sample: own.row.sample, ...(r === own ? { token: i } : {}) }, true);
  };
  const seats = cards.map((r, k) => card(r, { name: `t${k}`, apart, look, title: `${r.from ? `${r.from}: ` : ""}${r.row.problem}, sample ${r.row.sample}` }));
  const controls = looks(manifest, audit, rollouts);
  const again = () => {
    const method = chosen(manifest, run, key), colour = colourOf(audit);
    giveCredit(rollouts, method);
    const full = own.plain ? 1 : fullAt(colour, cards);
    seats.forEach((seat) => paint(seat, colour, full));
    if (!own.plain) legend(controls.querySelector(".legend"), colour, full);
    Object.assign(shown, { seats, all: rollouts, method });
    const looked = seats.find((seat) => seat.focused >= 0);
    if (looked) look(looked, looked.focused, false);
  };
  const pieces = own.plain ? "words" : "tokens";
  const missed = `Group ${state("group")}${state("sample") && `, sample ${state("sample")}`} is not here: of another step, not kept (rollout.records), or filtered out. This is group ${current.group}, sample ${current.sample}.`;
  const alike = apart === null ? "" : cards.every((r) => r.texts.length === apart) ? `They are the same, all ${number(apart)} ${pieces}.` : apart ? `The first ${number(apart)} ${pieces} are the same; from the mark on they differ.` : `They differ from the first ${pieces.slice(0, -1)} on.`;
  work.replaceChildren(absent ? el("p", { class: "bad" }, missed) : "", controls, own.plain ? "" : settings(manifest, again), alike && el("p", { class: "quiet" }, alike),
    el("div", { class: own.plain ? "reading plain" : "reading" }, el("div", { class: "cards" }, seats.map((seat) => seat.box)), own.plain ? "" : panel));
  again();
  const token = state("token");
  return () => {
    if (token === "" || !seats[0].tokens[Number(token)]) return;
    seats[0].focus(Number(token));
    seats[0].list.focus({ preventScroll: true });
  };
}

export const shareOf = (count, total) => (total ? percent(count / total) : "\u2013");
