// The model's own thread: loads it, draws, and answers the page, which stays free to scroll and type.

import { readAdapter } from "./adapter.js";
import { fetchAll } from "./download.js";
import { InputError, check } from "./errors.js";
import { Miniature } from "./model.js";

// The smallest module of WebAssembly that needs SIMD: a function that spreads a zero over a vector (i8x16.splat).
const WITH_SIMD = Uint8Array.from(atob("AGFzbQEAAAABBQFgAAF7AwIBAAoIAQYAQQD9Dws="), (byte) => byte.charCodeAt(0));
const CURRENT = "any current Chrome, Edge, Firefox or Safari has it";

let model = null;
let latestDrawing = 0; // an earlier one stops at its next step
let kept = { id: 0, steps: [] }; // the latents of the last drawing, for the scrubber

/** Let messages in that have come meanwhile. */
const pause = () =>
  new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => resolve(port1.close());
    port2.postMessage(null);
  });

/** ONNX Runtime, with the WebAssembly that has been fetched already. */
async function openRuntime(binary) {
  const ort = await import("./runtime/ort.wasm.bundle.min.js").catch((error) => {
    throw new InputError(`the runtime could not be loaded (${error.message}); look at your connection and try again`);
  });
  ort.env.wasm.wasmBinary = binary;
  ort.env.wasm.numThreads = 1; // more would need headers that a static host does not send
  return ort;
}

/** Fetch everything and open the model; returns its tokenizer.json, which the page reads prompts with, too. */
async function load({ files }, tell) {
  check(
    globalThis.WebAssembly?.validate(WITH_SIMD),
    `this browser has no WebAssembly with SIMD, which the model needs; ${CURRENT}`,
  );
  const buffers = await fetchAll(import.meta.url, files, (loaded) => tell({ loaded }));
  const json = (name) => JSON.parse(new TextDecoder().decode(buffers[name]));
  const part = (name) => ({ graph: new Uint8Array(buffers[`${name}.onnx`]), weights: buffers[`${name}.safetensors`] });
  model = await Miniature.open(await openRuntime(buffers.runtime), {
    tokenizer: json("tokenizer"),
    scheduler: json("scheduler"),
    text_encoder: part("text_encoder"),
    unet: part("unet"),
    vae_decoder: part("vae_decoder"),
  });
  return json("tokenizer");
}

/** What the network saw at a step and what it guessed, as pixels. */
async function frame({ step, timestep, seen, guess }) {
  return { step, timestep, seen: await model.decode(seen), guess: await model.decode(guess) };
}

/** Draw a picture. Tells the frames of some steps; returns the last, and where each token was looked at on the mean. */
async function draw({ id, frames = 0, ...settings }, tell) {
  const drawing = { id, steps: [] };
  const looked = new Float32Array(64 * model.tokenizer.length);
  const apart = (settings.steps - 1) / Math.max(frames - 1, 1);
  const shown = new Set(Array.from({ length: frames }, (_, i) => Math.round(i * apart)));
  for await (const made of model.draw(settings)) {
    drawing.steps.push(made);
    made.looked.forEach((each, i) => (looked[i] += each / settings.steps));
    if (shown.has(made.step)) tell(await frame(made));
    await pause();
    if (latestDrawing !== id) return null; // another one was asked for
  }
  if (frames) kept = drawing;
  const { guess } = drawing.steps.at(-1);
  return { pixels: await model.decode(guess), looked, pieces: pieces(settings.prompt) };
}

/** The tokens of a prompt as one reads them. */
function pieces(prompt) {
  const { tokenizer } = model;
  return tokenizer
    .numbers(prompt)
    .slice(0, tokenizer.length - 2)
    .map((number) => tokenizer.decode([number]));
}

/** One step of the last drawing; null when another one has begun since. */
async function scrub({ drawing, step }) {
  return drawing === kept.id ? frame(kept.steps[step]) : null;
}

/** Take an adapter's file, or with null none; returns how many layers it has. */
async function adapt({ file, strength }) {
  const { unet, text_encoder } = model.networks;
  const adapter = file && readAdapter(file, { unet: unet.file, text_encoder: text_encoder.file });
  await model.adapt(adapter, strength);
  return adapter ? adapter.unet.size + adapter.text_encoder.size : 0;
}

const ANSWERS = { load, draw, scrub, adapt };
let before = Promise.resolve(); // requests are answered one after the other

self.onmessage = ({ data: { id, kind, payload } }) => {
  if (kind === "draw") latestDrawing = id;
  before = before.then(async () => {
    try {
      const result = await ANSWERS[kind]({ ...payload, id }, (event) => self.postMessage({ id, event }));
      self.postMessage({ id, result });
    } catch (error) {
      const { message = `${error}`, lost = false } = error; // WebAssembly may throw a bare number
      self.postMessage({ id, error: { message, lost, input: error instanceof InputError } });
    }
  });
};
