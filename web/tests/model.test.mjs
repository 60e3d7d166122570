// The page's modules against what the package does. WEB is a folder that `web/build.py` has laid out, CASES the file
// that `web/cases.py` has written.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { before, describe, test } from "node:test";
import { pathToFileURL } from "node:url";
import { gunzipSync } from "node:zlib";

const web = new URL(`${pathToFileURL(process.env.WEB)}/`);
const cases = JSON.parse(readFileSync(process.env.CASES));
const load = (name) => import(new URL(name, web));
const manifest = JSON.parse(readFileSync(new URL("manifest.json", web)));
const { readAdapter } = await load("adapter.js");
const { fetchAll, outlook } = await load("download.js");
const { InputError } = await load("errors.js");
const { Generator } = await load("generator.js");
const { Miniature, checkSettings } = await load("model.js");
const { captionNotes } = await load("notes.js");
const { Safetensors } = await load("safetensors.js");
const { Solver } = await load("solver.js");
const { Tokenizer } = await load("tokenizer.js");
const ort = await load("runtime/ort.wasm.bundle.min.js");
ort.env.wasm.numThreads = 1;

const unpack = (name) => {
  const packed = readFileSync(new URL(manifest.files[name].path, web));
  const bytes = manifest.files[name].path.endsWith(".gz") ? gunzipSync(packed) : packed;
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);
};
const json = (name) => JSON.parse(new TextDecoder().decode(unpack(name)));
const hex = (text) => new Uint8Array(Buffer.from(text, "hex")).buffer;

/** The largest distance of two lists of numbers of one length. */
function apart(found, wanted) {
  assert.equal(found.length, wanted.length);
  return wanted.reduce((most, each, i) => Math.max(most, Math.abs(each - found[i])), 0);
}

/** The files that the model is opened with. */
function files() {
  const part = (name) => ({ graph: new Uint8Array(unpack(`${name}.onnx`)), weights: unpack(`${name}.safetensors`) });
  return {
    tokenizer: json("tokenizer"),
    scheduler: json("scheduler"),
    text_encoder: part("text_encoder"),
    unet: part("unet"),
    vae_decoder: part("vae_decoder"),
  };
}

/** The pixels of a canvas without their fourth channel. */
const colours = (pixels) => Array.from(pixels).filter((_, i) => i % 4 !== 3);

/** Draw one case to its end. */
async function drawn(model, settings) {
  let last;
  for await (const step of model.draw(settings)) last = step;
  return last.guess;
}

/** Latents and pixels are those of Python: the latents to a few ten-thousandths, the pixels to one of 255 steps. */
async function comparesTo(model, wanted) {
  const latents = await drawn(model, wanted);
  const distance = apart(latents, wanted.latents);
  assert.ok(distance < 1e-3, `latents ${distance} apart`);
  assert.ok(apart(colours(await model.decode(latents)), wanted.pixels) <= 1);
  return distance;
}

describe("tokenizer", () => {
  const tokenizer = new Tokenizer(json("tokenizer"));
  test("reads every caption and every awkward text as Python does", () => {
    assert.ok(cases.tokens.length > 600);
    for (const { text, numbers } of cases.tokens)
      assert.deepEqual(tokenizer.encode(text), numbers, JSON.stringify(text));
  });
  test("says of them what Python says", () => {
    const known = new Set(manifest.words);
    for (const { text, notes } of cases.tokens) {
      assert.deepEqual(captionNotes(text, tokenizer, known), notes, JSON.stringify(text));
    }
  });
});

describe("generator", () => {
  for (const { seed, noise } of cases.noise) {
    test(`draws ${noise.length} numbers of seed ${seed} as torch.randn does`, () => {
      assert.ok(apart(new Generator(seed).randn(noise.length), noise) < 1e-5);
    });
  }
  test("refuses a length that PyTorch fills in another way", () => {
    assert.throws(() => new Generator(0).randn(10), RangeError);
  });
});

