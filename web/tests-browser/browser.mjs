// What the tests in a real browser share. WEB is a folder that `web/build.py` has laid out, OUT where pictures and
// screenshots go, CHROMIUM the browser.

import { mkdirSync, readFileSync } from "node:fs";
import { createServer } from "node:http";
import { extname, join } from "node:path";
import { after, before } from "node:test";
import { chromium } from "playwright-core";

export const { WEB, OUT, CHROMIUM = "/usr/bin/chromium" } = process.env;
const TYPES = {
  ".html": "text/html",
  ".js": "text/javascript",
  ".css": "text/css",
  ".json": "application/json",
  ".svg": "image/svg+xml",
}; // and no other: the page needs no server that knows more
const ROOM = { timeout: 120_000 };

/** A server of the page. Returns { address, served, sent, close }: every path that was asked for, and how many bytes
 * were sent.
 *
 * @param prefix the folder of the host in which the page lies
 * @param headers that are sent with every file  @param {(path, body) => body} content what is sent of a file
 */
export async function serve({ prefix = "", headers = {}, content = (path, body) => body } = {}) {
  const served = [];
  let sent = 0;
  const server = createServer((request, response) => {
    const { pathname } = new URL(request.url, "http://localhost");
    const path = pathname.slice(prefix.length);
    served.push(path);
    try {
      if (!pathname.startsWith(`${prefix}/`)) throw new Error("elsewhere");
      const body = content(path, readFileSync(join(WEB, path.endsWith("/") ? `${path}index.html` : path)));
      const type = TYPES[extname(path) || ".html"] ?? "application/octet-stream";
      response.writeHead(200, { "content-type": type, ...headers }).end(body);
      sent += Buffer.byteLength(body);
    } catch {
      response.writeHead(404).end();
    }
  });
  await new Promise((resolve) => server.listen(0, "localhost", resolve));
  const address = `http://localhost:${server.address().port}${prefix}`;
  return { address, served, sent: () => sent, close: () => server.close() };
}

/** A server and a browser for the tests of one file; ended after them. Returns an object that is filled before them. */
export function opened() {
  const it = {};
  before(async () => {
    mkdirSync(OUT, { recursive: true });
    Object.assign(it, await serve());
    it.browser = await chromium.launch({
      executablePath: CHROMIUM,
      args: [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--host-resolver-rules=MAP course.test 127.0.0.1", // a name without https: no secure context
      ],
    });
  });
  after(async () => {
    await it.browser?.close();
    it.close?.();
  });
  return it;
}

/** A visit in a browser of its own; what leaves the origin and what ends in an error is kept. */
export async function visit(it, { width = 1280, colorScheme = "light", context, query = "", address } = {}) {
  context ??= await it.browser.newContext({ viewport: { width, height: 900 }, colorScheme });
  const home = address ?? it.address;
  const page = await context.newPage();
  const faults = [];
  page.on("pageerror", (error) => faults.push(error.stack));
  page.on("request", (request) => request.url().startsWith(`${home}/`) || faults.push(`asked ${request.url()}`));
  await page.goto(`${home}/${query}`);
  await page.waitForSelector("html[data-ready]");
  return { page, context, faults };
}

/** Wait until the page has said something that matches, and return it. */
export async function said(page, pattern, where = "status") {
  await page.waitForFunction(
    ([id, source]) => new RegExp(source).test(document.getElementById(id).textContent),
    [where, pattern.source],
    ROOM,
  );
  return page.textContent(`#${where}`);
}

/** Type a prompt, and draw. */
export async function draw(page, prompt, seed = 0) {
  await page.fill("#prompt", prompt);
  await page.fill("#seed", `${seed}`);
  await page.evaluate(() => (document.getElementById("status").textContent = ""));
  await page.click("#go");
  return said(page, /^Drawn in/);
}

/** The pixels of a canvas. */
export const pixels = (page, id = "picture") =>
  page.evaluate((name) => {
    const canvas = document.getElementById(name);
    return Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
  }, id);

/** The mean difference of two pictures, from 0 to 255. */
export const apart = (one, other) => one.reduce((sum, each, i) => sum + Math.abs(each - other[i]), 0) / one.length;
