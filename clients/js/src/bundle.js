import { BundleError, FamilyError, TargetError } from "./errors.js";
import { canonicalWithoutDigest } from "./manifest_digest.js";

/**
 * How a model is read.
 *
 * @typedef {object} Family
 * @property {string} name
 * @property {(number | string)[]} template token ids, and texts with slots
 * @property {number[] | null} segments token type of each template item
 * @property {number} max_length most tokens of a pair, special tokens included
 * @property {string} pooling
 * @property {"identity" | "sigmoid"} activation turns logits into scores
 * @property {number} temperature divides the logits before
 * @property {string} instruction for the slot `{instruction}`; "" if there is none
 */

/** @typedef {{ sha256: string, bytes: number }} FileRecord */

/**
 * @typedef {object} Variant
 * @property {string} format
 * @property {string} precision
 * @property {Record<string, FileRecord>} files path in the bundle -> its record
 */

/**
 * @typedef {object} Probes
 * @property {number[]} logits of the fp32 original
 * @property {number[][]} sequences token ids
 * @property {number[][] | null} segments token types
 */

/**
 * @typedef {object} Manifest
 * @property {string} name
 * @property {Family} family
 * @property {Record<string, FileRecord>} files
 * @property {Record<string, Variant>} variants
 * @property {Probes} probes
 */

/**
 * Where a bundle's files come from. `node.js` and `browser.js` have one each.
 *
 * @typedef {object} Files
 * @property {string} place the folder or address, for messages
 * @property {(name: string) => Promise<string>} text content of a file
 * @property {(name: string) => Promise<FileRecord>} record sha256 and size of a file
 * @property {(names: string[]) => Promise<{ graph: string | Uint8Array, data: { path: string, data: Uint8Array }[] }>} graph
 *   what onnxruntime reads a variant from: a path, or bytes and those of further files
 */

export const MANIFEST = "qrank.json";
export const TOKENIZER = "tokenizer.json";

const SCHEMA = 2;
const MIN_PROBES = 32;
const ADVICE = "convert the model again, or copy the bundle again";

/** Precisions of ONNX variants, the fastest on a CPU first. */
const BY_SPEED = ["int8", "fp32", "int4", "fp16", "bf16"];

/**
 * Read a bundle's manifest, and check that this package can run the model.
 *
 * @param {Files} files
 * @returns {Promise<Manifest>}
 * @throws {BundleError} it is damaged, or of another schema version
 * @throws {FamilyError} the model is of another kind
 */
export async function readManifest(files) {
  const text = await files.text(MANIFEST);
  const where = `${files.place}/${MANIFEST}`;
  let content;
  try {
    content = JSON.parse(text);
  } catch (error) {
    throw new BundleError(`${where} cannot be read: ${/** @type {Error} */ (error).message}; ${ADVICE}`, { cause: error });
  }
  if (content?.schema !== SCHEMA) {
    throw new BundleError(
      `${where} has schema version ${content?.schema}; this qrank reads ${SCHEMA}: convert the model ` +
        "again, or install the qrank that wrote it",
    );
  }
  const found = await sha256(new TextEncoder().encode(canonicalWithoutDigest(text)));
  if (found !== content.digest) {
    throw new BundleError(`${where} does not match its own digest: it was changed; ${ADVICE}`);
  }
  const damage = damageOf(content);
  if (damage) throw new BundleError(`${where} is damaged (${damage}); ${ADVICE}`);
  const { name, family } = content;
  if (family.pooling === "last") {
    throw new FamilyError(
      `${name} is a causal model (family ${family.name}), which this package does not run: its prompt's ` +
        "keys and values are shared by documents. Score with the Python package, or through qrank serve",
    );
  }
  return content;
}

/**
 * The variant to run.
 *
 * @param {Manifest} manifest
 * @param {string} [name] `onnx` or a variant such as `onnx-int8`; undefined: the fastest on a CPU
 * @returns {[name: string, variant: Variant]}
 * @throws {TargetError} there is none
 */
