// The page's side of the worker: a question, events on the way, and an answer.

import { InputError } from "./errors.js";

/** Asks the worker; every question has a number, by which its answer is known. */
export class Client {
  constructor() {
    this.waiting = new Map();
    this.asked = 0;
    this.alive = true;
    this.worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data }) => this.#answer(data);
    this.worker.onerror = (event) => this.#fail(event);
  }

  /** Ask. Returns { id, answer }: the number of the question, and the promise of what the worker returns.
   *
   * @param {(event) => void} told what the worker says on the way
   */
  ask(kind, payload = {}, told = () => {}) {
    const id = ++this.asked;
    const answer = new Promise((resolve, reject) => this.waiting.set(id, { resolve, reject, told }));
    this.worker.postMessage({ id, kind, payload });
    return { id, answer };
  }

  #answer({ id, event, result, error }) {
    const { resolve, reject, told } = this.waiting.get(id);
    if (event) return told(event);
    this.waiting.delete(id);
    if (!error) return resolve(result);
    const { input, message, lost } = error;
    if (lost || !input) this.close(); // what the model's memory holds can no longer be trusted
    return reject(input ? new InputError(message) : new Error(message));
  }

  /** End the worker; the next question needs another client. */
  close() {
    this.alive = false;
    this.worker.terminate();
  }

  /** The worker itself has ended, or could not begin: everything that waits is told. */
  #fail(event) {
    event.preventDefault();
    this.close();
    const error = new InputError(
      `the part of this page that draws has stopped (${
        event.message || "it could not be " + "loaded"
      }); try again, or reload the page`,
    );
    for (const { reject } of this.waiting.values()) reject(error);
    this.waiting.clear();
  }
}
