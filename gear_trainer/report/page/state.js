// What is shown, in the address after #, so that any view can be linked to: view=credit&step=12&group=3&sample=1&token=40 ...

const listeners = [];
let values = {};

function read() {
  values = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
}

export const state = (name, fallback = "") => values[name] ?? fallback;

/** Change what is shown: null takes a name away. `quiet`: nothing is drawn anew, as when a token is looked at. */
export function change(given, quiet = false) {
  const next = { ...values };
  for (const [name, value] of Object.entries(given))
    if (value === null || value === "") delete next[name];
    else next[name] = String(value);
  values = next;
  history.replaceState(null, "", `#${new URLSearchParams(values)}`);
  if (!quiet) listeners.forEach((listener) => listener());
}

/** The address of a view, for a link. */
export const link = (given) => `#${new URLSearchParams(given)}`;

export function onChange(listener) {
  listeners.push(listener);
}

window.addEventListener("hashchange", () => {
  read();
  listeners.forEach((listener) => listener());
});
read();
