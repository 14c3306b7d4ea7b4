/** Headless Chromium gives the same ids and scores as Node, without a bundler. */
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";
import { Reranker } from "qrank";
import { PairTokenizer } from "../src/pairs.js";
import { MINI } from "./bundles.js";
import { missing, openPage } from "./chromium.js";

const TEXTS = [
  "which planet is red?",
  "mars is the red planet",
  "",
  "  \t\n ",
  "[SEP] [CLS] </s> <s>",
  "İstanbul ΣΊΣΥΦΟΣ straße cafe\u0301 ﬁne ½ ①",
  "日本語の文 火星 한국어 カ\u3099 𠀀",
  "שָׁלוֹם مرحبا \u202eabc\u202c",
  "👩‍🚀👨‍👩‍👧‍👦 🇩🇪 ❤️",
  "\u0000\u0007a\u00adb\ufeffc\ud800d",
  "x".repeat(5000),
  "word ".repeat(2000),
];
const PAIRS = TEXTS.flatMap((text) => [[TEXTS[0], text], [text, TEXTS[1]]]);

/**
 * Of a score. WebAssembly's kernels round otherwise in the last bit, which moves some activation to
 * the next of its 256 steps; tests/test_js.py compares fp32, which has no steps, to 1e-4.
 */
const ROUNDING = 0.02;

test("ids are Node's, and scores but for int8's rounding", { skip: missing, timeout: 120_000 }, async (t) => {
  const { page, base, errors, close } = await openPage(MINI);
  t.after(close);
  const found = await page.evaluate(async (pairs) => {
    const { Reranker } = await import("qrank");
    const reranker = await Reranker.load("bundle", { warn: () => {} });
    const inputs = reranker._pairs.inputs(pairs);
    const scores = Array.from(await reranker.score(pairs));
    await reranker.close();
    const missing = await Reranker.load("none").catch((error) => `${error.name}: ${error.message}`);
    return { inputs, scores, missing };
  }, PAIRS);
  assert.deepEqual(errors, []);
  const { family } = JSON.parse(await readFile(`${MINI}/qrank.json`, "utf8"));
  const tokenizer = new PairTokenizer(await readFile(`${MINI}/tokenizer.json`, "utf8"), family, { warn: () => {} });
  assert.deepEqual(found.inputs, tokenizer.inputs(PAIRS));
  const reranker = await Reranker.load(MINI, { threads: 1, warn: () => {} });
  const expected = await reranker.score(PAIRS);
  await reranker.close();
  const largest = Math.max(...expected.map((score, i) => Math.abs(score - found.scores[i])));
  t.diagnostic(`largest difference of a score: ${largest}`);
  assert.ok(largest <= ROUNDING, `scores differ by ${largest}`);
  assert.equal(found.missing, `ModelNotFoundError: ${base}/none/qrank.json cannot be fetched: status 404`);
});
