// Reads safetensors: eight bytes of length, a header in JSON, and the numbers of all tensors one after the other.
// https://huggingface.co/docs/safetensors

import { check } from "./errors.js";

const BYTES = { F32: 4, F16: 2, BF16: 2, I64: 8 };

/** All 65,536 numbers of 16 bits as numbers of 32: one sign, five bits of exponent, ten of fraction (IEEE 754). */
const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
});

/** Numbers of 16 bits as numbers of 32. */
function widen(halves) {
  const numbers = new Float32Array(halves.length);
  for (let place = 0; place < halves.length; place++) numbers[place] = HALVES[halves[place]];
  return numbers;
}

/** The upper halves of numbers of 32 bits, which is what bfloat16 is, as those numbers. */
function widenBrain(uppers) {
  return new Float32Array(Uint32Array.from(uppers, (bits) => bits << 16).buffer);
}

/** A tensor in a file: its format, its shape, and where its bytes lie behind the header. */
function checkedEntry(name, entry, room) {
  const { dtype, shape, data_offsets: offsets } = entry ?? {};
  const [first, end] = Array.isArray(offsets) ? offsets : [];
  const whole = Array.isArray(shape) && shape.every((side) => Number.isSafeInteger(side) && side >= 0);
  check(whole && first >= 0 && first <= end && end <= room, `the tensor ${name} lies outside the file`);
  const count = shape.reduce((product, side) => product * side, 1);
  check(!(dtype in BYTES) || count * BYTES[dtype] === end - first, `the tensor ${name} is cut off`);
  return { dtype, shape, first, end };
}

/** A file, opened: `tensors` maps names to shapes, and `numbers(name)` reads one as a Float32Array. */
export class Safetensors {
  /** @param {ArrayBuffer} buffer the whole file. Throws an InputError that says what is wrong with it. */
  constructor(buffer) {
    check(buffer.byteLength >= 8, "it is too short to be a safetensors file");
    const length = Number(new DataView(buffer).getBigUint64(0, true));
    check(length <= buffer.byteLength - 8, "it is not a safetensors file, or it is cut off");
    let header;
    try {
      header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(buffer, 8, length)));
    } catch {
      header = null;
    }
    check(header && typeof header === "object" && !Array.isArray(header), "it is not a safetensors file");
    const { __metadata__: metadata = {}, ...entries } = header;
    this.metadata = metadata;
    this.data = buffer.slice(8 + length);
    this.tensors = new Map(
      Object.entries(entries).map(([name, entry]) => [name, checkedEntry(name, entry, this.data.byteLength)]),
    );
  }

  /** The numbers of one tensor, in 32 bits. */
  numbers(name) {
    const { dtype, first, end } = this.tensors.get(name);
    check(dtype in BYTES, `the tensor ${name} holds ${dtype}; this page reads ${Object.keys(BYTES).join(", ")}`);
    const bytes = this.data.slice(first, end);
    if (dtype === "F32") return new Float32Array(bytes);
    if (dtype === "I64") return Float32Array.from(new BigInt64Array(bytes), Number);
    return dtype === "F16" ? widen(new Uint16Array(bytes)) : widenBrain(new Uint16Array(bytes));
  }

  /** The whole data of a file of 16 bits, widened; the tensor that began at byte b begins at number b / 2. */
  widened() {
    return widen(new Uint16Array(this.data));
  }
}
