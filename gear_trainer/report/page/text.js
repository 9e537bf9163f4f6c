// Elements and text. What a model wrote enters the page through `el` as text content alone, made visible by `visible`.

/** An element: properties, `on...` listeners, `data-...`, `aria-...` and `role` as attributes; children are nodes or text. */
export function el(tag, given = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (/^(aria|data)-|^(role|for|colspan|scope|list)$/.test(name)) made.setAttribute(name, value === true ? "" : value);
    else if (name === "class") made.className = value;
    else made[name] = value;
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

// Marks that turn the direction of text, joiners and spaces of no width, line separators, tags, private use, halves of pairs.
const HIDDEN = /[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ue000-\uf8ff\ud800-\udfff]|[\u{e0000}-\u{e0fff}]/gu;

/** The text with every character that would not be seen, or would be obeyed, as a sign of its own. Lines still break. */
export function visible(text) {
  return text
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/\u007f/g, "\u2421")
    .replace(/[\u0080-\u009f]/g, (c) => code(c))
    .replace(HIDDEN, (c) => code(c))
    .replace(/\t/g, "\u2192\t")
    .replace(/\n/g, "\u21b5\n");
}

function code(c) {
  return `\u27e8U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
}

/** A number as it is shown: six digits, which is what float32 holds and a little less. */
export function number(value, digits = 6) {
  if (value === null || value === undefined || Number.isNaN(value)) return "\u2013";
  if (!Number.isFinite(value)) return value > 0 ? "\u221e" : "\u2212\u221e";
  return String(Number(value.toPrecision(digits))).replaceAll("-", "\u2212");
}

/** A number in little room, as beside an axis: four digits, in the shorter of both spellings. */
export function tick(value) {
  const plain = number(value, 4), power = Number(value.toPrecision(4)).toExponential().replaceAll("-", "\u2212");
  return plain.length > 7 && power.length < plain.length ? power : plain;
}

export const percent = (share) => `${number(100 * share, 3)} %`;

/** A select with a label. options: [value, said] pairs. */
export function choice(label, options, value, change) {
  const select = el("select", { "aria-label": label, onchange: () => change(select.value) },
    options.map(([key, said]) => el("option", { value: key, selected: String(key) === String(value) }, said)));
  return el("label", { class: "field" }, el("span", {}, label), select);
}
