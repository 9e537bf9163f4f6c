// Rollouts and the credit of their tokens: a method with its settings over a pack, and the numbers of a token.

import { creditWeights, fieldsAt } from "./credit.js";
import { state } from "./state.js";

export const TEACHERS = ["truth", "sibling", "wrong", "nothing"]; // of an audit
const COLUMN = { signal: "raw_signal", turn_ids: "turn" }; // where a method's input is called otherwise
const BY_TURN = ["turn", "gigpo"];

/** The method that is chosen, the run's own where none is: {name, kind, fields, offered, needs}. */
export function chosen(manifest, run, key) {
  const own = manifest.runs[run].method;
  const name = manifest.methods[state("method")] ? state("method") : own?.name ?? "gear";
  const method = manifest.methods[name];
  const fields = { ...method.fields, ...(own?.name === name ? own.fields : {}) };
  const at = Number(key) || 1;
  const start = fieldsAt(method.kind, fields, at);
  for (const field of method.offered) {
    const given = state(`set.${field}`, null);
    if (given !== null) start[field] = valueOf(given, method.fields[field], field);
  }
  return { ...method, name, fields: start, needs: needsOf(method, start) };
}

/** What a method reads with these fields: its own needs, and the turns where segments end with them. */
export function needsOf(method, fields) {
  return fields.stop_at_turn ? [...new Set([...method.needs, "turn_ids"])] : method.needs;
}

function valueOf(text, like, field) {
  if (typeof like === "boolean") return text === "true";
  if (typeof like === "string") return text;
  if (field === "max_segment_len" && text === "none") return null;
  return Number.isFinite(Number(text)) ? Number(text) : like;
}

/** An audit's rollout with a teacher's columns in the places of a run's. */
export function taught(rollout, teacher, signal) {
  const c = rollout.columns;
  if (!c[`k1/${teacher}`]) return rollout;
  const columns = { ...c, raw_signal: c[`${signal === "reverse_kl" ? "reverse_kl" : "k1"}/${teacher}`] };
  for (const name of ["teacher_logprobs", "teacher_entropy", "forward_kl"]) columns[name] = c[`${name}/${teacher}`];
  return { ...rollout, columns };
}

const at = (rollout, column) => rollout.columns[COLUMN[column] ?? column];

/** Whether the method says anything of the rollout: what it reads is there, and there is an advantage to weigh. */
function credited(rollout, method) {
  if (!rollout.row.advantage && !BY_TURN.includes(method.name)) return false;
  return method.needs.filter((need) => need !== "groups").every((need) => {
    const column = at(rollout, need);
    return column && rollout.policy.every((i) => !Number.isNaN(column[i]));
  });
}

/** The pack that a method takes, of the policy tokens of these rollouts. */
export function packed(rollouts, needs) {
  const out = {
    lengths: rollouts.map((r) => r.policy.length),
    advantages: rollouts.map((r) => r.row.advantage),
    groups: rollouts.map((r) => r.row.group),
  };
  for (const need of needs) {
    if (need === "groups") continue;
    const kind = rollouts.length ? at(rollouts[0], need).constructor : Float32Array;
    out[need] = kind.from(rollouts.flatMap((r) => r.policy.map((i) => at(r, need)[i])));
  }
  return out;
}

/** Give each rollout its `credit`: {signal, credit, weights, segments, onsets, closed, above, tokenAdvantages} over all its tokens. */
export function giveCredit(rollouts, method) {
  const own = rollouts.filter((rollout) => credited(rollout, method));
  const found = creditWeights(method.kind, method.fields, packed(own, method.needs));
  rollouts.forEach((r) => (r.credit = untouched(r)));
  let from = 0;
  for (const r of own) {
    r.credit.told = true;
    for (const name of ["signal", "credit", "weights", "segments", "onsets", "closed", "above", "tokenAdvantages"])
      r.policy.forEach((i, k) => (r.credit[name][i] = found[name][from + k]));
    from += r.policy.length;
  }
}

/** What a rollout has that no method weighs: W is 1, its tokens have its advantage. */
function untouched(r) {
  const n = r.texts.length, advantage = r.row.advantage ?? 0;
  const out = { told: false, signal: new Float32Array(n).fill(NaN), credit: new Float32Array(n).fill(NaN), weights: new Float32Array(n),
    segments: new Int32Array(n).fill(-1), onsets: new Uint8Array(n), closed: new Uint8Array(n), above: new Uint8Array(n),
    tokenAdvantages: new Float32Array(n) };
  for (const i of r.policy) {
    out.weights[i] = 1;
    out.tokenAdvantages[i] = advantage;
  }
  return out;
}

