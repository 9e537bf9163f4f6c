// A rollout as text: a list of tokens that is walked with the arrow keys, segments bracketed, turns and replies set apart.

import { el, number, visible } from "./text.js";
import { COLOURS, numbersOf } from "./tokens.js";

const OUTCOME = { true: "solved", false: "failed" };

/** Runs of tokens that belong together: {policy, from, to, label}. `cut` is a place where one ends in any case. */
function passages(r, from, to) {
  const found = [];
  for (let i = from; i < to; i++) {
    const policy = Boolean(r.columns.mask[i]), turn = r.columns.turn?.[i] ?? 0, last = found.at(-1);
    if (last && last.policy === policy && (!policy || last.turn === turn)) last.to = i + 1;
    else found.push({ policy, turn, from: i, to: i + 1 });
  }
  return found.map((p) => ({ ...p, label: p.policy ? `turn ${p.turn + 1}` : replyOf(r.texts.slice(p.from, p.to).join("")) }));
}

function replyOf(text) {
  if (text.includes("<tool_response>")) return "tool result";
  const role = /<\|im_start\|>\s*(\w{1,20})/.exec(text)?.[1];
  return role === "assistant" || !role ? "reply" : role;
}

/** The first place where these rollouts differ; their length where none does. */
export function firstDifference(rollouts) {
  const least = Math.min(...rollouts.map((r) => r.texts.length));
  for (let i = 0; i < least; i++) if (rollouts.some((r) => r.columns.ids[i] !== rollouts[0].columns.ids[i])) return i;
  return least;
}

/** The card of a rollout. name: unique in the page. apart: where it leaves its siblings. look(i): called as a token is looked at. */
export function card(r, { name, apart, look, title }) {
  const tokens = r.texts.map((text, i) => {
    const token = el("span", { class: r.columns.mask[i] ? "t" : "t env", role: "option", id: `${name}-${i}`, "aria-selected": "false", "data-i": String(i) },
      visible(text).replace(/\n$/, "")); // a last line break stands behind its token, whose outline would go on in the next line
    return token;
  });
  const part = (kind, from, to) => el("div", { class: kind, role: "presentation" },
    passages(r, from, to).map((p) => el("div", { class: p.policy ? "turn" : "turn env", role: "group", "aria-label": p.label, "data-label": p.label },
      tokens.slice(p.from, p.to).flatMap((token, k) => (r.texts[p.from + k].endsWith("\n") ? [token, "\n"] : [token])))));
  const list = el("div", { class: "tokens", role: "listbox", tabIndex: 0, "aria-label": `tokens of ${title}` },
    apart === null ? null : part("shared", 0, apart), part("rest", apart ?? 0, tokens.length));
  if (apart !== null && tokens[apart]) tokens[apart].dataset.differs = "";
  if (r.row.deviation >= 0) tokens[r.row.deviation].dataset.deviates = "";
  const seat = { r, tokens, list, focused: -1 };
  seat.focus = (i) => {
    if (i < 0 || i >= tokens.length) return;
    if (seat.focused >= 0) tokens[seat.focused].setAttribute("aria-selected", "false");
    seat.focused = i;
    tokens[i].setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", tokens[i].id);
    tokens[i].scrollIntoView({ block: "nearest", inline: "nearest" });
    look(seat, i, true);
  };
  const at = (event) => event.target.closest?.(".t");
  list.addEventListener("pointerover", (event) => at(event) && look(seat, Number(at(event).dataset.i), false));
  list.addEventListener("pointerleave", () => seat.focused >= 0 && look(seat, seat.focused, false));
  list.addEventListener("click", (event) => at(event) && seat.focus(Number(at(event).dataset.i)));
  list.addEventListener("keydown", (event) => move(event, seat));
  list.addEventListener("focus", () => seat.focused < 0 && seat.focus(r.policy[0] ?? 0));
  const box = el("article", { class: "card", "aria-label": title }, head(r, title), list, more(r));
  return Object.assign(seat, { box });
}

