// The mathematics of credit in the page: what gear_kernels/reference/credit.py and methods.py say, in the same order and names.
//
// Numbers are float32, as credit_weights computes where no input is float64: what is stored in a Float32Array is rounded there, and a
// threshold is rounded before it is compared. A pack is
//   {lengths [B], advantages [B], groups [B], signal, entropy, teacher_entropy, forward_kl, turn_ids, turn_rewards, anchors}
// whose token columns [n] hold policy tokens alone, one sequence after the other. tests/test_report_page.py holds every method here
// to credit_weights. The method `random` is not here: its places are drawn by Python's generator.

const f32 = Math.fround;
const BIG = f32(3.4028234663852886e38 / 4);
const floats = (n, value = 0) => new Float32Array(n).fill(value);
const largest = (x) => x.reduce((a, b) => Math.max(a, b), -Infinity);
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

// --- the signal of one trajectory ---

export const bounded = (x) => clamp(x, -BIG, BIG);

export function linearQuantile(x, q) {
  if (!x.length) return 0;
  const sorted = Float32Array.from(x).sort();
  const position = q * (sorted.length - 1);
  const low = Math.floor(position);
  const a = sorted[low], b = sorted[Math.min(low + 1, sorted.length - 1)];
  return f32(a + f32(f32(position - low) * f32(b - a)));
}

export function normalise(signal, normalizer, quantile = 0.95, floor = 0) {
  const x = signal.map(bounded);
  if (x.every((v) => v === x[0])) return floats(x.length); // constant or empty: nothing to tell apart
  if (normalizer === "none") return x.map((v) => clamp(v, 0, 1));
  const least = x.reduce((a, b) => Math.min(a, b), Infinity);
  const raw = x.map((v) => (normalizer === "minmax" ? v - least : normalizer === "abs_max" ? Math.abs(v) : Math.max(v, 0)));
  let scale = normalizer === "quantile" ? linearQuantile(raw, quantile) : largest(raw);
  if (!(scale > 0)) scale = largest(raw);
  if (!(scale > 0)) return floats(x.length);
  const divisor = Math.max(scale, f32(floor));
  return raw.map((v) => Math.min(f32(v / divisor), 1));
}

// --- its segments: {first, last, closed}, policy tokens of one trajectory ---

const segment = (first, last, closed) => ({ first, last, closed });

export function entropyLimits(entropy, ratio, floor) {
  return entropy.map((h) => f32(ratio) * Math.max(h, f32(floor)));
}

export function windowMean(x, window) {
  const total = Float32Array.from(x), count = floats(x.length, 1);
  for (let shift = 1; shift < Math.min(window, x.length); shift++)
    for (let t = shift; t < x.length; t++) {
      total[t] += x[t - shift];
      count[t] += 1;
    }
  return total.map((v, t) => v / count[t]);
}

export function lastAllowed(n, longest, turns) {
  const last = new Array(n).fill(n - 1);
  if (turns) for (let t = n - 2; t >= 0; t--) last[t] = turns[t] === turns[t + 1] ? last[t + 1] : t;
  return longest ? last.map((end, t) => Math.min(end, t + longest - 1)) : last;
}

export function entropySegments(onset, tested, limit, last) {
  const found = [], n = onset.length;
  for (let t = 0; t < n; ) {
    if (!onset[t]) { t++; continue; }
    let end = t + 1;
    while (end <= last[t] && !(tested[end] > limit[t])) end++;
    const fired = end <= last[t];
    if (!fired) end = last[t];
    found.push(segment(t, end, fired || end < n - 1));
    t = end + 1;
  }
  return found;
}

export function triggerSegments(onset, last) {
  const n = onset.length, starts = [];
  for (let t = 0; t < n; t++) if (onset[t]) starts.push(t);
  return starts.map((t, k) => {
    const end = Math.min((k + 1 < starts.length ? starts[k + 1] : n) - 1, last[t]);
    return segment(t, end, end < n - 1);
  });
}

