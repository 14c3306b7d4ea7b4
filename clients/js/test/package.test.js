import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";
import * as node from "qrank";
import * as browser from "../src/browser.js";

const read = (path) => readFile(new URL(path, import.meta.url), "utf8");

test("Node, browsers and index.d.ts have the same names", async () => {
  const declared = [...(await read("../index.d.ts")).matchAll(/^export class (\w+)/gm)].map((found) => found[1]);
  assert.deepEqual(Object.keys(node).sort(), declared.sort());
  assert.deepEqual(Object.keys(browser).sort(), declared);
});

test("the version is the Python package's", async () => {
  const python = /^version = "(.*)"$/m.exec(await read("../../../pyproject.toml"))[1];
  assert.equal(JSON.parse(await read("../package.json")).version, python);
});

test("package-lock.json names no registry", async () => {
  assert.doesNotMatch(await read("../package-lock.json"), /"resolved"/);
});
