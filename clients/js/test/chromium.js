/** A page in headless Chromium that can import the package, without a bundler. */
import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join } from "node:path";
import { chromium } from "playwright-core";

const CHROMIUM = process.env.CHROMIUM ?? "/usr/bin/chromium";

/** Why there is no browser to test with; false if there is one. */
export const missing = existsSync(CHROMIUM) ? false : `no ${CHROMIUM}`;

const ROOT = new URL("../../../", import.meta.url);
const TYPES = { ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm" };
const FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];

const PAGE = `<!doctype html><link rel="icon" href="data:,"><script type="importmap">{"imports": {
  "qrank": "/clients/js/src/browser.js",
  "onnxruntime-web/wasm": "/clients/js/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs"
}}</script>`;

/**
 * The page; the address it is served from, as is the whole repository; its uncaught errors.
 *
 * @param {string} bundle a folder, served as /bundle
 */
export async function openPage(bundle) {
  const server = createServer(async (request, response) => {
    const { pathname } = new URL(request.url, "http://localhost");
    const file = pathname.startsWith("/bundle/") ? join(bundle, pathname.slice(8)) : new URL(`.${pathname}`, ROOT);
    const content = pathname === "/" ? PAGE : await readFile(file).catch(() => undefined);
    const type = pathname === "/" ? "text/html" : (TYPES[extname(pathname)] ?? "application/octet-stream");
    response.writeHead(content === undefined ? 404 : 200, { "content-type": type }).end(content);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  const base = `http://127.0.0.1:${server.address().port}`;
  const browser = await chromium.launch({ executablePath: CHROMIUM, args: FLAGS });
  const page = await browser.newPage();
  const errors = [];
  page.on("pageerror", (error) => errors.push(String(error)));
  await page.goto(base);
  const close = async () => {
    await browser.close();
    server.closeAllConnections();
    server.close();
  };
  return { page, base, errors, close };
}
