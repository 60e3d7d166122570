// The page in a real browser: what it draws, what it says of bad input, how it looks. ADAPTER is an adapter that was
// trained on the miniature, FOREIGN a file that is none.

import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { OUT, WEB, apart, draw, opened, pixels, said, visit as visitIt } from "./browser.mjs";

const { ADAPTER } = process.env;
const PROMPTS = [
  // with a seed each
  ["a photo of a red butterfly on snow", 0],
  ["a photo of a blue fish on sea", 1],
  ["a photo of a purple beetle on sand", 2],
  ["a photo of a white flower on night", 3],
];
const RUNTIME_WITHOUT_MEMORY = `
  export const env = { wasm: {} };
  export class Tensor {}
  export const InferenceSession = {
    create: async () => { throw new RangeError("WebAssembly.Memory(): could not allocate memory"); },
  };
`;
const it = opened();
const visit = (options) => visitIt(it, options);

describe("the page", () => {
  test("draws four prompts, says how long it took, and asks nothing of other hosts", async () => {
    const { page, context, faults } = await visit();
    const drawn = [];
    for (const [prompt, seed] of PROMPTS) {
      await draw(page, prompt, seed);
      drawn.push({ prompt, seed, pixels: await pixels(page) });
      assert.match(await page.getAttribute("#picture", "aria-label"), new RegExp(prompt));
    }
    writeFileSync(join(OUT, "drawn.json"), JSON.stringify(drawn));
    assert.equal(await page.locator("#seen-row figure").count(), 8);
    assert.equal(await page.locator("#guess-row figure").count(), 8);
    assert.deepEqual(faults, []);
    await context.close();
  });

  test("loads from the browser's own store the second time", async () => {
    const { page, context } = await visit();
    await draw(page, "a butterfly");
    const first = await pixels(page);
    it.served.length = 0;
    const again = await visit({ context });
    await draw(again.page, "a butterfly");
    assert.equal(apart(await pixels(again.page), first), 0);
    assert.deepEqual(
      it.served.filter((path) => /\.(gz|onnx|safetensors)$/.test(path)),
      [],
    );
    await context.close();
  });

  test("moves back through the drawing, and takes settings from the address", async () => {
    const { page, context } = await visit({ query: "?prompt=a+blue+fish+on+sea&seed=5&steps=12&guidance=3" });
    await page.click("#go");
    await said(page, /^Drawn in/);
    assert.match(await page.textContent("#caption"), /“a blue fish on sea”, seed 5, guidance 3, 12 steps/);
    await said(page, /^Step 12 of 12/, "when");
    const last = await pixels(page, "guess");
    for (const step of [1, 6, 12]) {
      await page.locator("#step").fill(`${step}`);
      await said(page, new RegExp(`^Step ${step} of 12`), "when");
      const distance = apart(await pixels(page, "guess"), last);
      assert.ok(step === 12 ? distance === 0 : distance > 1, `step ${step}: ${distance}`);
    }
    await context.close();
  });

  test("shows the three experiments", async () => {
    const { page, context, faults } = await visit();
    await draw(page, "a photo of a red butterfly on snow");
    for (const [name, count] of [
      ["guidance", 6],
      ["word", 10],
      ["look", 9],
    ]) {
      await page.click(`#${name}-experiment`);
      await said(page, /^Drawing/);
      await said(page, /^Drawn\.$/);
      assert.equal(await page.locator(`#${name}-experiment-pictures figure`).count(), count);
    }
    const captions = await page.locator("#word-experiment-pictures figcaption").allTextContents();
    assert.equal(captions[0], "red", "the prompt's own colour comes first");
    assert.deepEqual(faults, []);
    await context.close();
  });

  test("draws a subject with an adapter, as much of it as asked for, and without it again", async () => {
    const { page, context } = await visit();
    const prompt = "a photo of a sks butterfly on snow";
    await draw(page, prompt, 1);
    const plain = await pixels(page);
    await page.setInputFiles("#adapter-file", ADAPTER);
    await said(page, /^Drawing with .*layers/, "adapter-name");
    await said(page, /^Drawn in/);
    const adapted = await pixels(page);
    assert.ok(apart(adapted, plain) > 3, "nothing has changed");
    writeFileSync(join(OUT, "adapted.json"), JSON.stringify([{ prompt, seed: 1, pixels: adapted }]));
    await page.screenshot({ path: join(OUT, "adapter.png"), fullPage: true });
    await page.locator("#strength").fill("0");
    await said(page, /^Drawn in/);
    await page.waitForFunction(() => !document.querySelector("[aria-busy]"));
    await page.click("#adapter-off");
    await page.waitForFunction(() => document.getElementById("adapter-off").hidden);
    await draw(page, prompt, 1);
    assert.equal(apart(await pixels(page), plain), 0);
    await context.close();
  });

  test("stays responsive while it draws, and the newest wish counts", async () => {
    const { page, context, faults } = await visit();
    await draw(page, "a butterfly");
    await page.locator("#steps").fill("50");
    await page.click("#go");
    await said(page, /^Drawing/);
    const began = Date.now();
    await page.evaluate(() => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve))));
    assert.ok(Date.now() - began < 1500, "the page did not answer while it drew"); // 50 steps take longer
    await page.locator("#steps").fill("2");
    await draw(page, "a photo of a green beetle on sand");
    assert.match(await page.textContent("#caption"), /green beetle.*2 steps/);
    assert.equal(await page.locator("#guess-row figure").count(), 2);
    assert.deepEqual(faults, []);
    await context.close();
  });
});

