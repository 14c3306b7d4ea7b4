import assert from "node:assert/strict";
import { appendFile, readFile, rm, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { join } from "node:path";
import { after, before, test } from "node:test";
import * as qrank from "qrank";
import { MINI, altered } from "./bundles.js";

const { BundleError, FamilyError, InputError, ModelNotFoundError, Reranker, TargetError } = qrank;
const QUERY = "which planet is red?";
const DOCUMENTS = ["how to bake bread", "mars is the red planet", "", "mars is the red planet"];

let reranker;
before(async () => (reranker = await Reranker.load(MINI, { threads: 1 })));
after(() => reranker.close());

test("documents come most relevant first, and ties keep their order", async () => {
  const ranked = await reranker.rank(QUERY, DOCUMENTS);
  assert.deepEqual(ranked.map((each) => each.index).slice(0, 2), [1, 3]);
  assert.equal(ranked.length, 4);
  for (const { score, logit } of ranked) assert.ok(Math.abs(score - 1 / (1 + Math.exp(-logit))) < 1e-12);
  assert.deepEqual(await reranker.rank(QUERY, DOCUMENTS, { topK: 2 }), ranked.slice(0, 2));
  const [first] = await reranker.rank(QUERY, DOCUMENTS, { topK: 1, returnDocuments: true });
  assert.equal(first.document, DOCUMENTS[1]);
  assert.deepEqual(await reranker.rank(QUERY, []), []);
});

test("scores are in the caller's order, for pairs and for a query with documents", async () => {
  const scores = await reranker.score(QUERY, DOCUMENTS);
  assert.ok(scores instanceof Float64Array);
  assert.deepEqual(await reranker.score(DOCUMENTS.map((document) => [QUERY, document])), scores);
  const logits = await reranker.score(QUERY, new Set(DOCUMENTS), { raw: true });
  assert.ok(logits instanceof Float32Array && logits.length === 3);
  assert.ok(scores[1] > 0.5 && scores[0] < 0.5);
});

test("calls may overlap", async () => {
  const alone = await reranker.score(QUERY, DOCUMENTS);
  const [first, second] = await Promise.all([reranker.score(QUERY, DOCUMENTS), reranker.score(QUERY, DOCUMENTS)]);
  assert.deepEqual(first, alone);
  assert.deepEqual(second, alone);
});

test("a long document is cut, and a long query is cut with a warning", async (t) => {
  const warnings = [];
  const short = await Reranker.load(MINI, { threads: 1, maxLength: 24, checkFiles: false, checkProbes: false, warn: (m) => warnings.push(m) });
  t.after(() => short.close());
  const ranked = await short.rank(QUERY, ["red ".repeat(100), "red"]);
  assert.deepEqual(ranked.map((each) => each.truncated).sort(), [false, true]);
  assert.deepEqual(warnings, []);
  await short.rank("red ".repeat(100), ["red"]);
  assert.deepEqual(warnings, [
    "the query has 100 tokens, and query and document together may have 21: only its first 15 are read",
  ]);
});

test("wrong arguments are named", async () => {
  const cases = [
    [() => reranker.rank(QUERY, "mars"), "documents is one string; give an array of strings"],
    [() => reranker.rank(QUERY, ["mars", 5]), "document 1 is 5, not a string"],
    [() => reranker.rank(undefined, ["mars"]), "query is undefined, not a string"],
    [() => reranker.rank(QUERY, new Map([["a", "mars"]])), "documents is a Map; give an array of strings, such as its values"],
    [() => reranker.rank(QUERY, ["mars"], { topK: 1.5 }), "topK is 1.5; give a whole number, 0 or more"],
    [() => reranker.rank(QUERY, ["mars"], { top_k: 1 }), "rank got top_k; its options are: topK, returnDocuments"],
    [() => reranker.score([["mars"]]), 'pair 0 is no [query, document] pair, but ["mars"]'],
    [() => reranker.score(7), "pairs is 7; give an array of [query, document] pairs"],
    [() => Reranker.load(MINI, { threads: 0 }), "threads is 0; give a whole number, 1 or more"],
    [() => Reranker.load(MINI, { maxLength: 4 }), "maxLength is 4; this model reads 5 to 512 tokens"],
    [() => Reranker.load(""), "the bundle is ; give its folder or its URL"],
  ];
  for (const [call, message] of cases) {
    await assert.rejects(async () => call(), (error) => error instanceof InputError && error.message === message, message);
  }
});

test("a closed reranker says so", async () => {
  const closed = await Reranker.load(MINI, { threads: 1, checkProbes: false });
  await closed.close();
  await closed.close();
  await assert.rejects(closed.rank(QUERY, DOCUMENTS), InputError);
});

test("a place without a bundle, and a bundle without a file", async (t) => {
  await assert.rejects(Reranker.load("/nowhere"), (error) =>
    error instanceof ModelNotFoundError && error.message === "/nowhere is no bundle: it holds no qrank.json");
  const folder = await altered(t, () => {});
  await rm(join(folder, "tokenizer.json"));
  await assert.rejects(Reranker.load(folder), BundleError);
});

test("a damaged file is refused, unless its check is switched off", async (t) => {
  const folder = await altered(t, () => {});
  const path = join(folder, "tokenizer.json");
  const content = await readFile(path, "utf8");
  await writeFile(path, content.replace('"[UNK]"', '"[UNX]"'));
  await assert.rejects(Reranker.load(folder), (error) => error instanceof BundleError && /tokenizer.json is damaged/.test(error.message));
  await writeFile(path, content);
  await appendFile(path, "\n");
  await assert.rejects(Reranker.load(folder), (error) => error instanceof BundleError && /330005 bytes, 330004 expected/.test(error.message));
  await (await Reranker.load(folder, { checkFiles: false, threads: 1 })).close();
});

test("a changed manifest is refused", async (t) => {
  const folder = await altered(t, () => {});
  const path = join(folder, "qrank.json");
  await writeFile(path, (await readFile(path, "utf8")).replace('"max_length":512', '"max_length":511'));
  await assert.rejects(Reranker.load(folder), (error) => error instanceof BundleError && /its own digest/.test(error.message));
  const other = await altered(t, (manifest) => (manifest.schema = 3));
  await assert.rejects(Reranker.load(other), (error) => error instanceof BundleError && /schema version 3/.test(error.message));
  const outside = await altered(t, (manifest) => (manifest.files["../x"] = manifest.files["tokenizer.json"]));
  await assert.rejects(Reranker.load(outside), (error) => error instanceof BundleError && /no path within a bundle/.test(error.message));
});

test("a variant that does not give the original's logits is refused, unless its check is switched off", async (t) => {
  const folder = await altered(t, ({ probes }) => (probes.logits = probes.logits.map((logit) => -logit)));
  await assert.rejects(Reranker.load(folder), (error) =>
    error instanceof TargetError && /onnx-int8 computes wrongly on this machine \(onnxruntime-node/.test(error.message));
  await (await Reranker.load(folder, { checkProbes: false })).close();
});

test("models and variants that this package does not run are refused", async (t) => {
  const causal = await altered(t, ({ family }) => (family.pooling = "last"));
  await assert.rejects(Reranker.load(causal), (error) => error instanceof FamilyError && /causal model/.test(error.message));
  await assert.rejects(Reranker.load(MINI, { variant: "onnx-fp32" }), (error) =>
    error instanceof TargetError && error.message.endsWith("no ONNX variant onnx-fp32; its variants are: onnx-int8, openvino-int8"));
  const openvino = await altered(t, ({ variants }) => (variants["onnx-int8"].format = "openvino"));
  await assert.rejects(Reranker.load(openvino), (error) => error instanceof TargetError && /--to onnx/.test(error.message));
});

test("a bundle is loaded by its URL", async (t) => {
  const server = createServer(async (request, response) => {
    const content = await readFile(join(MINI, request.url.slice("/mini".length))).catch(() => undefined);
    response.writeHead(content ? 200 : 404).end(content);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => server.close());
  const base = `http://127.0.0.1:${server.address().port}`;
  const remote = await Reranker.load(`${base}/mini`, { threads: 1 });
  assert.deepEqual(await remote.score(QUERY, DOCUMENTS), await reranker.score(QUERY, DOCUMENTS));
  await remote.close();
  await assert.rejects(Reranker.load(`${base}/other`), (error) =>
    error instanceof ModelNotFoundError && error.message === `${base}/other/qrank.json cannot be fetched: status 404`);
});
