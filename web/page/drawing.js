// The drawing on the page: the strip that grows while it is drawn, the finished picture, and the scrubber.

import { pictureFigure, showPixels } from "./pictures.js";
import { begin, say } from "./status.js";

const STRIP = 8; // pictures in each row
const find = (id) => document.getElementById(id);
const ROWS = ["seen-row", "guess-row"].map(find);

/** A prompt as captions name it. */
const named = (prompt) => (prompt.trim() ? `“${prompt.trim()}”` : "the empty prompt");

/** What was asked for, as the caption says it. */
const described = ({ prompt, seed, guidance, steps }) =>
  `${named(prompt)}, seed ${seed}, guidance ${guidance}, ${steps} steps`;

/** Shows one drawing at a time. */
export class Drawing {
  /** @param session the model to draw with */
  constructor(session) {
    this.session = session;
    this.newest = 0; // the number of the last drawing that was asked for
    this.shown = null; // { id, settings } of the drawing that the scrubber moves through
  }

  /** Draw, and show it as it appears. @param {() => boolean} counts is this still what the reader wishes? */
  async draw(counts, settings) {
    begin("Drawing …");
    find("result").setAttribute("aria-busy", "true");
    ROWS.forEach((row) => row.replaceChildren());
    const began = performance.now();
    const frames = Math.min(STRIP, settings.steps || 1);
    const { id, answer } = this.session.ask("draw", { ...settings, frames }, (frame) => {
      if (id === this.newest) this.#grow(frame, settings); // an earlier drawing's last frame may still come
    });
    this.newest = id;
    try {
      const result = await answer;
      if (!result) {
        if (id === this.newest) this.forget(); // an experiment has begun: of this drawing there are no steps
        return;
      }
      this.shown = { id, settings };
      this.#finish(result.pixels, settings);
      if (counts()) say(`Drawn in ${((performance.now() - began) / 1000).toFixed(1)} seconds.`);
      await this.scrub();
    } finally {
      if (id === this.newest) find("result").removeAttribute("aria-busy");
    }
  }

  /** A step into the strip, and its guess as the picture so far. */
  #grow({ step, timestep, seen, guess }, settings) {
    const when = `step ${step + 1} of ${settings.steps}`;
    showPixels(find("picture"), guess, `the guess at ${when}`);
    find("caption").textContent = `${described(settings)}: the guess at ${when}`;
    ROWS[0].append(pictureFigure(seen, `${timestep}`, `what the network saw at ${when}`));
    ROWS[1].append(pictureFigure(guess, `${step + 1}`, `what it guessed at ${when}`));
  }

  #finish(pixels, settings) {
    const { prompt, steps } = settings;
    showPixels(find("picture"), pixels, `a picture drawn for ${named(prompt)}`);
    find("caption").textContent = described(settings);
    Object.assign(find("step"), { max: steps, value: steps });
    find("scrub").hidden = false;
  }

  /** One step of the drawing, large: what the network saw, and what it guessed. */
  async scrub() {
    if (!this.shown) return;
    const step = Number(find("step").value) - 1;
    const frame = await this.session.ask("scrub", { drawing: this.shown.id, step }).answer;
    if (!frame || step !== Number(find("step").value) - 1) return; // moved on meanwhile
    const when = `Step ${step + 1} of ${this.shown.settings.steps}, timestep ${frame.timestep}`;
    find("when").textContent = when;
    find("step").setAttribute("aria-valuetext", when);
    showPixels(find("seen"), frame.seen, `what the network saw: ${when}`);
    showPixels(find("guess"), frame.guess, `what it guessed: ${when}`);
  }

  /** The model is gone, and with it the steps of the drawing. */
  forget() {
    this.shown = null;
    find("scrub").hidden = true;
  }
}
