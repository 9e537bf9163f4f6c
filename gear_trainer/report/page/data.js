// Where rollouts come from: the page itself, or the host that serves it. Both give packs, see payload.py.

async function unzipped(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const decode = (bytes) => new TextDecoder().decode(bytes);

/** A pack: rows (without tokens), starts [rows + 1] into the token columns, pieces (texts) and columns by name. */
export function parsePack(bytes) {
  const length = new DataView(bytes.buffer, bytes.byteOffset, 4).getUint32(0, true);
  const header = JSON.parse(decode(bytes.subarray(4, 4 + length)));
  const total = header.starts.at(-1);
  let at = 4 + length;
  const columns = {};
  for (const [name, type] of header.columns) {
    const size = type === "u1" ? 1 : 4;
    const block = bytes.subarray(at, (at += total * size));
    columns[name] = size === 1 ? block : fromPlanes(block, total, type === "f4" ? Float32Array : Int32Array);
  }
  return { rows: header.rows, starts: header.starts, pieces: header.pieces, columns };
}

function fromPlanes(block, total, kind) {
  const bytes = new Uint8Array(total * 4);
  for (let plane = 0; plane < 4; plane++)
    for (let i = 0; i < total; i++) bytes[4 * i + plane] = block[plane * total + i];
  return new kind(bytes.buffer);
}

/** The page's own data: `manifest`, and the packs that it carries. */
export function embedded() {
  const stored = (name) => [...document.querySelectorAll("script[data-name]")].find((node) => node.dataset.name === name);
  const read = async (name) => unzipped(Uint8Array.from(atob(stored(name).textContent), (c) => c.charCodeAt(0)));
  if (!stored("manifest")) return null;
  return {
    manifest: async () => JSON.parse(decode(await read("manifest"))),
    has: (run, key) => Boolean(stored(`pack/${run}/${key}`)),
    pack: async (run, key) => parsePack(await read(`pack/${run}/${key}`)),
    rows: null, // a pack has them
  };
}

/** What the host has. A pack of all groups would be too much, so groups are asked for. */
export function served() {
  const get = async (path) => {
    const answer = await fetch(path);
    if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
    return answer.status === 204 ? null : unzipped(new Uint8Array(await answer.arrayBuffer()));
  };
  const asked = (run, key) => `run=${run}&key=${encodeURIComponent(key)}`;
  return {
    manifest: async (known = "") => { // null where it is the one that is known
      const found = await get(`data/manifest${known && `?known=${known}`}`);
      return found && JSON.parse(decode(found));
    },
    has: () => true,
    pack: async (run, key, groups) => parsePack(await get(`data/pack?${asked(run, key)}&groups=${groups.join(",")}`)),
    rows: async (run, key) => JSON.parse(decode(await get(`data/rows?${asked(run, key)}`))),
  };
}

/** The source with what was read kept: the last few packs, a step's rows. */
export function kept(source) {
  const found = new Map();
  const once = (name, make) => {
    if (!found.has(name)) found.set(name, make().catch((error) => { found.delete(name); throw error; }));
    if (found.size > 64) found.delete(found.keys().next().value);
    return found.get(name);
  };
  return {
    manifest: source.manifest,
    has: source.has,
    partial: Boolean(source.rows),
    pack: (run, key, groups) =>
      once(source.rows ? `${run}/${key}/${groups}` : `${run}/${key}`, () => source.pack(run, key, groups)),
    rows: async (run, key) =>
      source.rows ? once(`rows/${run}/${key}`, () => source.rows(run, key)) : (await once(`${run}/${key}`, () => source.pack(run, key))).rows,
  };
}

/** A rollout of a pack: its row, and its own part of every column. `policy`: the places of the tokens that the policy said. */
export function rolloutOf(pack, index) {
  const from = pack.starts[index], to = pack.starts[index + 1];
  const columns = Object.fromEntries(Object.entries(pack.columns).map(([name, column]) => [name, column.subarray(from, to)]));
  const texts = Array.from(columns.piece, (piece) => pack.pieces[piece]);
  const policy = [];
  columns.mask.forEach((own, i) => own && policy.push(i));
  return { row: pack.rows[index], columns, texts, policy, index, plain: !columns.logprobs }; // plain: words, of which no numbers were kept
}

export const rolloutsOf = (pack) => pack.rows.map((_, index) => rolloutOf(pack, index));
