// The miniature: text encoder, UNet and VAE decoder, and the loop that draws with them. Knows nothing of the page.

import { merge } from "./adapter.js";
import { InputError, check } from "./errors.js";
import { Generator } from "./generator.js";
import { Safetensors } from "./safetensors.js";
import { Solver } from "./solver.js";
import { Tokenizer } from "./tokenizer.js";

const OPTIONS = { executionProviders: ["wasm"], logSeverityLevel: 3 };
const LIMITS = {
  seed: { low: 0, high: 0xffffffff, whole: true },
  steps: { low: 1, high: 50, whole: true },
  guidance: { low: 1, high: 20, whole: false },
};

/** Raise an InputError for numbers that cannot be drawn with. */
export function checkSettings(settings) {
  for (const [name, { low, high, whole }] of Object.entries(LIMITS)) {
    const value = settings[name];
    const fits = whole ? Number.isSafeInteger(value) : Number.isFinite(value);
    const kind = whole ? "a whole number" : "a number";
    check(fits && value >= low && value <= high, `${name} must be ${kind} from ${low} to ${high}`);
  }
}

/** What the browser does not give, memory or leave to compile, is no fault of the page. */
function explained(error) {
  const said = `${error?.message ?? error}`;
  if (/Content Security Policy/i.test(said)) {
    const message = "the server that sends this page forbids WebAssembly: its policy lacks 'wasm-unsafe-eval'";
    return Object.assign(new InputError(message), { lost: true });
  }
  if (error instanceof RangeError || /memory|bad_alloc|OOM|allocat/i.test(said)) {
    const message =
      "the browser gave this page too little memory (it needs about 300 MB); close other tabs, and try again";
    return Object.assign(new InputError(message), { lost: true });
  }
  return error;
}

/** One network: its graph, and its weights as they were trained. */
class Network {
  constructor(ort, name, { graph, weights }) {
    Object.assign(this, { ort, name, graph });
    this.file = new Safetensors(weights);
    this.session = null;
  }

  /** Make it ready to run, with an adapter's additions if there is one.
   *
   * @param layers of an adapter: name of a weight to its addition; @param {number} strength how much of it
   */
  async open(layers = new Map(), strength = 1) {
    const numbers = this.file.widened();
    for (const [name, layer] of layers) merge(numbers, this.file.tensors.get(name), layer, strength);
    const externalData = [{ path: `${this.name}.f32`, data: new Uint8Array(numbers.buffer) }];
    try {
      const session = await this.ort.InferenceSession.create(this.graph, { ...OPTIONS, externalData });
      await this.session?.release();
      this.session = session;
    } catch (error) {
      throw explained(error);
    }
  }

  /** Inputs by name to outputs by name. */
  async run(inputs) {
    try {
      return await this.session.run(inputs);
    } catch (error) {
      throw explained(error);
    }
  }
}

/** Stable Diffusion in miniature, ready to draw. */
export class Miniature {
  /** @param ort ONNX Runtime  @param files `tokenizer` and `scheduler` as objects; for `text_encoder`, `unet` and
   * `vae_decoder` the `graph` as bytes and the `weights` as an ArrayBuffer */
  static async open(ort, files) {
    const model = new Miniature();
    model.ort = ort;
    model.tokenizer = new Tokenizer(files.tokenizer);
    model.scheduler = files.scheduler;
    model.networks = {};
    for (const name of ["text_encoder", "unet", "vae_decoder"]) {
      model.networks[name] = new Network(ort, name, files[name]);
      await model.networks[name].open();
    }
    return model;
  }

  #tensor(numbers, shape) {
    return new this.ort.Tensor("float32", numbers, shape);
  }

  /** What the UNet reads of a prompt: a tensor (1, 32, 128). */
  async encode(prompt) {
    const tokens = BigInt64Array.from(this.tokenizer.encode(prompt), BigInt);
    const { context } = await this.networks.text_encoder.run({
      tokens: new this.ort.Tensor("int64", tokens, [1, tokens.length]),
    });
    return context;
  }

  /** The noise that the UNet sees in latents, and where it looked for each token at 8 × 8 places: (8 · 8, tokens). */
  async #predict(latents, timestep, context) {
    const inputs = { latents, timestep: this.#tensor(Float32Array.of(timestep), [1]), context };
    const { noise, ...attentions } = await this.networks.unet.run(inputs);
    return { noise: noise.data, looked: meanOver(Object.values(attentions).filter(({ dims }) => dims[2] === 64)) };
  }

  /** Draw one picture, step by step: an async generator of what the network saw and guessed, as latents.
   *
   * The settings are those of `draw` in Python, and so is what comes of them. Yields after every step
   * { step, timestep, seen, guess, looked }; the guess of the last step is the result.
   */
  async *draw({ prompt, seed, steps, guidance }) {
    checkSettings({ seed, steps, guidance });
    const towards = await this.encode(prompt);
    const away = guidance > 1 ? await this.encode("") : null;
    const solver = new Solver(this.scheduler, steps);
    let latents = new Generator(seed).randn(4 * 16 * 16);
    for (const [step, timestep] of solver.timesteps.entries()) {
      const seen = this.#tensor(latents, [1, 4, 16, 16]);
      const { noise, looked } = await this.#predict(seen, timestep, towards);
      if (away) {
        const without = (await this.#predict(seen, timestep, away)).noise;
        noise.forEach((each, i) => (noise[i] = without[i] + guidance * (each - without[i])));
      }
      const made = solver.step(noise, latents);
      yield { step, timestep, seen: latents, guess: made.guess, looked };
      latents = made.latents;
    }
  }

  /** Latents as a picture: 64 × 64 pixels of red, green, blue and 255, as a canvas takes them. */
  async decode(latents) {
    const { picture } = await this.networks.vae_decoder.run({ latents: this.#tensor(latents, [1, 4, 16, 16]) });
    const pixels = new Uint8ClampedArray(64 * 64 * 4).fill(255);
    const plane = 64 * 64;
    picture.data.forEach((value, i) => {
      pixels[(i % plane) * 4 + Math.floor(i / plane)] = (value / 2 + 0.5) * 255; // clamped and rounded on writing
    });
    return pixels;
  }

  /** Draw with an adapter from now on, or with null without. @param adapter as `readAdapter` returns it */
  async adapt(adapter, strength = 1) {
    for (const name of ["text_encoder", "unet"]) {
      await this.networks[name].open(adapter?.[name], strength);
    }
  }
}

/** The mean of softmaxes (1, heads, places, tokens) over heads and layers: a Float32Array (places · tokens). */
function meanOver(attentions) {
  const size = attentions[0].dims[2] * attentions[0].dims[3];
  const mean = new Float32Array(size);
  const count = attentions.reduce((sum, { dims }) => sum + dims[1], 0);
  for (const { data } of attentions) data.forEach((each, i) => (mean[i % size] += each / count));
  return mean;
}
