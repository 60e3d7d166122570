// The model as the page has it: loaded when it is first needed, and anew after it has failed.

import { Client } from "./client.js";
import { InputError, check } from "./errors.js";
import { Tokenizer } from "./tokenizer.js";

/** What there is to load. Throws an InputError where the server does not give it. */
export async function loadManifest() {
  try {
    const response = await fetch("manifest.json", { cache: "no-cache" }); // an old one names weights that are gone
    check(response.ok, `the server says ${response.status}`);
    return await response.json();
  } catch (error) {
    throw new InputError(`the list of what this page needs could not be loaded (${error.message}); reload the page`);
  }
}

/** The worker with its model, behind one question: `ask`. */
export class Session {
  /** @param files of the manifest
   * @param events `loading()`, `arrived(bytes)` and `loaded(error)` on the way to a model, and `forgotten()` when one
   * had to be given up
   */
  constructor(files, events) {
    Object.assign(this, { files, events, client: null, opening: null, tokenizer: null, wishes: 0 });
  }

  /** The reader wishes something: what they wished before stops. Returns a function: does this wish still count? */
  wish() {
    const mine = ++this.wishes;
    return () => mine === this.wishes;
  }

  /** Wait for the model. After a failure the next call tries again. */
  ready() {
    this.opening ??= this.#open();
    return this.opening;
  }

  /** Ask the worker, which has its model already: see `Client.ask`. */
  ask(kind, payload, onEvent) {
    return this.client.ask(kind, payload, onEvent);
  }

  /** Draw for a wish: { pixels, looked, pieces }, or null once the wish counts no longer. */
  async draw(counts, settings) {
    const made = counts() ? await this.ask("draw", settings).answer : null;
    return counts() ? made : null;
  }

  async #open() {
    this.events.loading();
    try {
      this.client = new Client(() => this.#forget());
      const onArrival = ({ loaded }) => this.events.arrived(loaded);
      this.tokenizer = new Tokenizer(await this.ask("load", { files: this.files }, onArrival).answer);
    } catch (error) {
      this.client?.close(error);
      this.#forget();
      this.events.loaded(error);
      throw error;
    }
    this.events.loaded(null);
  }

  #forget() {
    [this.client, this.opening] = [null, null];
    this.events.forgotten();
  }
}
