// The page in a real browser, used in haste: what the reader wishes last is what they get.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { describe, test } from "node:test";
import { apart, draw, opened, pixels, said, visit } from "./browser.mjs";

const { ADAPTER } = process.env;
const SUBJECT = "a photo of a sks butterfly on snow";
const it = opened();
const idle = (page) => page.waitForFunction(() => !document.querySelector("[aria-busy]"));
const figures = (page, name) => page.locator(`#${name}-experiment-pictures figure`).count();

/** Press buttons, one right after the other. */
const press = (page, ...names) =>
  page.evaluate((ids) => ids.forEach((id) => document.getElementById(id).click()), names);

describe("in haste", () => {
  test("Draw pressed while the model is loading, and changed meanwhile, draws once, and the last", async () => {
    const { page, context, faults } = await visit(it);
    await press(page, "go", "go", "guidance-experiment", "go");
    await page.fill("#prompt", "a photo of a green fish on sea");
    await said(page, /^Drawn in/);
    assert.match(await page.textContent("#caption"), /green fish on sea/);
    assert.equal(await figures(page, "guidance"), 0);
    assert.equal(await page.locator("#guess-row figure").count(), 8);
    assert.deepEqual(faults, []);
    await context.close();
  });

  test("Draw ends an experiment, which then claims nothing", async () => {
    const { page, context } = await visit(it);
    await draw(page, "a butterfly");
    await press(page, "guidance-experiment");
    await page.waitForFunction(() => document.querySelector("#guidance-experiment-pictures figure"));
    await page.evaluate(() => {
      globalThis.told = [];
      const status = document.getElementById("status");
      new MutationObserver(() => told.push(status.textContent)).observe(status, { childList: true });
    });
    await draw(page, "a photo of a yellow beetle on sand");
    await new Promise((resolve) => setTimeout(resolve, 500));
    const told = (await page.evaluate(() => globalThis.told)).filter((each) => each);
    assert.deepEqual(
      told.map((each) => each.slice(0, 8)),
      ["Drawing ", "Drawn in"],
    );
    assert.ok((await figures(page, "guidance")) < 6);
    await context.close();
  });

  test("an experiment pressed again begins anew, each picture once", async () => {
    const { page, context } = await visit(it);
    await page.locator("#steps").fill("2");
    await draw(page, "a butterfly");
    for (let i = 0; i < 4; i++) {
      await press(page, "guidance-experiment", "guidance-experiment");
      await page.waitForFunction(() => document.querySelector("#guidance-experiment-pictures figure"));
    }
    await said(page, /^Drawn\.$/);
    const captions = await page.locator("#guidance-experiment-pictures figcaption").allTextContents();
    assert.deepEqual(
      captions,
      [1, 2, 3, 5, 7.5, 10].map((each) => `guidance ${each}`),
    );
    await context.close();
  });

  test("an answer that comes late does not displace a newer wish", async () => {
    const { page, context } = await visit(it);
    await page.locator("#steps").fill("2");
    await draw(page, "a butterfly");
    // The reader presses Draw in the moment in which an experiment's picture arrives.
    await page.evaluate(() => {
      const list = document.getElementById("guidance-experiment-pictures");
      new MutationObserver((_, observer) => {
        observer.disconnect();
        document.getElementById("prompt").value = "a photo of a blue fish on sea";
        document.getElementById("go").click();
      }).observe(list, { childList: true });
      document.getElementById("guidance-experiment").click();
    });
    await page.waitForFunction(() =>
      /blue fish on sea”, seed 0, guidance 5, 2 steps$/.test(document.getElementById("caption").textContent),
    );
    assert.match(await said(page, /^Drawn/), /^Drawn in/);
    await context.close();
  });

  test("a drawing that an experiment has ended says what is to be seen of it", async () => {
    const { page, context } = await visit(it);
    await draw(page, "a butterfly");
    await page.locator("#steps").fill("50");
    await page.fill("#prompt", "a red fish on sea");
    await press(page, "go");
    await page.waitForFunction(() => document.querySelectorAll("#guess-row figure").length === 2);
    await press(page, "look-experiment");
    await said(page, /^Drawn\.$/);
    assert.match(await page.textContent("#caption"), /red fish.*: the guess at step \d+ of 50$/);
    assert.equal(await page.isVisible("#scrub"), false);
    await idle(page);
    await context.close();
  });

  test("two adapters at once, and the strength while they are read: the last file, the last strength", async () => {
    const { page, context } = await visit(it);
    await draw(page, SUBJECT, 1);
    const bytes = readFileSync(ADAPTER).toString("base64");
    await page.evaluate((text) => {
      const content = Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
      const [first, second] = ["first", "second"].map((name) => new File([content], `${name}.safetensors`));
      const read = first.arrayBuffer.bind(first);
      first.arrayBuffer = () => new Promise((resolve) => setTimeout(() => resolve(read()), 500)); // a slow disk
      for (const file of [first, second]) {
        const transfer = new DataTransfer();
        transfer.items.add(file);
        const event = new Event("drop", { cancelable: true });
        Object.defineProperty(event, "dataTransfer", { value: { files: [file] } });
        document.getElementById("drop").dispatchEvent(event);
      }
      document.getElementById("strength").value = "0";
      document.getElementById("strength").dispatchEvent(new Event("change"));
    }, bytes);
    await said(page, /second\.safetensors/, "adapter-name");
    await idle(page);
    await draw(page, SUBJECT, 1);
    const without = await pixels(page);
    await press(page, "adapter-off");
    await page.waitForFunction(() => document.getElementById("adapter-off").hidden);
    await draw(page, SUBJECT, 1);
    assert.ok(apart(await pixels(page), without) < 0.01, "strength 0 was not what was drawn with");
    await context.close();
  });

  test("a bad file during an experiment is refused in words that stay, and the experiment goes on", async () => {
    const { page, context } = await visit(it);
    await page.locator("#steps").fill("4");
    await draw(page, "a butterfly");
    await press(page, "guidance-experiment");
    await page.setInputFiles("#adapter-file", {
      name: "a.txt",
      mimeType: "text/plain",
      buffer: Buffer.from("no adapter"),
    });
    await said(page, /^Drawn\.$/);
    assert.equal(await figures(page, "guidance"), 6);
    assert.match(await page.textContent("#fault"), /a\.txt cannot be used/);
    assert.equal(await page.inputValue("#adapter-file"), "", "the same file, mended, can be chosen again");
    await context.close();
  });

  test("a file of gigabytes, and one that cannot be read, are refused before they fill the memory", async () => {
    const { page, context } = await visit(it);
    const drop = (properties) =>
      page.evaluate((given) => {
        const file = Object.assign(new File([], "large.safetensors"), {
          arrayBuffer: () => Promise.reject(new Error("gone")),
        });
        for (const [name, value] of Object.entries(given)) Object.defineProperty(file, name, { value });
        const event = new Event("drop", { cancelable: true });
        Object.defineProperty(event, "dataTransfer", { value: { files: [file] } });
        document.getElementById("drop").dispatchEvent(event);
      }, properties);
    await drop({ size: 2 ** 31 });
    await said(page, /large\.safetensors cannot be used: it has 2147 MB/, "fault");
    await drop({});
    await said(page, /large\.safetensors cannot be used: the browser cannot read it/, "fault");
    await context.close();
  });
});

