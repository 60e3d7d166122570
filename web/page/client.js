// The page's side of the worker: a question, events on the way, and an answer.

import { InputError } from "./errors.js";

/** Asks the worker; every question has a number, by which its answer is known. */
export class Client {
  /** @param {() => void} lost is called when the worker has ended, or its model can no longer be trusted */
  constructor(lost) {
    this.lost = lost;
    this.waiting = new Map();
    this.asked = 0;
    this.worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data }) => this.#answer(data);
    this.worker.onerror = (event) => this.#fail(event);
  }

  /** Ask. Returns { id, answer }: the number of the question, and the promise of what the worker returns.
   *
   * @param {(event) => void} onEvent what the worker says on the way
   */
  ask(kind, payload = {}, onEvent = () => {}) {
    const id = ++this.asked;
    const answer = new Promise((resolve, reject) => this.waiting.set(id, { resolve, reject, onEvent }));
    this.worker.postMessage({ id, kind, payload });
    return { id, answer };
  }

  #answer({ id, event, result, error }) {
    const question = this.waiting.get(id);
    if (!question) return; // given up meanwhile
    if (event) return question.onEvent(event);
    this.waiting.delete(id);
    if (!error) return question.resolve(result);
    const { input, message, lost } = error;
    const made = input ? new InputError(message) : new Error(message);
    question.reject(made);
    if (lost || !input) this.#giveUp(made); // what the model's memory holds can no longer be trusted
  }

  /** The worker itself has ended, or could not begin. */
  #fail(event) {
    event.preventDefault();
    const why = event.message || "it could not be loaded";
    this.#giveUp(
      new InputError(`the part of this page that draws has stopped (${why}); try again, or reload the page`),
    );
  }

  #giveUp(error) {
    this.close(error);
    this.lost();
  }

  /** End the worker: everything that waits is refused, with the reason. The next question needs another client. */
  close(error) {
    this.worker.terminate();
    for (const { reject } of this.waiting.values()) reject(error);
    this.waiting.clear();
  }
}