function move(event, seat) {
  const { r, focused } = seat, last = seat.tokens.length - 1;
  const onset = (places) => places.find((i) => r.credit.onsets[i]) ?? focused;
  const to = {
    ArrowRight: () => Math.min(focused + 1, last),
    ArrowLeft: () => Math.max(focused - 1, 0),
    ArrowDown: () => onset(r.policy.filter((i) => i > focused)),
    ArrowUp: () => onset(r.policy.filter((i) => i < focused).reverse()),
    Home: () => 0,
    End: () => last,
  }[event.key];
  if (!to || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  seat.focus(to());
}

function head(r, title) {
  const fact = (said, value) => el("span", {}, `${said} `, el("b", {}, value));
  const row = r.row;
  const known = (said, value) => (value === undefined || value === null ? null : fact(said, typeof value === "number" ? number(value) : visible(value)));
  const deviation = row.deviation >= -1 ? fact("leaves the solution at", row.deviation < 0 ? "no token" : `token ${row.deviation}`) : null;
  return el("header", {}, el("h2", {}, title), el("span", { class: row.success ? "good" : "bad" }, OUTCOME[row.success] ?? ""),
    fact("reward", number(row.reward)), r.plain ? null : fact("A", number(row.advantage)), row.end ? fact("end", row.end) : null,
    fact(r.plain ? "words" : "tokens", number(r.policy.length)), known("calls", row.calls), row.errors ? known("failed calls", row.errors) : null,
    known("answer given", row.vote), known("V0", row.v0), deviation, el("span", { class: "mean" }));
}

function more(r) {
  const part = (said, text) => (text ? el("details", {}, el("summary", {}, said), el("pre", { tabIndex: 0 }, visible(text))) : null);
  return el("footer", {}, part("prompt", r.row.prompt), part("credit reference, as the teacher read it", r.row.reference),
    part("answer", r.row.answer));
}

/** Colour a card's tokens, bracket its segments, and say its mean weight. full: the value at which the colour is full. */
export function paint(seat, colour, full) {
  const { r, tokens } = seat, scale = COLOURS[colour], credit = r.credit;
  for (const i of r.policy) {
    const token = tokens[i], value = scale.of(r, i), share = Number.isFinite(value) ? Math.min(1, Math.abs(value) / full) : value > 0 ? 1 : 0;
    token.style.setProperty("--v", share.toFixed(3));
    const own = credit.segments[i];
    token.className = ["t", value < 0 ? "down" : scale.two ? "up" : "one", own >= 0 ? "seg" : "", credit.onsets[i] ? "onset" : ""].filter(Boolean).join(" ");
  }
  r.policy.forEach((i, k) => {
    const next = r.policy[k + 1];
    if (credit.segments[i] >= 0 && (next === undefined || credit.segments[next] !== credit.segments[i]))
      tokens[i].classList.add(credit.closed[i] ? "ends" : "open");
  });
  if (r.plain) return;
  const mean = r.policy.reduce((sum, i) => sum + credit.weights[i], 0) / (r.policy.length || 1);
  const segments = new Set(r.policy.map((i) => credit.segments[i]).filter((s) => s >= 0)).size;
  seat.box.querySelector(".mean").replaceChildren("mean W ", el("b", {}, number(mean, 4)), ` \u00b7 segments `, el("b", {}, number(segments)),
    credit.told ? "" : " \u00b7 not weighed: no advantage, or no teacher looked");
}

/** The table of a token's numbers. */
export function inspector(r, i, href) {
  const rows = numbersOf(r, i).map(([key, said, value, unit]) =>
    el("tr", { "data-key": key }, el("th", { scope: "row" }, said),
      el("td", {}, typeof value === "string" ? value : number(value), unit ? el("small", {}, ` ${unit}`) : null)));
  return [
    el("h2", {}, "token ", String(i), " ", el("code", {}, visible(r.texts[i]))),
    el("table", {}, el("tbody", {}, rows)),
    el("p", {}, el("a", { href }, "link to this token")),
  ];
}