describe("solver", () => {
  const scheduler = json("scheduler");
  test("visits the timesteps that Python visits, for every number of steps", () => {
    assert.equal(cases.solver.length, 50);
    for (const { steps, timesteps } of cases.solver)
      assert.deepEqual(new Solver(scheduler, steps).timesteps, timesteps);
  });
  for (const { steps, timesteps, end } of cases.solver.filter((each) => each.end)) {
    test(`ends where Python ends after ${steps} steps`, () => {
      const solver = new Solver(scheduler, steps);
      let x = Float32Array.from(end, (_, i) => -2 + (4 * i) / (end.length - 1));
      for (const timestep of timesteps)
        x = solver.step(
          x.map((each) => Math.sin(each + timestep / 500)),
          x,
        ).latents;
      assert.ok(apart(x, end) < 2e-4, `${apart(x, end)} apart`);
    });
  }
});

describe("model", () => {
  let model;
  before(async () => {
    ort.env.wasm.wasmBinary = unpack("runtime");
    model = await Miniature.open(ort, files());
  });

  for (const name of ["text_encoder", "unet", "vae_decoder"]) {
    test(`the graph of ${name} answers as PyTorch does`, async () => {
      const answers = JSON.parse(readFileSync(`${process.env.GRAPHS}/${name}.answers.json`));
      const shapes = { tokens: [1, 32], latents: [1, 4, 16, 16], timestep: [1], context: [1, 32, 128] };
      const { session } = model.networks[name];
      const inputs = Object.fromEntries(
        session.inputNames.map((each) => [
          each,
          each === "tokens"
            ? new ort.Tensor("int64", BigInt64Array.from(answers[each], BigInt), shapes[each])
            : new ort.Tensor("float32", Float32Array.from(answers[each]), shapes[each]),
        ]),
      );
      const outputs = await session.run(inputs);
      assert.deepEqual([...session.inputNames, ...session.outputNames].sort(), Object.keys(answers).sort());
      for (const each of session.outputNames) assert.ok(apart(outputs[each].data, answers[each]) < 2e-5, each);
    });
  }
  for (const wanted of cases.drawings) {
    test(`draws "${wanted.prompt}" of seed ${wanted.seed} in ${wanted.steps} steps as Python does`, async (context) => {
      context.diagnostic(`latents ${(await comparesTo(model, wanted)).toExponential(1)} apart`);
    });
  }
  test("looks where Python looks", async () => {
    const mean = new Float64Array(64 * 32);
    for await (const { looked } of model.draw(cases.looked)) {
      looked.forEach((each, i) => (mean[(i % 32) * 64 + Math.floor(i / 32)] += each / cases.looked.steps));
    }
    assert.ok(apart(mean, cases.looked.maps) < 1e-4);
  });
  test("refuses numbers that cannot be drawn with", () => {
    const good = { seed: 0, steps: 20, guidance: 5 };
    checkSettings(good);
    for (const wrong of [
      { seed: -1 },
      { seed: 2 ** 32 },
      { seed: 0.5 },
      { seed: NaN },
      { steps: 0 },
      { steps: 51 },
      { steps: 2.5 },
      { guidance: 0.5 },
      { guidance: NaN },
      { guidance: 21 },
      { seed: 2 ** 53 },
    ]) {
      assert.throws(() => checkSettings({ ...good, ...wrong }), InputError, JSON.stringify(wrong));
    }
  });

  const parts = () => ({ unet: model.networks.unet.file, text_encoder: model.networks.text_encoder.file });
  test("draws with an adapter as Python does, as much of it as is asked for, and forgets it again", async () => {
    assert.equal(cases.adapters.length, 3);
    for (const { file, strength, drawn: wanted } of cases.adapters) {
      await model.adapt(readAdapter(hex(file), parts()), strength);
      await comparesTo(model, wanted);
      assert.ok(apart(wanted.latents, await plain(wanted)) > 0.1, "the adapter changes nothing");
    }
    await model.adapt(null);
    await comparesTo(model, cases.drawings[0]);
  });
  const plain = async (settings) => {
    const other = await Miniature.open(ort, files());
    return drawn(other, settings);
  };
  for (const { name, file, word, python } of cases.refused) {
    test(`refuses an adapter in words: ${name}`, () => {
      assert.ok(python, "Python takes it");
      assert.throws(
        () => readAdapter(hex(file), parts()),
        (error) => {
          assert.ok(error instanceof InputError, `${error.stack}`);
          assert.match(error.message, new RegExp(word));
          return true;
        },
      );
    });
  }
  test("takes no byte that is changed or cut for a fault of its own", () => {
    const whole = new Uint8Array(hex(cases.adapters[0].file));
    for (let seed = 0; seed < 300; seed++) {
      const random = new Generator(seed);
      const bytes = whole.slice(0, seed % 3 ? whole.length : random.random() % whole.length);
      for (let count = 0; count < 8; count++) bytes[random.random() % Math.min(bytes.length, 9000)] = random.random();
      try {
        readAdapter(bytes.buffer, parts());
      } catch (error) {
        assert.ok(error instanceof InputError, `${error.stack}`);
      }
    }
  });
  for (const [thrown, word] of [
    [new RangeError("no room"), /too little memory/],
    [new Error("Aborted(CompileError: … violates the following Content Security policy …)"), /wasm-unsafe-eval/],
  ]) {
    test(`says in words what the browser refuses: ${word.source}`, async () => {
      const create = async () => {
        throw thrown;
      };
      await assert.rejects(
        Miniature.open({ ...ort, InferenceSession: { create } }, files()),
        (error) => error instanceof InputError && error.lost && word.test(error.message),
      );
    });
  }

  /** An adapter of one layer: its matrices as given. */
  function oneLayer(layer, tensors) {
    let first = 0;
    const entries = Object.entries(tensors).map(([side, { shape, values }]) => {
      const data_offsets = [first, (first += 4 * values.length)];
      return [`lora_unet_${layer.replaceAll(".", "_")}${side}`, { dtype: "F32", shape, data_offsets }];
    });
    const header = Buffer.from(JSON.stringify(Object.fromEntries(entries)));
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(header.length));
    const numbers = Object.values(tensors).flatMap(({ values }) => values);
    return new Uint8Array(Buffer.concat([length, header, Buffer.from(Float32Array.from(numbers).buffer)])).buffer;
  }
  const filled = (...shape) => ({ shape, values: Array(shape.reduce((product, side) => product * side, 1)).fill(0.1) });

  test("refuses an adapter of convolutions, which it cannot add, and one whose scale is no number", () => {
    const [wide, [height, width]] = ["conv_in", model.networks.unet.file.tensors.get("conv_in.weight").shape];
    const convolution = { ".lora_down.weight": filled(2, width, 3, 3), ".lora_up.weight": filled(height, 2, 1, 1) };
    assert.throws(() => readAdapter(oneLayer(wide, convolution), parts()), /another model/);

    const name = [...model.networks.unet.file.tensors.keys()].find((each) => each.endsWith("to_q.weight"));
    const [rows, columns] = model.networks.unet.file.tensors.get(name).shape;
    const matrices = { ".lora_down.weight": filled(2, columns), ".lora_up.weight": filled(rows, 2) };
    const layer = name.replace(/\.weight$/, "");
    assert.equal(readAdapter(oneLayer(layer, matrices), parts()).unet.size, 1);
    for (const alpha of [
      { shape: [], values: [NaN] },
      { shape: [0], values: [] },
    ]) {
      assert.throws(() => readAdapter(oneLayer(layer, { ...matrices, ".alpha": alpha }), parts()), /no number/);
    }
  });
});

