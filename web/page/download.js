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
  if (found && found !== wanted) throw new Error("its contents are not those that the page was made with");
  return buffer;
}

/** One file: from the store if it is there and whole, else from the server. */
async function fetchFile(base, file, store, arrived) {
  const address = new URL(file.path, base);
  address.search = `v=${file.sha256.slice(0, 16)}`; // another model is another address
  const kept = await store?.match(address);
  if (kept) {
    try {
      const buffer = await checked(await kept.blob(), file);
      arrived(file.bytes);
      return buffer;
    } catch {
      await store.delete(address); // damaged: fetched anew
    }
  }
  let loaded = 0;
  const count = (bytes) => arrived(Math.min(bytes, file.bytes - loaded), (loaded += bytes));
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

/** Drop what an earlier model left in the store. */
async function forgetOthers(store, base, files) {
  const wanted = new Set(files.map((file) => `${new URL(file.path, base)}?v=${file.sha256.slice(0, 16)}`));
  for (const request of (await store?.keys()) ?? []) {
    if (!wanted.has(request.url)) await store.delete(request);
  }
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
  await forgetOthers(store, base, Object.values(files));
  return buffers;
}
