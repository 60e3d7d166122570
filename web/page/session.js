// The model as the page has it: loaded when it is first needed, and anew after it has failed.

import { Client } from "./client.js";
import { InputError, check } from "./errors.js";
import { say } from "./status.js";
import { Tokenizer } from "./tokenizer.js";

const find = (id) => document.getElementById(id);
const megabytes = (bytes) => (bytes / 1e6).toFixed(1);

/** What there is to load. Throws an InputError where the server does not give it. */
export async function loadManifest() {
  try {
    const response = await fetch("manifest.json");
    check(response.ok, `the server says ${response.status}`);
    return await response.json();
  } catch (error) {
    throw new InputError(`the list of what this page needs could not be loaded (${error.message}); reload the page`);
  }
}

/** The worker with its model, behind one question: `ask`. */
export class Session {
  /** @param manifest what there is to load  @param {() => void} forgotten is called when a model had to be given up */
  constructor(manifest, forgotten) {
    Object.assign(this, { manifest, forgotten, client: null, loading: null, tokenizer: null });
    this.total = Object.values(manifest.files).reduce((sum, { bytes }) => sum + bytes, 0);
    find("size").textContent = `Once, ${megabytes(this.total)} MB are loaded, and kept in this browser.`;
  }

  /** Wait for the model. After a failure the next call tries again. */
  ready() {
    if (this.client && !this.client.alive) this.#forget();
    this.loading ??= this.#load().catch((error) => {
      this.#forget();
      throw error;
    });
    return this.loading;
  }

  /** Ask the worker, which has its model already: see `Client.ask`. */
  ask(kind, payload, told) {
    return this.client.ask(kind, payload, told);
  }

  async #load() {
    this.client = new Client();
    find("progress").hidden = false;
    say("Loading the model …");
    try {
      await this.ask("load", { files: this.manifest.files }, ({ loaded }) => {
        find("bar").value = loaded / this.total;
        find("bytes").textContent = `${megabytes(loaded)} of ${megabytes(this.total)} MB`;
      }).answer;
      this.tokenizer = new Tokenizer(await (await fetch(this.manifest.files.tokenizer.path)).json());
    } finally {
      find("progress").hidden = true;
    }
    find("go").textContent = "Draw";
    find("size").hidden = true;
  }

  #forget() {
    this.client.close();
    [this.client, this.loading] = [null, null];
    this.forgotten();
  }
}
