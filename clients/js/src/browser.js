import { InputError, MissingPackageError } from "./errors.js";
import { Reranker as Base } from "./reranker.js";
import { remoteFiles } from "./remote_files.js";

export * from "./errors.js";

/** Runs on onnxruntime-web: WebAssembly on the CPU. */
export class Reranker extends Base {}

/** @type {import("./reranker.js").Platform} */
Reranker.platform = {
  files(source) {
    if (!(source instanceof URL) && (typeof source !== "string" || !source)) {
      throw new InputError(`the bundle is ${String(source)}; give its URL`);
    }
    return remoteFiles(new URL(source, globalThis.location?.href));
  },
  async runtime() {
    try {
      return await import("onnxruntime-web/wasm");
    } catch (error) {
      throw new MissingPackageError(
        `onnxruntime-web cannot be loaded; to install it: npm install onnxruntime-web (${error})`,
        { cause: error },
      );
    }
  },
  runtimeName: "onnxruntime-web",
  sessionOptions(runtime, threads) {
    // Read once, when the first session is created.
    if (threads !== undefined) runtime.env.wasm.numThreads = threads;
    return { executionProviders: ["wasm"], logSeverityLevel: 4 };
  },
};
