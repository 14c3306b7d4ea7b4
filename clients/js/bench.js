/**
 * Pairs per second, in Node or in Chromium: node bench.js PAIRS.json [THREADS | browser]
 *
 * PAIRS.json is [[query, document], ...], scored by mini.
 */
import { readFile } from "node:fs/promises";
import { Reranker } from "qrank";
import { MINI } from "./test/bundles.js";
import { openPage } from "./test/chromium.js";

const [file, how = "1"] = process.argv.slice(2);
const pairs = JSON.parse(await readFile(file, "utf8"));

/** Runs in the page, too: takes everything it needs as arguments. */
async function measure([pairs, bundle, options], Class) {
  const { Reranker } = Class ? { Reranker: Class } : await import("qrank");
  const start = performance.now();
  const reranker = await Reranker.load(bundle, options);
  const loadMs = Math.round(performance.now() - start);
  await reranker.score(pairs.slice(0, 8));
  const rates = [];
  for (let run = 0; run < 3; run++) {
    const begun = performance.now();
    await reranker.score(pairs);
    rates.push((1000 * pairs.length) / (performance.now() - begun));
  }
  await reranker.close();
  return { loadMs, pairsPerSecond: rates.sort((a, b) => a - b)[1] };
}

if (how === "browser") {
  const { page, close } = await openPage(MINI);
  console.log(how, await page.evaluate(measure, [pairs, "bundle", {}]));
  await close();
} else {
  console.log(`Node, ${how} threads`, await measure([pairs, MINI, { threads: Number(how) }], Reranker));
}
