/** The bundle of mini, and altered copies. */
import { createHash } from "node:crypto";
import { cp, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { canonicalWithoutDigest } from "../src/manifest_digest.js";

export const MINI = fileURLToPath(new URL("../../../models/mini/bundle", import.meta.url));

/**
 * A copy of mini's bundle with another manifest, and the digest that goes with it.
 *
 * @param {import("node:test").TestContext} test removes the copy at its end
 * @param {(manifest: any) => void} change
 */
export async function altered(test, change) {
  const folder = await mkdtemp(join(tmpdir(), "qrank-js-"));
  test.after(() => rm(folder, { recursive: true }));
  await cp(MINI, folder, { recursive: true });
  const path = join(folder, "qrank.json");
  const manifest = JSON.parse(await readFile(path, "utf8"));
  change(manifest);
  const text = JSON.stringify(manifest);
  manifest.digest = createHash("sha256").update(canonicalWithoutDigest(text)).digest("hex");
  await writeFile(path, JSON.stringify(manifest));
  return folder;
}
