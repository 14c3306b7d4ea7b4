import { cutPadded, padded } from "./batches.js";
import { TOKENIZER, checkFiles, chooseVariant, readManifest } from "./bundle.js";
import { FamilyError, InputError, TargetError } from "./errors.js";
import { PairTokenizer } from "./pairs.js";
import { prove } from "./proof.js";

/** @typedef {import("./bundle.js").Files} Files */
/** @typedef {import("./bundle.js").Manifest} Manifest */
/** @typedef {import("./pairs.js").Input} Input */

/**
 * What differs between Node and browsers.
 *
 * @typedef {object} Platform
 * @property {(source: any) => Files} files
 * @property {() => Promise<any>} runtime imports onnxruntime
 * @property {string} runtimeName
 * @property {(runtime: any, threads: number | undefined) => object} sessionOptions
 */

/** Padded tokens of a batch: as many as in Python on a CPU, where most documents are alone. */
const BATCH_TOKENS = 160;

/** Pairs whose token ids are held at once, sorted by length: memory stays flat. */
const SCORED_AT_ONCE = 4096;

const KNOWN_INPUTS = ["input_ids", "attention_mask", "token_type_ids"];

const OPTIONS = ["variant", "threads", "maxLength", "maxBatchTokens", "checkFiles", "checkProbes", "runtime", "warn"];

/** Scores (query, document) pairs with a bundle; see index.d.ts for every argument. */
export class Reranker {
  /** @type {Platform} */
  static platform;

  /**
   * @param {any} source
   * @param {any} [options]
   * @returns {Promise<any>}
   */
  static async load(source, options = {}) {
    known(options, OPTIONS, "Reranker.load");
    const { threads, maxLength, maxBatchTokens = BATCH_TOKENS, warn = console.warn } = options;
    whole("threads", threads, 1);
    whole("maxBatchTokens", maxBatchTokens, 1);
    const { platform } = this;
    const files = platform.files(source);
    const manifest = await readManifest(files);
    const [name, variant] = chooseVariant(manifest, options.variant);
    if (options.checkFiles ?? true) await checkFiles(files, { ...manifest.files, ...variant.files });
    const pairs = new PairTokenizer(await files.text(TOKENIZER), manifest.family, { maxLength, warn });
    const runtime = options.runtime ?? (await platform.runtime());
    const { graph, data } = await files.graph(Object.keys(variant.files));
    let session;
    try {
      const settings = { ...platform.sessionOptions(runtime, threads), externalData: data };
      session = await runtime.InferenceSession.create(graph, settings);
    } catch (error) {
      throw new TargetError(`${platform.runtimeName} cannot load ${name} of ${files.place}: ${error}`, { cause: error });
    }
    const reranker = new this(manifest, name, pairs, runtime, session, maxBatchTokens);
    try {
      const missing = session.inputNames.filter((/** @type {string} */ input) => !KNOWN_INPUTS.includes(input));
      if (missing.length) {
        throw new FamilyError(`the graph of ${name} wants ${missing.join(", ")}, which this package does not have`);
      }
      if (options.checkProbes ?? true) {
        const version = `${platform.runtimeName} ${runtime.env?.versions?.common ?? ""}`.trim();
        await prove(manifest.probes, name, variant.precision, version, (inputs) => reranker._logits(inputs));
      }
    } catch (error) {
      await session.release();
      throw error;
    }
    return reranker;
  }

  /**
   * @param {Manifest} manifest
   * @param {string} variant
   * @param {PairTokenizer} pairs
   * @param {any} runtime
   * @param {any} session
   * @param {number} maxBatchTokens
   */
  constructor(manifest, variant, pairs, runtime, session, maxBatchTokens) {
    if (!session) throw new InputError("give the bundle to Reranker.load, which is asynchronous");
    this.name = manifest.name;
    this.variant = variant;
    this._family = manifest.family;
    this._pairs = pairs;
    this._runtime = runtime;
    this._session = session;
    this._maxBatchTokens = maxBatchTokens;
    /** The last call: onnxruntime-web runs one at a time. @type {Promise<unknown>} */
    this._last = Promise.resolve();
  }

  /**
   * @param {string} query
   * @param {Iterable<string>} documents
   * @param {any} [options]
   */
  async rank(query, documents, options = {}) {
    const { topK, returnDocuments = false } = known(options, ["topK", "returnDocuments"], "rank");
    whole("topK", topK, 0);
    const pairs = pairsOf(query, documents);
    const { logits, truncated } = await this._score(pairs);
    const scores = this._activate(logits);
    const order = Array.from(logits, (_, index) => index).sort((a, b) => logits[b] - logits[a] || a - b);
    return order.slice(0, topK ?? order.length).map((index) => ({
      index,
      score: scores[index],
      logit: logits[index],
      truncated: truncated[index],
      ...(returnDocuments && { document: pairs[index][1] }),
    }));
  }

  /**
   * @param {any} first a query, or pairs
   * @param {any} [second] documents, or options
   * @param {any} [third] options
   */
  async score(first, second, third) {
    const separate = typeof first === "string";
    const pairs = separate ? pairsOf(first, second) : pairsFrom(first);
    const { raw = false } = known((separate ? third : second) ?? {}, ["raw"], "score");
    const { logits } = await this._score(pairs);
    return raw ? logits : this._activate(logits);
  }

  async close() {
    const session = this._session;
    this._session = undefined;
    await this._last;
    await session?.release();
  }