export function turnSegments(turns) {
  const found = [];
  for (let t = 0; t < turns.length; t++)
    if (t === 0 || turns[t] !== turns[t - 1]) found.push(segment(t, t, true));
    else found[found.length - 1].last = t;
  return found;
}

export function stableSegments(onset, entropy, factor) {
  const found = [], n = onset.length, by = f32(factor);
  for (let t = 0; t < n; ) {
    if (!onset[t]) { t++; continue; }
    let end = t + 1;
    while (end < n && entropy[t] <= f32(by * entropy[end]) && entropy[end] <= f32(by * entropy[t])) end++;
    found.push(segment(t, end - 1, end < n));
    t = end;
  }
  return found;
}

export function fixedSegments(n, length) {
  const found = [];
  for (let t = 0; t < n; t += length) found.push(segment(t, Math.min(t + length, n) - 1, true));
  return found;
}

// --- weights ---

export function gearWeight(credit, advantage, alpha) {
  const w = f32(0.5 + f32(f32(0.5 - credit) * Math.sign(advantage)));
  return f32(1 + f32(f32(alpha) * f32(w - 0.5)));
}

export const boundedRatio = (signal, advantage, clip) =>
  clamp(f32(Math.exp(-bounded(signal) * Math.sign(advantage))), f32(1 - clip), f32(1 + clip));

export const mixedRatio = (ratio, mix) => f32(f32(1 - mix) + f32(f32(mix) * ratio));

export const entropyGate = (h, level, slope, floor) => clamp(f32(1 - f32(f32(slope) * f32(h / level))), f32(floor), 1);

export const share = (divergence, level) => f32(bounded(divergence) / f32(bounded(divergence) + level));

export function marginWeight(delta, advantage, up, down, margin) {
  const rise = f32(f32(up) * Math.max(f32(delta - f32(margin)), 0));
  const fall = f32(f32(down) * Math.max(f32(-delta - f32(margin)), 0));
  return f32(1 + (advantage >= 0 ? rise : fall));
}

export function topShare(x, part) {
  const sorted = Float32Array.from(x).sort();
  return sorted.length ? sorted[sorted.length - Math.max(Math.ceil(part * sorted.length), 1)] : 0;
}

// --- turns: over the whole pack, in float64 ---

function turnOnsets(turns, sequence) {
  return turns.map((turn, t) => (t === 0 || turn !== turns[t - 1] || sequence[t] !== sequence[t - 1] ? 1 : 0));
}

function turnReturns(rewards, onsets, sequence, gamma) {
  const value = new Float64Array(rewards.length);
  let next = 0; // the return of the turn behind
  for (let t = rewards.length - 1; t >= 0; t--) {
    const last = t === rewards.length - 1 || onsets[t + 1];
    if (t === rewards.length - 1 || sequence[t] !== sequence[t + 1]) next = 0;
    value[t] = last ? rewards[t] + gamma * next : value[t + 1];
    if (onsets[t]) next = value[t];
  }
  return value;
}

function groupRelative(x, counted, keys, std) {
  const groups = new Map();
  x.forEach((v, t) => {
    const key = keys.map((k) => k[t]).join(" ");
    const g = groups.get(key) ?? { count: 0, sum: 0, low: Infinity, high: -Infinity, squares: 0, places: [] };
    g.places.push(t);
    g.low = Math.min(g.low, v);
    g.high = Math.max(g.high, v);
    if (counted[t]) { g.count++; g.sum += v; }
    groups.set(key, g);
  });
  const out = new Float64Array(x.length);
  for (const g of groups.values()) {
    const mean = g.sum / Math.max(g.count, 1);
    for (const t of g.places) if (counted[t]) g.squares += (x[t] - mean) ** 2;
    const scale = std ? Math.sqrt(g.squares / Math.max(g.count - 1, 1)) + 1e-6 : 1;
    for (const t of g.places) out[t] = g.low === g.high ? 0 : (x[t] - mean) / scale;
  }
  return out;
}

// --- methods: (fields, pack) -> {weights, signal, credit, segments, onsets, tokenAdvantages, above} over its n tokens ---

function spans(pack) {
  let from = 0;
  return pack.lengths.map((n) => [from, (from += n)]);
}