describe("safetensors", () => {
  test("reads all three formats of numbers", () => {
    const tensors = { a: ["F32", [1.5, -2]], b: ["F16", [0x3c00, 0xc100]], c: ["BF16", [0x3f80, 0xc020]] };
    const arrays = { F32: Float32Array, F16: Uint16Array, BF16: Uint16Array };
    let first = 0;
    const data = [];
    const header = Object.fromEntries(
      Object.entries(tensors).map(([name, [dtype, values]]) => {
        const bytes = Buffer.from(arrays[dtype].from(values).buffer);
        data.push(bytes);
        return [name, { dtype, shape: [2], data_offsets: [first, (first += bytes.length)] }];
      }),
    );
    const text = Buffer.from(JSON.stringify(header));
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(text.length));
    const whole = Buffer.concat([length, text, ...data]);
    const file = new Safetensors(whole.buffer.slice(whole.byteOffset, whole.byteOffset + whole.length));
    assert.deepEqual(Array.from(file.numbers("a")), [1.5, -2]);
    assert.deepEqual(Array.from(file.numbers("b")), [1, -2.5]);
    assert.deepEqual(Array.from(file.numbers("c")), [1, -2.5]);
  });
  test("refuses places that are none in words", () => {
    for (const data_offsets of [5, null, "04", [], [0], [-4, 0], [0, 8]]) {
      const header = Buffer.from(JSON.stringify({ a: { dtype: "F32", shape: [1], data_offsets } }));
      const whole = new Uint8Array(8 + header.length + 4);
      whole[0] = header.length;
      whole.set(header, 8);
      assert.throws(() => new Safetensors(whole.buffer), InputError, JSON.stringify(data_offsets));
    }
  });
});