  /** @param {[string, string][]} pairs */
  async _score(pairs) {
    const logits = new Float32Array(pairs.length);
    const truncated = [];
    for (let start = 0; start < pairs.length; start += SCORED_AT_ONCE) {
      const inputs = this._pairs.inputs(pairs.slice(start, start + SCORED_AT_ONCE));
      logits.set(await this._logits(inputs), start);
      for (const input of inputs) truncated.push(input.truncated);
    }
    const place = logits.findIndex((logit) => !Number.isFinite(logit));
    if (place >= 0) throw new TargetError(`${this.variant} returned ${logits[place]} for document ${place}`);
    return { logits, truncated };
  }

  /** @param {Omit<Input, "truncated">[]} inputs */
  async _logits(inputs) {
    const logits = new Float32Array(inputs.length);
    const batches = cutPadded(inputs.map((input) => input.ids.length), this._maxBatchTokens);
    for (const batch of batches) {
      const found = await this._inTurn(() => this._run(batch.map((place) => inputs[place])));
      batch.forEach((place, i) => (logits[place] = found[i]));
    }
    return logits;
  }

  /**
   * @template T
   * @param {() => Promise<T>} run
   * @returns {Promise<T>}
   */
  _inTurn(run) {
    if (!this._session) throw new InputError("this Reranker is closed; load it again");
    const turn = this._last.then(run);
    this._last = turn.catch(() => {});
    return turn;
  }

  /**
   * @param {Omit<Input, "truncated">[]} batch
   * @returns {Promise<Float32Array>}
   */
  async _run(batch) {
    const session = this._session;
    if (!session) throw new InputError("this Reranker was closed during a call");
    const width = Math.max(...batch.map((input) => input.ids.length));
    const dimensions = [batch.length, width];
    const tensor = (/** @type {number[][]} */ rows) => new this._runtime.Tensor("int64", padded(rows, width), dimensions);
    /** @type {Record<string, () => any>} */
    const inputs = {
      input_ids: () => tensor(batch.map((input) => input.ids)),
      attention_mask: () => tensor(batch.map((input) => input.ids.map(() => 1))),
      token_type_ids: () => {
        if (batch.some((input) => !input.segments)) {
          throw new FamilyError("the graph wants token_type_ids; the family has none");
        }
        return tensor(batch.map((input) => /** @type {number[]} */ (input.segments)));
      },
    };
    const feeds = Object.fromEntries(session.inputNames.map((/** @type {string} */ name) => [name, inputs[name]()]));
    try {
      const { logits } = await session.run(feeds, ["logits"]);
      return logits.data;
    } catch (error) {
      throw new TargetError(`onnxruntime failed: ${error}`, { cause: error });
    }
  }

  /** @param {Float32Array} logits */
  _activate(logits) {
    const { activation, temperature } = this._family;
    return Float64Array.from(logits, (logit) => {
      const x = logit / temperature;
      return activation === "sigmoid" ? sigmoid(x) : x;
    });
  }
}

/** @param {number} x */
function sigmoid(x) {
  // exp of non-positive numbers only: no loss of precision near 0.
  const small = Math.exp(-Math.abs(x));
  return x >= 0 ? 1 / (1 + small) : small / (1 + small);
}

/**
 * @param {any} query
 * @param {any} documents
 * @returns {[string, string][]}
 */
function pairsOf(query, documents) {
  text(query, "query");
  return list(documents, "documents", "strings").map((document, i) => [query, text(document, `document ${i}`)]);
}

/**
 * @param {any} pairs
 * @returns {[string, string][]}
 */
function pairsFrom(pairs) {
  return list(pairs, "pairs", "[query, document] pairs").map((pair, i) => {
    if (!Array.isArray(pair) || pair.length !== 2) {
      throw new InputError(`pair ${i} is no [query, document] pair, but ${shown(pair)}`);
    }
    return [text(pair[0], `query ${i}`), text(pair[1], `document ${i}`)];
  });
}

/**
 * @param {any} values
 * @param {string} name
 * @param {string} kind
 * @returns {any[]}
 */
function list(values, name, kind) {
  if (typeof values === "string") throw new InputError(`${name} is one string; give an array of ${kind}`);
  if (values instanceof Map) throw new InputError(`${name} is a Map; give an array of ${kind}, such as its values`);
  if (typeof values?.[Symbol.iterator] !== "function") {
    throw new InputError(`${name} is ${shown(values)}; give an array of ${kind}`);
  }
  return [...values];
}

/**
 * @param {any} value
 * @param {string} what
 * @returns {string}
 */
function text(value, what) {
  if (typeof value !== "string") throw new InputError(`${what} is ${shown(value)}, not a string`);
  return value;
}

/**
 * @param {string} name
 * @param {any} value
 * @param {number} least
 */
function whole(name, value, least) {
  if (value === undefined || (Number.isInteger(value) && value >= least)) return;
  throw new InputError(`${name} is ${shown(value)}; give a whole number, ${least} or more`);
}

/**
 * @param {any} options
 * @param {string[]} names
 * @param {string} where
 */
function known(options, names, where) {
  const other = Object.keys(Object(options)).find((name) => !names.includes(name));
  if (options === null || typeof options !== "object" || other !== undefined) {
    throw new InputError(`${where} got ${other ?? shown(options)}; its options are: ${names.join(", ")}`);
  }
  return options;
}

/** @param {any} value */
function shown(value) {
  const written = typeof value === "object" && value !== null ? JSON.stringify(value) : String(value);
  return written.length > 60 ? `${written.slice(0, 60)}…` : written;
}