function sequenceOf(pack) {
  const out = new Int32Array(spans(pack).at(-1)?.[1] ?? 0);
  spans(pack).forEach(([a, b], i) => out.fill(i, a, b));
  return out;
}

function result(n) {
  return {
    weights: floats(n, 1), signal: floats(n), credit: floats(n), segments: new Int32Array(n).fill(-1),
    onsets: new Uint8Array(n), closed: new Uint8Array(n), above: new Uint8Array(n), tokenAdvantages: null,
  };
}

/** Write one trajectory's g and segments at its place: a segment's credit is its first token's g. */
function place(out, from, g, segments) {
  out.signal.set(g, from);
  out.credit.set(g, from);
  segments.forEach(({ first, last, closed }, number) => {
    out.credit.fill(g[first], from + first, from + last + 1);
    out.segments.fill(number, from + first, from + last + 1);
    out.closed.fill(closed ? 1 : 0, from + first, from + last + 1);
    out.onsets[from + first] = 1;
  });
}

function gearSegments(m, g, entropy, turns) {
  const n = g.length;
  if (m.segmenter === "token") return [];
  if (m.segmenter === "turn") return turnSegments(turns);
  if (m.segmenter === "fixed") return fixedSegments(n, m.fixed_len);
  const onset = Array.from(g, (v) => m.segmenter === "entropy_only" || v > f32(m.kl_threshold));
  const last = lastAllowed(n, m.max_segment_len, m.stop_at_turn ? turns : null);
  if (m.segmenter === "kl_only") return triggerSegments(onset, last);
  const tested = m.segmenter === "entropy_window" ? windowMean(entropy, m.window) : entropy;
  return entropySegments(onset, tested, entropyLimits(entropy, m.entropy_ratio, m.entropy_floor), last);
}

function meansOver(pack, weights, change) {
  for (const [a, b] of spans(pack)) {
    let total = 0;
    for (let t = a; t < b; t++) total += weights[t];
    for (let t = a; t < b; t++) weights[t] = change(weights[t], total / (b - a));
  }
}

function gear(m, pack) {
  const out = result(pack.signal.length), sequence = sequenceOf(pack);
  for (const [a, b] of spans(pack)) {
    const g = normalise(pack.signal.subarray(a, b), m.normalizer, m.quantile, m.signal_floor);
    place(out, a, g, gearSegments(m, g, pack.entropy?.subarray(a, b), pack.turn_ids?.subarray(a, b)));
  }
  out.weights = out.credit.map((c, t) => gearWeight(c, pack.advantages[sequence[t]], m.alpha));
  out.above = Uint8Array.from(out.signal, (v) => v > f32(m.kl_threshold));
  if (m.renormalize) meansOver(pack, out.weights, (w, mean) => w / mean);
  return out;
}

function tilt(m, pack) {
  const out = gear(m, pack);
  meansOver(pack, out.weights, (_, mean) => mean);
  return out;
}

function weighed(n, behind, weight) {
  const out = result(n);
  out.signal = behind;
  out.credit = behind;
  out.weights = behind.map(weight);
  return out;
}

function rlsd(m, pack) {
  const sequence = sequenceOf(pack);
  const ratio = pack.signal.map((s, t) => boundedRatio(s, pack.advantages[sequence[t]], m.clip));
  return weighed(ratio.length, ratio, (r) => mixedRatio(r, m.mix));
}

function egrsd(m, pack) {
  const sequence = sequenceOf(pack), entropy = pack.teacher_entropy, n = entropy.length;
  const level = n ? Math.max(largest(entropy), 1) : 1;
  const gate = entropy.map((_, t) => {
    let least = entropy[t];
    for (let k = 1; k <= m.look_ahead && t + k < n && sequence[t + k] === sequence[t]; k++) least = Math.min(least, entropy[t + k]);
    return entropyGate(least, level, m.slope, m.floor);
  });
  return weighed(n, gate, (v, t) => f32(boundedRatio(pack.signal[t], pack.advantages[sequence[t]], m.clip) * v));
}