describe("bad input", () => {
  test("an empty prompt, 200 words, emoji and other scripts are drawn, with a note", async () => {
    const { page, context, faults } = await visit();
    for (const [prompt, note] of [
      ["", /empty/],
      ["butterfly ".repeat(200), /200 tokens and 30 fit/],
      ["🦋🦋 on ❄️", null],
      ["日本語の蝶", /never shown '日本語の蝶'/],
      ["<b>bold</b><script>alert(1)</script>", /'b'/],
    ]) {
      await draw(page, prompt);
      const notes = await page.textContent("#notes");
      if (note) assert.match(notes, note);
      assert.ok(notes.length < 500);
      assert.equal(await page.locator("#notes b, #caption b, script:not([src])").count(), 0);
    }
    assert.deepEqual(faults, []);
    await context.close();
  });

  test("a number that cannot be drawn with is refused by the form or in words", async () => {
    const { page, context } = await visit();
    await draw(page, "a fish");
    for (const [seed, pattern] of [
      ["-1", null],
      ["1.5", null],
      ["99999999999", null],
      ["", /Seed must be a whole number/],
    ]) {
      await page.fill("#seed", seed);
      await page.click("#go");
      if (pattern) assert.match(await said(page, pattern, "fault"), pattern);
      else assert.equal(await page.evaluate(() => document.getElementById("seed").validity.valid), false);
    }
    await draw(page, "a fish", 3);
    await context.close();
  });

  test("a broken, a foreign and an empty adapter are refused in words, and the page draws on", async () => {
    const { page, context } = await visit();
    await draw(page, "a fish");
    const before = await pixels(page);
    const whole = readFileSync(ADAPTER);
    for (const [name, buffer, pattern] of [
      [
        "broken.safetensors",
        whole.subarray(0, whole.length / 2),
        /The file broken\.safetensors cannot be used: .*outside the file/,
      ],
      [
        "letter.safetensors",
        Buffer.from("Dear reader, this is no adapter."),
        /letter\.safetensors cannot be used: .*not a safetensors/,
      ],
      ["empty.safetensors", Buffer.alloc(0), /too short/],
      ["butterfly.png", readFileSync(join(WEB, "butterfly.svg")), /not a safetensors/],
      ["model.safetensors", readFileSync(process.env.FOREIGN), /another model|no LoRA/],
    ]) {
      await page.setInputFiles("#adapter-file", { name, mimeType: "application/octet-stream", buffer });
      assert.match(await said(page, pattern, "fault"), pattern);
      assert.equal(await page.textContent("#adapter-name"), "");
    }
    await draw(page, "a fish");
    assert.equal(apart(await pixels(page), before), 0);
    await context.close();
  });

  test("a download that is cut is said in words; the next click goes on with what is there", async () => {
    const { page, context } = await visit();
    await page.route("**/unet.safetensors.gz*", async (route) => {
      const response = await route.fetch();
      await route.fulfill({ response, body: (await response.body()).subarray(0, 4_000_000) });
    });
    await page.click("#go");
    assert.match(await said(page, /could not be loaded/, "fault"), /unet\.safetensors\.gz/);
    await page.unroute("**/unet.safetensors.gz*");
    it.served.length = 0;
    await draw(page, "a fish");
    assert.ok(
      it.served.includes("/model/unet.safetensors.gz") && !it.served.includes("/model/text_encoder.safetensors.gz"),
    );
    await context.close();
  });

  test("no connection at all is said in words", async () => {
    const { page, context } = await visit();
    await context.setOffline(true);
    await page.click("#go");
    await said(page, /could not be loaded|has stopped/, "fault");
    await context.setOffline(false);
    await draw(page, "a fish");
    await context.close();
  });

  test("a tab without memory is said in words, and drawing is tried again", async () => {
    const { page, context } = await visit();
    await page.route("**/ort.wasm.bundle.min.js", async (route) =>
      route.fulfill({ contentType: "text/javascript", body: RUNTIME_WITHOUT_MEMORY }),
    );
    await page.click("#go");
    assert.match(await said(page, /too little memory/, "fault"), /close other tabs/);
    await page.unroute("**/ort.wasm.bundle.min.js");
    await draw(page, "a fish");
    await context.close();
  });

  test("a browser without WebAssembly SIMD is told so before anything is loaded", async () => {
    const { page, context } = await visit();
    await page.route("**/worker.js", async (route) => {
      const response = await route.fetch();
      await route.fulfill({ response, body: `WebAssembly.validate = () => false;\n${await response.text()}` });
    });
    it.served.length = 0;
    await page.click("#go");
    assert.match(await said(page, /SIMD/, "fault"), /Chrome, Edge, Firefox or Safari/);
    assert.deepEqual(
      it.served.filter((path) => path.endsWith(".gz")),
      [],
    );
    await context.close();
  });

  test("a page whose list of files is missing says so", async () => {
    const context = await it.browser.newContext();
    const page = await context.newPage();
    await page.route("**/manifest.json", (route) => route.fulfill({ status: 404 }));
    await page.goto(`${it.address}/`);
    assert.match(await said(page, /could not be loaded/, "fault"), /404/);
    await context.close();
  });
});

