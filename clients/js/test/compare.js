/**
 * What tests/test_js.py compares with Python: a list of tasks as JSON on stdin, their results on
 * stdout.
 */
import { text } from "node:stream/consumers";
import { Reranker } from "qrank";
import { PairTokenizer } from "../src/pairs.js";
import { missing, openPage } from "./chromium.js";
import { normalizer } from "../src/tokenizer/normalizers.js";
import { preTokenizer } from "../src/tokenizer/pre_tokenizers.js";

const tasks = {
  normalized: ({ configs, text }) => configs.map((config) => normalizer(config)(text)),
  words: ({ configs, text }) =>
    configs.map((config) => preTokenizer(config)([{ text, start: 0, added: 0 }]).map((piece) => piece.text)),
  inputs: ({ tokenizer, family, pairs, maxLength }) => {
    const warnings = [];
    const warn = (message) => warnings.push(message);
    return { inputs: new PairTokenizer(tokenizer, family, { maxLength, warn }).inputs(pairs), warnings };
  },
  logits: async ({ bundle, pairs }) => {
    const reranker = await Reranker.load(bundle, { threads: 1, warn: () => {} });
    const logits = await reranker.score(pairs, { raw: true });
    const scores = await reranker.score(pairs.slice(0, 20));
    await reranker.close();
    return { logits: Array.from(logits), scores: Array.from(scores) };
  },
  /** Null if there is no browser. */
  browser: async ({ bundle, pairs }) => {
    if (missing) return null;
    const { page, close } = await openPage(bundle);
    const logits = await page.evaluate(async (texts) => {
      const { Reranker } = await import("qrank");
      const reranker = await Reranker.load("bundle", { warn: () => {} });
      const found = Array.from(await reranker.score(texts, { raw: true }));
      await reranker.close();
      return found;
    }, pairs);
    await close();
    return logits;
  },
};

const asked = JSON.parse(await text(process.stdin));
const answers = [];
for (const task of asked) answers.push(await tasks[task.task](task));
console.log(JSON.stringify(answers));