function scGrpo(m, pack) {
  const level = Math.max(linearQuantile(pack.forward_kl.map(bounded), m.quantile), f32(m.least));
  const weights = pack.forward_kl.map((d) => share(d, level));
  return weighed(weights.length, weights, (w) => w);
}

function amrSd(m, pack) {
  const sequence = sequenceOf(pack);
  const delta = pack.signal.map((s) => clamp(-s, -f32(m.bound), f32(m.bound)));
  return weighed(delta.length, delta, (d, t) => marginWeight(d, pack.advantages[sequence[t]], m.up, m.down, m.margin));
}

function highEntropy(m, pack) {
  const level = topShare(pack.entropy, m.share);
  const weights = pack.entropy.map((h) => (h >= level ? 1 : 0));
  return weighed(weights.length, weights, (w) => w);
}

function sgcd(m, pack) {
  const out = result(pack.signal.length);
  for (const [a, b] of spans(pack)) {
    const g = normalise(pack.signal.subarray(a, b), "quantile", m.quantile);
    const onset = Array.from(g, (v) => v > f32(m.kl_threshold));
    place(out, a, g, stableSegments(onset, pack.teacher_entropy.subarray(a, b), m.stable));
  }
  out.credit = out.credit.map((c, t) => (out.segments[t] >= 0 ? c : 0));
  out.weights = out.credit.map((s) => clamp(f32(1 + f32(f32(m.gamma) * s)), 1, f32(m.cap)));
  out.above = Uint8Array.from(out.signal, (v) => v > f32(m.kl_threshold));
  return out;
}

function byTurn(pack, relative, weight) {
  const sequence = sequenceOf(pack), n = relative.length, out = result(n);
  out.onsets = Uint8Array.from(turnOnsets(pack.turn_ids, sequence));
  for (let t = 0, turn = -1; t < n; t++) {
    if (t === 0 || sequence[t] !== sequence[t - 1]) turn = -1;
    out.segments[t] = turn += out.onsets[t];
  }
  out.closed.fill(1);
  out.signal = Float32Array.from(relative, (v) => weight * v);
  out.credit = out.signal;
  out.tokenAdvantages = out.signal.map((extra, t) => f32(pack.advantages[sequence[t]]) + extra);
  return out;
}

function turn(m, pack) {
  const sequence = sequenceOf(pack), first = turnOnsets(pack.turn_ids, sequence);
  const groups = sequence.map((i) => pack.groups[i]);
  return byTurn(pack, groupRelative(Float64Array.from(pack.turn_rewards), first, [groups, pack.turn_ids], m.std), m.weight);
}

function gigpo(m, pack) {
  const sequence = sequenceOf(pack), first = turnOnsets(pack.turn_ids, sequence);
  const groups = sequence.map((i) => pack.groups[i]);
  const returns = turnReturns(pack.turn_rewards, first, sequence, m.gamma);
  return byTurn(pack, groupRelative(returns, first, [groups, pack.anchors], m.std), m.weight);
}

function grpo(_m, pack) {
  return result(sequenceOf(pack).length);
}

const KINDS = {
  Gear: gear, Grpo: grpo, Tilt: tilt, Rlsd: rlsd, Egrsd: egrsd, ScGrpo: scGrpo, AmrSd: amrSd, HighEntropy: highEntropy, Sgcd: sgcd,
  Turn: turn, Gigpo: gigpo,
};

/** The fields of a method at a training step, counted from 1: of Rlsd mix falls linearly. */
export function fieldsAt(kind, fields, step) {
  if (kind !== "Rlsd" || !fields.decay_steps) return fields;
  return { ...fields, mix: fields.mix * Math.max(0, 1 - (step - 1) / fields.decay_steps) };
}

/** Weights, g, credit, segments, onsets and token advantages of a pack. kind: the class of gear_kernels.methods; fields: its own. */
export function creditWeights(kind, fields, pack) {
  const out = KINDS[kind](fields, pack);
  const sequence = sequenceOf(pack);
  out.tokenAdvantages ??= out.weights.map((w, t) => w * f32(pack.advantages[sequence[t]]));
  return out;
}