describe("how it looks", () => {
  for (const width of [375, 1280]) {
    for (const colorScheme of ["light", "dark"]) {
      test(`at ${width} px, ${colorScheme}: nothing scrolls sideways`, async () => {
        const { page, context } = await visit({ width, colorScheme });
        await draw(page, "a photo of a red butterfly on snow");
        for (const name of ["guidance", "word", "look"]) {
          await page.click(`#${name}-experiment`);
          await said(page, /^Drawing/);
          await said(page, /^Drawn\.$/);
        }
        for (const summary of await page.locator("summary").all()) await summary.click();
        await page.waitForFunction(() =>
          [...document.querySelectorAll("details code")].every((code) => code.textContent),
        );
        assert.equal(await page.evaluate(() => document.documentElement.scrollWidth - innerWidth), 0);
        await page.screenshot({ path: join(OUT, `page-${width}-${colorScheme}.png`), fullPage: true });
        await context.close();
      });
    }
  }

  for (const width of [320, 640]) {
    test(`at ${width} px, as on a small phone and at twice the size, nothing scrolls sideways`, async () => {
      const { page, context } = await visit({ width });
      for (const summary of await page.locator("summary").all()) await summary.click();
      assert.equal(await page.evaluate(() => document.documentElement.scrollWidth - innerWidth), 0);
      await context.close();
    });
  }

  for (const colorScheme of ["light", "dark"]) {
    test(`text and what one can use stand out, ${colorScheme}`, async () => {
      const { page, context } = await visit({ colorScheme });
      const faint = await page.evaluate(() => {
        const channels = (colour) => colour.match(/[\d.]+/g).map(Number);
        const light = (colour) => {
          const [red, green, blue] = channels(colour).map((each) =>
            each / 255 <= 0.04045 ? each / 255 / 12.92 : ((each / 255 + 0.055) / 1.055) ** 2.4,
          );
          return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
        };
        const behind = (each) => {
          const { backgroundColor: colour } = getComputedStyle(each);
          return channels(colour)[3] === 0 ? behind(each.parentElement) : colour;
        };
        const contrast = (...colours) => {
          const [less, more] = colours.map(light).sort((one, other) => one - other);
          return (more + 0.05) / (less + 0.05);
        };
        const found = [];
        document.getElementById("fault").textContent = "For example.";
        document.getElementById("go").disabled = false;
        for (const each of document.querySelectorAll("body *:not(script, noscript)")) {
          const style = getComputedStyle(each);
          const words = [...each.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
          const edged = each.matches("button, input:not([type=range], [type=file]), #drop");
          const ratios = [
            [words, style.color, behind(each), 4.5],
            [edged, style.borderTopColor, behind(each.parentElement), 3],
            [each.matches("[type=range], progress"), style.accentColor, behind(each.parentElement), 3],
          ];
          for (const [applies, one, other, least] of ratios) {
            if (applies && contrast(one, other) < least)
              found.push(`${each.tagName} ${each.id} ${one} on ${other}: ${contrast(one, other)}`);
          }
        }
        return found;
      });
      assert.deepEqual(faint, []);
      await context.close();
    });
  }

  test("follows the theme that was chosen on the other pages", async () => {
    const { page, context } = await visit({ colorScheme: "light" });
    const background = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    assert.equal(await background(), "rgb(255, 255, 255)");
    await page.evaluate(() => localStorage.setItem("quarto-color-scheme", "alternate"));
    await page.reload();
    assert.equal(await background(), "rgb(34, 34, 34)");
    await context.close();
  });

  test("every control has a name, every picture words, and the keyboard reaches the drawing", async () => {
    const { page, context } = await visit();
    const nameless = await page.evaluate(() =>
      [...document.querySelectorAll("input, button, canvas, progress")]
        .filter(
          (each) =>
            !(
              each.labels?.length ||
              each.textContent.trim() ||
              each.getAttribute("aria-label") ||
              each.closest("[hidden]")
            ),
        )
        .map((each) => each.id),
    );
    assert.deepEqual(nameless, []);
    await page.focus("#prompt");
    await page.keyboard.press("Enter");
    await said(page, /^Drawn in/);
    await page.focus("#step");
    await page.keyboard.press("ArrowLeft");
    await said(page, /^Step 19 of 20/, "when");
    const wordless = await page.evaluate(
      () => [...document.querySelectorAll("canvas")].filter((each) => !each.getAttribute("aria-label")).length,
    );
    assert.equal(wordless, 0);
    await context.close();
  });
});

test("how long it takes, and how much comes over the wire", async (context) => {
  const before = it.sent();
  const { page, context: visitor } = await visit();
  const began = Date.now();
  await page.click("#go");
  await page.waitForFunction(() => document.getElementById("status").textContent === "Drawing …");
  const ready = Date.now() - began;
  await said(page, /^Drawn in/);
  const first = Date.now() - began;
  const times = [];
  for (let seed = 1; seed <= 5; seed++)
    times.push(Number((await draw(page, "a red butterfly on snow", seed)).match(/[\d.]+/)[0]));
  const measured = { ready: ready / 1000, first: first / 1000, picture: times.sort()[2] };
  measured.bytes = it.sent() - before;
  writeFileSync(join(OUT, "measured.json"), JSON.stringify(measured));
  context.diagnostic(JSON.stringify(measured));
  await visitor.close();
});