/** The first and last policy token of a token's segment, null outside of any. */
export function segmentAt(r, i) {
  const own = r.credit.segments[i];
  if (own < 0) return null;
  const inside = r.policy.filter((k) => r.credit.segments[k] === own);
  return { first: inside[0], last: inside.at(-1), closed: Boolean(r.credit.closed[i]), count: inside.length };
}

/** All that is known of a token: [key, said, value, unit], in the order in which it is shown. */
export function numbersOf(r, i) {
  const c = r.columns, policy = Boolean(c.mask[i]);
  const column = (name) => (policy && c[name] ? c[name][i] : null);
  const made = (name) => (policy && r.credit.told ? r.credit[name][i] : null);
  const span = policy ? segmentAt(r, i) : null;
  return [
    ["weight", "weight W", policy ? r.credit.weights[i] : null, ""],
    ["token_advantage", "token advantage", policy ? r.credit.tokenAdvantages[i] : null, ""],
    ["signal", "signal", column("raw_signal"), "nats"],
    ["g", "normalised g", made("signal"), ""],
    ["credit", "credit c", made("credit"), ""],
    ["segment", "segment", span && `${span.first} to ${span.last}, ${span.closed ? "closed" : "unclosed"}`, ""],
    ["entropy", "entropy", column("entropy"), "nats"],
    ["logprob", "log-prob", column("logprobs"), "nats"],
    ["teacher_logprob", "teacher's log-prob", column("teacher_logprobs"), "nats"],
    ["sampler_logprob", "sampler's log-prob", column("sampler_logprobs"), "nats"],
    ["teacher_entropy", "teacher's entropy", column("teacher_entropy"), "nats"],
    ["forward_kl", "KL(teacher \u2016 student)", column("forward_kl"), "nats"],
    ["trained_weight", "W in training", column("weight"), ""],
    ["true_advantage", "true advantage A*", column("true_advantage"), ""],
    ["value", "value V, P(success) after it", column("value"), ""],
    ["reach", "the solution is", policy && r.row.deviation >= -1 ? reachAt(r, i) : null, ""],
    ["id", "id", c.ids[i], ""],
    ["turn", "turn", policy ? c.turn?.[i] ?? null : null, ""],
  ].filter(([key, , value]) => value !== null && !Number.isNaN(value) && (key !== "turn" || value >= 0));
}

/** Of an audit whose task knows: whether the solution can still be reached after a token. */
function reachAt(r, i) {
  const first = r.row.deviation;
  return first < 0 || i < first ? "in reach" : i === first ? "out of reach from here on" : "out of reach";
}

// --- colours: a token's value on the scale, in [-1, 1] (two hues) or [0, 1] (one); `full`, `ends`: of a scale that is the same everywhere ---

export const COLOURS = {
  weight: { said: "weight W", of: (r, i) => r.credit.weights[i] - 1, about: 1, two: true },
  advantage: { said: "token advantage", of: (r, i) => r.credit.tokenAdvantages[i], about: 0, two: true },
  signal: { said: "signal, nats", of: (r, i) => r.columns.raw_signal?.[i], about: 0, two: true },
  g: { said: "normalised g", of: (r, i) => r.credit.signal[i], about: 0 },
  entropy: { said: "entropy, nats", of: (r, i) => r.columns.entropy?.[i], about: 0 },
  truth: { said: "true advantage A*", of: (r, i) => r.columns.true_advantage?.[i], about: 0, two: true, audit: true },
  value: { said: "value V", of: (r, i) => r.columns.value?.[i], about: 0, full: 1, audit: true },
  deviation: { said: "deviation", of: (r, i) => (r.row.deviation < 0 || i < r.row.deviation ? 0 : i === r.row.deviation ? -1 : -0.4), about: 0, two: true, full: 1, ends: ["out of reach", "in reach"], audit: true },
};

/** The value at which a colour is full: the 98th percentile of what is shown, so that one odd token does not pale the others. */
export function fullAt(colour, rollouts) {
  if (COLOURS[colour].full) return COLOURS[colour].full;
  const all = rollouts.flatMap((r) => r.policy.map((i) => Math.abs(COLOURS[colour].of(r, i)))).filter((v) => Number.isFinite(v) && v > 0);
  all.sort((a, b) => a - b);
  return all.length ? all[Math.min(all.length - 1, Math.floor(0.98 * all.length))] : 1;
}
