// The adapter on the page: the file that pictures are drawn with, and how much of it.

import { InputError, check } from "./errors.js";
import { begin } from "./status.js";

const MOST = 100e6; // bytes; the largest adapter of the miniature has a third of it
const find = (id) => document.getElementById(id);

/** A file's name and bytes. Throws an InputError for one that cannot be read. */
async function read(file) {
  const most = MOST / 1e6;
  check(file.size <= MOST, `it has ${Math.round(file.size / 1e6)} MB, and no adapter of the miniature has ${most}`);
  try {
    return { name: file.name, buffer: await file.arrayBuffer() };
  } catch {
    throw new InputError("the browser cannot read it; is it a folder, or was it moved or changed?");
  }
}

/** Puts adapters on the model and takes them off, one after the other: what was asked for last is what stays. */
export class AdapterPanel {
  /** @param session the model to draw with */
  constructor(session) {
    this.session = session;
    this.chosen = null; // { name, buffer } of the adapter that pictures are drawn with
    this.before = Promise.resolve(); // what was asked for before, however it ended
  }

  /** Draw with a file from now on. Throws an InputError for one that is no adapter of the miniature. */
  use(file) {
    return this.#inTurn(async () => {
      try {
        return await this.#put(await read(file), `Reading ${file.name} …`);
      } catch (error) {
        find("adapter-file").value = ""; // so that the same file can be chosen again
        if (error instanceof InputError) error.message = `the file ${file.name} cannot be used: ${error.message}`;
        throw error;
      }
    });
  }

  /** Draw with as much of it as the slider says from now on; null where there is no adapter. */
  strengthen() {
    return this.#inTurn(() => this.chosen && this.#put(this.chosen, "Changing the strength …"));
  }

  /** Draw without it from now on. */
  takeOff() {
    return this.#inTurn(() => this.#put(null, "Taking the adapter off …"));
  }

  /** The model is gone, and the adapter with it. */
  forget() {
    const lost = this.chosen;
    this.#show(null, lost ? `${lost.name} went with the model that had to be given up; drop it once more.` : "");
  }

  #inTurn(action) {
    const done = this.before.then(action);
    this.before = done.catch(() => {});
    return done;
  }

  /** Returns true once pictures are drawn with it. */
  async #put(file, what) {
    await this.session.ready();
    begin(what);
    const strength = Number(find("strength").value);
    const layers = await this.session.ask("adapt", { file: file?.buffer, strength }).answer;
    this.#show(file, file ? `Drawing with ${file.name} (${layers} layers).` : "");
    return true;
  }

  #show(file, text) {
    this.chosen = file;
    find("adapter-name").textContent = text;
    find("adapter-off").hidden = !file;
    if (!file) find("adapter-file").value = "";
  }
}