export function chooseVariant(manifest, name) {
  const every = Object.entries(manifest.variants);
  const speed = (/** @type {[string, Variant]} */ [, variant]) => BY_SPEED.indexOf(variant.precision);
  const fitting = every
    .filter(([, variant]) => variant.format === "onnx" && BY_SPEED.includes(variant.precision))
    .filter(([own]) => name === undefined || name === "onnx" || name === own)
    .sort((a, b) => speed(a) - speed(b));
  if (fitting.length) return fitting[0];
  const names = every.map(([own]) => own).join(", ") || "none";
  throw new TargetError(
    name === undefined
      ? `the bundle ${manifest.name} has the variants ${names}, and this package runs ONNX: ` +
          "convert the model with --to onnx"
      : `the bundle ${manifest.name} has no ONNX variant ${name}; its variants are: ${names}`,
  );
}

/**
 * Compare files with the manifest's records.
 *
 * @param {Files} files
 * @param {Record<string, FileRecord>} records
 * @throws {BundleError} a file is missing or damaged
 */
export async function checkFiles(files, records) {
  for (const [name, expected] of Object.entries(records)) {
    const found = await files.record(name);
    const where = `${files.place}/${name}`;
    if (found.bytes !== expected.bytes) {
      throw new BundleError(`${where} has ${found.bytes} bytes, ${expected.bytes} expected; ${ADVICE}`);
    }
    if (found.sha256 !== expected.sha256) {
      throw new BundleError(
        `${where} is damaged: its sha256 is ${found.sha256.slice(0, 12)}…, ` +
          `${expected.sha256.slice(0, 12)}… expected; ${ADVICE}`,
      );
    }
  }
}

/**
 * @param {Uint8Array} bytes
 * @returns {Promise<string>} in hexadecimal
 */
export async function sha256(bytes) {
  const { subtle } = globalThis.crypto;
  if (!subtle) {
    throw new TargetError(
      "this page cannot compute sha256, because it is not a secure context: serve it by https or from localhost",
    );
  }
  const digest = new Uint8Array(await subtle.digest("SHA-256", /** @type {BufferSource} */ (bytes)));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * @param {any} content of a manifest with the right digest: it may come from anybody
 * @returns {string} what no bundle may have; "" if there is nothing
 */
function damageOf({ name, family, files, variants, probes }) {
  if (typeof name !== "string" || !family || !files || !variants || !probes) return "a key is missing";
  if (!["identity", "sigmoid"].includes(family.activation)) return `the activation is ${family.activation}`;
  if (!(family.temperature > 0 && family.max_length >= 1)) return "temperature and max_length must be above 0";
  const slots = family.template.filter((/** @type {any} */ item) => String(item).includes("{document}"));
  if (slots.length !== 1) return "the template needs one {document}";
  if (!files[TOKENIZER]) return `files names no ${TOKENIZER}`;
  const named = [files, ...Object.values(variants).map((/** @type {any} */ variant) => variant.files)].flatMap(Object.keys);
  const outside = named.find((path) => !isPlain(path));
  if (outside !== undefined) return `it names ${outside}, which is no path within a bundle`;
  const { sequences, segments, logits } = probes;
  const count = sequences.length;
  if (count < MIN_PROBES || logits.length !== count) {
    return `there are ${count} probes with ${logits.length} logits; as many of both were expected, ${MIN_PROBES} or more`;
  }
  if (segments?.some((/** @type {number[]} */ types, /** @type {number} */ i) => types.length !== sequences[i].length)) {
    return "the probes' segments are not as long as their sequences";
  }
  if (!logits.every(Number.isFinite) || !sequences.every((/** @type {number[]} */ ids) => ids.length)) {
    return "a probe is empty, or its logit is not finite";
  }
  return "";
}

/** @param {string} path */
function isPlain(path) {
  return path.split("/").every((part) => !["", ".", ".."].includes(part) && !/[\\:\0*?[\]#%]/.test(part));
}
