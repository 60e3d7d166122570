// Fetches what the page needs, says how far it is, checks what came, and keeps it in the browser for the next visit.

import { InputError } from "./errors.js";

const STORE = "diffusion-lessons-miniature";

/** The browser's own store; null where there is none, as on pages without https. */
async function openStore() {
  try {
    return (await globalThis.caches?.open(STORE)) ?? null;
  } catch {
    return null; // private windows may refuse
  }
}

/** Where a file lies: another model is another address. */
function addressOf(base, file) {
  const address = new URL(file.path, base);
  address.search = `v=${file.sha256.slice(0, 16)}`;
  return address;
}

/** All bytes of a response, telling `arrived` of each piece. */
async function readAll(response, arrived) {
  const pieces = [];
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return new Blob(pieces);
    pieces.push(value);
    arrived(value.length);
  }
}

/** What was packed, as bytes; some servers unpack on the way. */
async function unpacked(blob) {
  const start = new Uint8Array(await blob.slice(0, 2).arrayBuffer());
  const packed = start[0] === 0x1f && start[1] === 0x8b;
  const stream = packed ? blob.stream().pipeThrough(new DecompressionStream("gzip")) : blob.stream();
  return new Response(stream).arrayBuffer();
}

/** The SHA-256 of bytes in hexadecimal; null where the browser does not reckon it (pages without https). */
async function sha256(buffer) {
  if (!globalThis.crypto?.subtle) return null;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", buffer));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Unpack and check one file. Raises an Error for one that is cut off or another's. */
async function checked(blob, { size, sha256: wanted }) {
  const buffer = await unpacked(blob);
  if (buffer.byteLength !== size) throw new Error(`${buffer.byteLength} of ${size} bytes`);
  const found = await sha256(buffer);
  if (found && found !== wanted) throw new Error("it is not what the page was made with, which a reload may mend");
  return buffer;
}

/** A file that the store has whole; null where it has not. What is damaged there is dropped. */
async function kept(address, file, store) {
  try {
    const found = await store?.match(address);
    return found ? await checked(await found.blob(), file) : null;
  } catch {
    await store.delete(address).catch(() => {});
    return null;
  }
}

/** One file: from the store if it is there and whole, else from the server. */
async function fetchFile(base, file, store, arrived) {
  const address = addressOf(base, file);
  const before = await kept(address, file, store);
  if (before) {
    arrived(file.bytes);
    return before;
  }
  let counted = 0;
  const count = (bytes) => {
    const more = Math.min(bytes, file.bytes - counted); // a server that unpacks on the way sends more than it says
    counted += more;
    arrived(more);
  };
  try {
    const response = await fetch(address);
    if (!response.ok) throw new Error(`the server says ${response.status}`);
    const blob = await readAll(response, count);
    const buffer = await checked(blob, file);
    await store?.put(address, new Response(blob)).catch(() => {}); // a full disk costs the next visit time, no more
    return buffer;
  } catch (error) {
    throw new InputError(
      `${file.path} could not be loaded (${error.message}); look at your connection and load again: ` +
        "what has arrived whole is kept",
    );
  }
}

/** Drop what an earlier model left in the store. Other pages of the same host keep theirs. */
async function forgetOthers(store, base, files) {
  const below = new URL(".", base).href;
  const wanted = new Set(files.map((file) => addressOf(base, file).href));
  for (const request of (await store?.keys()) ?? []) {
    if (request.url.startsWith(below) && !wanted.has(request.url)) await store.delete(request);
  }
}

/** How many bytes there are to fetch, and whether this browser can keep them. @param files as for `fetchAll` */
export async function outlook(base, files) {
  const store = await openStore();
  let missing = 0;
  for (const file of Object.values(files)) {
    const found = await store?.match(addressOf(base, file)).catch(() => null);
    if (!found) missing += file.bytes;
  }
  return { missing, keeps: store !== null };
}

/** All files of the manifest, unpacked: names to ArrayBuffers.
 *
 * @param files of the manifest: name to { path, bytes as packed, size, sha256 }
 * @param {(loaded: number, total: number) => void} progress in packed bytes
 */
export async function fetchAll(base, files, progress) {
  const store = await openStore();
  const total = Object.values(files).reduce((sum, file) => sum + file.bytes, 0);
  let loaded = 0;
  const arrived = (bytes) => progress((loaded += bytes), total);
  const buffers = {};
  for (const [name, file] of Object.entries(files)) buffers[name] = await fetchFile(base, file, store, arrived);
  await forgetOthers(store, base, Object.values(files)).catch(() => {}); // costs room on a disk, no more
  return buffers;
}
