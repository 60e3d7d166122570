// A LoRA adapter that `train-dreambooth --lora` wrote: two thin matrices beside a weight (lesson 34), added to it here.

import { check } from "./errors.js";
import { Safetensors } from "./safetensors.js";

const REMEDY = "drop a pytorch_lora_weights.safetensors that train-dreambooth --lora made of the miniature";
// The same two matrices by the names of diffusers, transformers, PEFT and kohya.
const SIDES = [
  [/\.(lora\.down|lora_linear_layer\.down|lora_A|lora_down)\.weight$/, "down"],
  [/\.(lora\.up|lora_linear_layer\.up|lora_B|lora_up)\.weight$/, "up"],
  [/\.alpha$/, "alpha"],
];
const PARTS = { unet: ["unet.", "lora_unet_"], text_encoder: ["text_encoder.", "lora_te_", "lora_te1_"] };

/** `unet.mid_block.….to_q.lora.down.weight` as part, layer and side; null for what belongs to no adapter. */
function readName(name) {
  const side = SIDES.find(([pattern]) => pattern.test(name));
  for (const [part, prefixes] of Object.entries(PARTS)) {
    const prefix = prefixes.find((each) => name.startsWith(each));
    if (side && prefix) return { part, layer: name.slice(prefix.length).replace(side[0], ""), side: side[1] };
  }
  return null;
}

/** The matrices of a file, by part and layer. */
function collect(file) {
  const layers = new Map();
  for (const name of file.tensors.keys()) {
    const found = readName(name);
    check(found, `it holds ${name}, which is no LoRA for a Stable Diffusion 1 or 2; ${REMEDY}`);
    const key = `${found.part} ${found.layer}`;
    layers.set(key, { ...layers.get(key), part: found.part, layer: found.layer, [found.side]: name });
  }
  check(layers.size, `it holds no adapter; ${REMEDY}`);
  return [...layers.values()];
}

/** How much of the product is added: alpha over rank, from where each format keeps it; 1 where nothing is said. */
function scaleOf(file, { part, alpha }, rank) {
  if (alpha) return file.numbers(alpha)[0] / rank;
  try {
    const kept = JSON.parse(file.metadata.lora_adapter_metadata ?? "{}")[`${part}.lora_alpha`];
    return typeof kept === "number" ? kept / rank : 1;
  } catch {
    return 1;
  }
}

/** Height and width of a matrix, also as a convolution of one pixel; of other shapes none. */
const sides = ([height, width, ...others] = []) => (others.every((side) => side === 1) ? [height, width] : []);

/** The weight of a model that a layer belongs to; kohya writes `_` for every dot. */
function findWeight(tensors, layer) {
  if (tensors.has(`${layer}.weight`)) return `${layer}.weight`;
  return [...tensors.keys()].find((name) => name.replace(/\.weight$/, "").replaceAll(".", "_") === layer);
}

/** Read an adapter and check it against the model's own files.
 *
 * @param {ArrayBuffer} buffer the file  @param models { unet, text_encoder } as Safetensors
 * @returns { unet, text_encoder }: maps from the name of a weight to { down, up, rank, scale }
 */
export function readAdapter(buffer, models) {
  const file = new Safetensors(buffer);
  const adapter = { unet: new Map(), text_encoder: new Map() };
  for (const entry of collect(file)) {
    const { part, layer, down, up } = entry;
    check(down && up, `its layer ${layer} has one of two matrices only; ${REMEDY}`);
    const { tensors } = models[part];
    const name = findWeight(tensors, layer);
    const [rank, inputs] = sides(file.tensors.get(down).shape);
    const [outputs, rankUp] = sides(file.tensors.get(up).shape);
    const [height, width] = sides(tensors.get(name)?.shape);
    check(
      rank > 0 && height === outputs && width === inputs && rank === rankUp,
      `it was made for another model (${part}.${layer}: ${outputs} × ${inputs} there, ` +
        `${height ? `${height} × ${width}` : "no such layer"} in the miniature); ${REMEDY}`,
    );
    const scale = scaleOf(file, entry, rank);
    const made = { down: file.numbers(down), up: file.numbers(up), rank, scale };
    const numbers = [scale, ...made.down, ...made.up];
    check(numbers.every(Number.isFinite), `its layer ${layer} holds what is no number; it is damaged`);
    adapter[part].set(name, made);
  }
  return adapter;
}

/** Add strength · scale · up · down to one weight within the widened numbers of its file. */
export function merge(numbers, { shape: [height, width], first }, { down, up, rank, scale }, strength) {
  const weight = numbers.subarray(first / 2, first / 2 + height * width); // two bytes a number in the file
  for (let row = 0; row < height; row++) {
    for (let inner = 0; inner < rank; inner++) {
      const factor = strength * scale * up[row * rank + inner];
      for (let column = 0; column < width; column++) {
        weight[row * width + column] += factor * down[inner * width + column];
      }
    }
  }
}
