// The page in a real browser, on servers of every kind, and on none.

import assert from "node:assert/strict";
import { pathToFileURL } from "node:url";
import { test } from "node:test";
import { gunzipSync } from "node:zlib";
import { WEB, draw, opened, said, serve, visit } from "./browser.mjs";

const it = opened();
const STRICT = "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'";

test("below a path, with a strict policy, files unpacked on the way: it draws", async () => {
  const content = (path, body) => (path.endsWith(".gz") ? gunzipSync(body) : body);
  const headers = { "content-security-policy": STRICT };
  const host = await serve({ prefix: "/a/b/try", headers, content });
  const { page, context, faults } = await visit(it, { address: host.address });
  await draw(page, "a fish");
  for (const summary of await page.locator("summary").all()) await summary.click();
  await page.waitForFunction(() => [...document.querySelectorAll("details code")].every((code) => code.textContent));
  assert.deepEqual(faults, []);
  await context.close();
  host.close();
});

test("a policy that forbids WebAssembly is named", async () => {
  const host = await serve({ headers: { "content-security-policy": "default-src 'self'" } });
  const { page, context } = await visit(it, { address: host.address });
  await page.click("#go");
  assert.match(await said(page, /./, "fault"), /forbids WebAssembly/);
  await context.close();
  host.close();
});

test("without https there is no store and no fingerprint: it draws, and promises to keep nothing", async () => {
  const { page, context, faults } = await visit(it, { address: it.address.replace("localhost", "course.test") });
  assert.equal(await page.evaluate(() => isSecureContext), false);
  assert.match(await page.textContent("#size"), /MB are loaded\.$/);
  await draw(page, "a fish");
  assert.deepEqual(faults, []);
  await context.close();
});

test("opened as a file, it says what to do", async () => {
  const page = await it.browser.newPage();
  await page.goto(`${pathToFileURL(WEB)}/index.html`);
  assert.match(await said(page, /./, "fault"), /python -m http\.server/);
  assert.ok(await page.isDisabled("#go"));
  await page.close();
});

for (const [name, answer] of Object.entries({
  missing: { status: 404 },
  "of a syntax that the browser does not know": { contentType: "text/javascript", body: "let let = 1;" },
})) {
  test(`a module that is ${name} is said in words`, async () => {
    const page = await it.browser.newPage();
    await page.route("**/solver.js", (route) => route.fulfill(answer)); // the worker's
    await page.route("**/notes.js", (route) => route.fulfill(answer)); // the page's
    await page.goto(`${it.address}/`);
    await said(page, /could not be loaded, or this browser is too old/, "fault");
    await page.unroute("**/notes.js");
    await page.reload();
    await page.waitForSelector("html[data-ready]");
    await page.click("#go");
    await said(page, /The part of this page that draws has stopped/, "fault");
    await page.close();
  });
}

test("settings in the address that the form cannot hold are named, and the others taken", async () => {
  for (const [query, fault, field, value] of [
    ["?prompt=a%0Afish&seed=1e3&steps=50", /^$/, "seed", "1e3"],
    ["?seed=-1", /asks for seed=-1 \(here 0 to 4294967295/, "seed", "0"],
    ["?seed=9007199254740992&guidance=2", /seed=9007199254740992/, "guidance", "2"],
    ["?seed=", /seed= \(/, "seed", "0"],
    ["?steps=1000&guidance=7.3", /steps=1000 .* and guidance=7\.3 .*in steps of 0\.5/, "steps", "20"],
    ["?steps=many&other=1", /steps=many/, "steps", "20"],
  ]) {
    const { page, context } = await visit(it, { query });
    assert.match(await page.textContent("#fault"), fault, query);
    assert.equal(await page.inputValue(`#${field}`), value, query);
    await context.close();
  }
});
