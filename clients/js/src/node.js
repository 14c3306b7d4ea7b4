import { createHash } from "node:crypto";
import { createReadStream, readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import { pipeline } from "node:stream/promises";
import { fileURLToPath } from "node:url";
import { MANIFEST } from "./bundle.js";
import { BundleError, InputError, MissingPackageError, ModelNotFoundError } from "./errors.js";
import { Reranker as Base } from "./reranker.js";
import { remoteFiles } from "./remote_files.js";

export * from "./errors.js";

/** Runs on onnxruntime-node. */
export class Reranker extends Base {}

/** @type {import("./reranker.js").Platform} */
Reranker.platform = {
  files(source) {
    if (source instanceof URL || /^(https?|file):\/\//.test(source)) {
      const url = new URL(source);
      return url.protocol === "file:" ? localFiles(fileURLToPath(url)) : remoteFiles(url);
    }
    if (typeof source !== "string" || !source) {
      throw new InputError(`the bundle is ${String(source)}; give its folder or its URL`);
    }
    return localFiles(source);
  },
  async runtime() {
    try {
      const found = await import("onnxruntime-node");
      return found.default ?? found;
    } catch (error) {
      throw new MissingPackageError(
        `onnxruntime-node cannot be loaded; to install it: npm install onnxruntime-node (${error})`,
        { cause: error },
      );
    }
  },
  runtimeName: "onnxruntime-node",
  sessionOptions: (runtime, threads = availableParallelism()) => ({
    executionProviders: ["cpu"],
    intraOpNumThreads: threads,
    interOpNumThreads: 1,
    // The arena keeps the peak memory of every length it ever saw.
    enableCpuMemArena: false,
    logSeverityLevel: 4, // failures are thrown
    // x86 CPUs without VNNI saturate unsigned x signed int8 products. This widens them, and halves
    // the speed of CPUs that have it.
    ...(hasVnni() ? {} : { extra: { session: { x64quantprecision: "1" } } }),
  }),
};

/** Whether this CPU has VNNI; false where the system does not tell, as outside of Linux. */
function hasVnni() {
  try {
    return /^flags\s*:.*\b(avx512_vnni|avx_vnni)\b/m.test(readFileSync("/proc/cpuinfo", "utf-8"));
  } catch {
    return false;
  }
}

/**
 * @param {string} folder
 * @returns {import("./bundle.js").Files}
 */
function localFiles(folder) {
  /**
   * @template T
   * @param {string} name
   * @param {(path: string) => Promise<T>} read
   */
  const reading = async (name, read) => {
    try {
      return await read(join(folder, name));
    } catch (error) {
      const { code } = /** @type {NodeJS.ErrnoException} */ (error);
      if (name === MANIFEST && (code === "ENOENT" || code === "ENOTDIR")) {
        throw new ModelNotFoundError(`${folder} is no bundle: it holds no ${MANIFEST}`, { cause: error });
      }
      throw new BundleError(`${folder} lacks ${name} (${error}); copy the bundle again`, { cause: error });
    }
  };
  return {
    place: folder,
    text: (name) => reading(name, (path) => readFile(path, "utf8")),
    record: (name) =>
      reading(name, async (path) => {
        const [hash, stream] = [createHash("sha256"), createReadStream(path)];
        await pipeline(stream, hash);
        return { sha256: hash.digest("hex"), bytes: stream.bytesRead };
      }),
    // onnxruntime finds further files beside the graph by itself.
    graph: async (names) => ({ graph: join(folder, graphOf(names)), data: [] }),
  };
}

/** @param {string[]} names */
function graphOf(names) {
  return /** @type {string} */ (names.find((name) => name.endsWith("/model.onnx")));
}