describe("download", () => {
  const served = Object.fromEntries(["tokenizer", "text_encoder.onnx"].map((name) => [name, manifest.files[name]]));
  const base = new URL("https://example.org/try/");

  /** A browser with a server and a store; the server answers by `change`. */
  function browser(change = (bytes) => bytes) {
    const kept = new Map();
    const asked = [];
    globalThis.caches = {
      open: async () => ({
        match: async (address) => kept.get(`${address}`)?.clone(),
        put: async (address, response) => kept.set(`${address}`, response),
        delete: async (address) => kept.delete(`${address.url ?? address}`),
        keys: async () => [...kept.keys()].map((url) => ({ url })),
      }),
    };
    globalThis.fetch = async (address) => {
      asked.push(`${address}`);
      const path = new URL(address).pathname.replace("/try/", "");
      return change(readFileSync(new URL(path, web)), path);
    };
    return { kept, asked };
  }
  const answer = (bytes) => new Response(bytes);

  test("brings files whole, tells how far it is, and fetches nothing the second time", async () => {
    const { asked } = browser(answer);
    for (const visit of [1, 2]) {
      const reports = [];
      const found = await fetchAll(base, served, (loaded, total) => reports.push([loaded, total]));
      for (const name of Object.keys(served)) assert.deepEqual(Buffer.from(found[name]), Buffer.from(unpack(name)));
      const total = Object.values(served).reduce((sum, { bytes }) => sum + bytes, 0);
      assert.deepEqual(reports.at(-1), [total, total], `visit ${visit}`);
      assert.ok(reports.every(([loaded], i) => i === 0 || loaded >= reports[i - 1][0]));
    }
    assert.equal(asked.length, 2);
    assert.ok(asked.every((address) => address.startsWith(base.href)));
  });
  test("serves browsers that have no store", async () => {
    browser(answer);
    delete globalThis.caches;
    assert.ok((await fetchAll(base, served, () => {})).tokenizer);
    assert.equal((await outlook(base, served)).keeps, false);
  });
  test("takes what a server has unpacked on the way, and never tells more than all, nor less than before", async () => {
    const inPieces = (bytes) => {
      const pieces = Array.from({ length: Math.ceil(bytes.length / 1000) }, (_, i) =>
        bytes.subarray(1000 * i, 1000 * (i + 1)),
      );
      return answer(ReadableStream.from(pieces));
    };
    browser((bytes, path) => inPieces(path.endsWith(".gz") ? gunzipSync(bytes) : bytes));
    const reports = [];
    const found = await fetchAll(base, served, (loaded, total) => reports.push(loaded / total));
    assert.deepEqual(Buffer.from(found["text_encoder.onnx"]), Buffer.from(unpack("text_encoder.onnx")));
    assert.ok(reports.every((share, i) => share <= 1 && (i === 0 || share >= reports[i - 1])));
    assert.equal(reports.at(-1), 1);
  });
  test("fetches of a newer model only what has changed, and leaves other pages of the host alone", async () => {
    const { kept, asked } = browser(answer);
    const before = { ...served, tokenizer: { ...served.tokenizer, sha256: "0".repeat(64) } };
    await assert.rejects(
      fetchAll(base, before, () => {}),
      /a reload may mend/,
    );
    assert.equal((await outlook(base, served)).missing, served.tokenizer.bytes + served["text_encoder.onnx"].bytes);
    await fetchAll(base, { "text_encoder.onnx": served["text_encoder.onnx"] }, () => {});
    const others = ["https://example.org/copy/try/model/unet.gz?v=0", "https://example.org/try.html"];
    for (const other of others) kept.set(other, new Response("kept"));
    kept.set(`${base.href}model/tokenizer.json?v=0`, new Response("old"));
    asked.length = 0;
    assert.deepEqual(await outlook(base, served), { missing: served.tokenizer.bytes, keeps: true });
    await fetchAll(base, served, () => {});
    assert.equal(asked.length, 1);
    assert.deepEqual(await outlook(base, served), { missing: 0, keeps: true });
    assert.ok(others.every((other) => kept.has(other)) && !kept.has(`${base.href}model/tokenizer.json?v=0`));
  });
  test("a store that fails costs the next visit time, no more", async () => {
    browser(answer);
    const fails = async () => {
      throw new Error("the disk is full");
    };
    for (const broken of ["match", "put", "delete", "keys"]) {
      const store = await caches.open();
      globalThis.caches = { open: async () => ({ ...store, [broken]: fails }) };
      assert.ok((await fetchAll(base, served, () => {})).tokenizer, broken);
      await outlook(base, served);
    }
  });
  for (const [name, change] of Object.entries({
    "cut in the middle": (bytes) => answer(bytes.subarray(0, bytes.length / 2)),
    "changed on the way": (bytes) => answer(Buffer.from(bytes).fill(7, 200, 300)),
    "not there": () => new Response("", { status: 404 }),
    "broken off": () => {
      throw new TypeError("Failed to fetch");
    },
    "another page, as a hotel's network answers": () => answer("<html>Please sign in</html>"),
  })) {
    test(`says in words that a file is ${name}, keeps nothing of it, and loads it the next time`, async () => {
      const { kept } = browser(change);
      await assert.rejects(
        fetchAll(base, served, () => {}),
        (error) => {
          assert.ok(error instanceof InputError, `${error.stack}`);
          return /could not be loaded/.test(error.message);
        },
      );
      assert.equal(kept.size, 0);
      browser(answer);
      assert.ok((await fetchAll(base, served, () => {})).tokenizer);
    });
  }
  test("fetches anew what lies damaged in the store, and drops what an earlier model left there", async () => {
    const { kept, asked } = browser(answer);
    await fetchAll(base, served, () => {});
    const [first] = kept.keys();
    kept.set(first, new Response("damaged"));
    kept.set(`${base.href}old.gz?v=0`, new Response("old"));
    await fetchAll(base, served, () => {});
    assert.equal(asked.filter((address) => address === first).length, 2);
    assert.ok(!kept.has(`${base.href}old.gz?v=0`));
  });
});
