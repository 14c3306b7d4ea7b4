/** Rerank documents with a qrank bundle, in Node and in browsers. */

export interface LoadOptions {
  /**
   * `onnx`, or a variant of the bundle such as `onnx-int8`.
   * @default the ONNX variant expected to be fastest on a CPU
   */
  variant?: string;
  /**
   * CPU threads. In browsers, more than one needs a page that is cross-origin isolated, and the
   * number holds for the page: it counts when the first model is loaded.
   * @default all in Node; onnxruntime-web's choice in browsers
   */
  threads?: number;
  /** Most tokens of a pair. @default the model's limit */
  maxLength?: number;
  /** Most padded tokens of a batch; a longer pair is a batch of its own. @default 160 */
  maxBatchTokens?: number;
  /** Compare the files with the manifest's sha256. @default true */
  checkFiles?: boolean;
  /** Check that the variant gives the original's logits on this machine. @default true */
  checkProbes?: boolean;
  /**
   * The runtime's module, if it is not found under its own name: what `import * as ort from
   * "onnxruntime-web/wasm"` gives.
   */
  runtime?: unknown;
  /** Called with warnings, such as of a query that is too long. @default console.warn */
  warn?: (message: string) => void;
}

export interface Ranking {
  /** Position in the documents given, from 0. */
  index: number;
  /** Relevance, after the model's activation. */
  score: number;
  /** Raw relevance; it decides order and ties. */
  logit: number;
  /** Whether the model read only the document's beginning. */
  truncated: boolean;
  /** The document, with `returnDocuments`. */
  document?: string;
}

export interface RankOptions {
  /** Most results. @default all */
  topK?: number;
  /** Whether results hold their documents. @default false */
  returnDocuments?: boolean;
}

export type Pair = readonly [query: string, document: string];

/** Scores (query, document) pairs with a bundle. Calls may overlap; they run one after the other. */
export class Reranker {
  private constructor();

  /** The model's name. */
  readonly name: string;
  /** The variant that runs, such as `onnx-int8`. */
  readonly variant: string;

  /**
   * Load a bundle, check its files, and prove that it computes rightly here.
   *
   * @param source the bundle's folder (Node only), or its URL
   * @throws {QrankError} the message says what to do
   */
  static load(source: string | URL, options?: LoadOptions): Promise<Reranker>;

  /**
   * Order documents by relevance, the most relevant first; ties keep their order.
   *
   * @throws {InputError} an argument is not what it should be
   * @throws {TargetError} the runtime failed, or returned a logit that is not finite
   */
  rank(query: string, documents: Iterable<string>, options?: RankOptions): Promise<Ranking[]>;

  /** Scores of pairs, in their order; with `raw`, logits. */
  score(pairs: Iterable<Pair>, options?: { raw?: false }): Promise<Float64Array>;
  score(pairs: Iterable<Pair>, options: { raw: true }): Promise<Float32Array>;
  /** Scores of a query's documents, in their order; with `raw`, logits. */
  score(query: string, documents: Iterable<string>, options?: { raw?: false }): Promise<Float64Array>;
  score(query: string, documents: Iterable<string>, options: { raw: true }): Promise<Float32Array>;

  /** Free the model, once running calls have ended. */
  close(): Promise<void>;
}

/** Catch this to catch every error that qrank raises on purpose. */
export class QrankError extends Error {}
/** The caller's texts or arguments cannot be used. */
export class InputError extends QrankError {}
/** A runtime is not installed. */
export class MissingPackageError extends QrankError {}
/** There is no bundle at that place. */
export class ModelNotFoundError extends QrankError {}
/** A bundle is damaged, incomplete, or of another schema version. */
export class BundleError extends QrankError {}
/** The model is of a kind that this package cannot run. */
export class FamilyError extends QrankError {}
/** The bundle has no such variant, or the runtime fails or computes wrongly here. */
export class TargetError extends QrankError {}