describe("a worker that ends", () => {
  test("tells everything that waits, drops the adapter in words, and the next click loads another", async () => {
    const { page, context } = await visit(it);
    let runs = 0;
    await page.route("**/model.js", async (route) => {
      const response = await route.fetch();
      const text = await response.text();
      const ended = "if (globalThis.runs++ > 60) throw 5242880;"; // as WebAssembly throws: a bare number
      const body = text.replace(
        "return await this.session.run(inputs);",
        `${ended} return await this.session.run(inputs);`,
      );
      await route.fulfill({ response, body: runs++ ? text : `globalThis.runs = 0;\n${body}` });
    });
    await page.locator("#steps").fill("4");
    await draw(page, SUBJECT);
    await page.setInputFiles("#adapter-file", ADAPTER);
    await said(page, /^Drawing with/, "adapter-name");
    await page.locator("#steps").fill("50");
    await press(page, "go", "guidance-experiment", "look-experiment");
    assert.match(await said(page, /./, "fault"), /Something on this page went wrong: 5242880\. Try again/);
    assert.match(await said(page, /went with the model/, "adapter-name"), /drop it once more/);
    await idle(page);
    assert.equal(await page.isVisible("#scrub"), false);
    await page.locator("#steps").fill("4");
    await draw(page, "a fish");
    await context.close();
  });
});

test("two tabs load at once, and a reload in the middle of the download does no harm", async () => {
  const { page, context } = await visit(it);
  await press(page, "go");
  await page.waitForFunction(() => document.getElementById("bar").value > 0);
  await page.reload();
  await page.waitForSelector("html[data-ready]");
  const other = await visit(it, { context });
  await Promise.all([draw(page, "a fish"), draw(other.page, "a fish")]);
  assert.equal(apart(await pixels(page), await pixels(other.page)), 0);
  await other.page.reload();
  await other.page.waitForSelector("html[data-ready]");
  assert.match(await other.page.textContent("#size"), /already, from an earlier visit/);
  await context.close();
});
