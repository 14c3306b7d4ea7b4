import { MANIFEST, sha256 } from "./bundle.js";
import { BundleError, ModelNotFoundError } from "./errors.js";

const GRAPH = "/model.onnx";

/**
 * A bundle's files at an address; each is fetched once, and freed when onnxruntime has it.
 *
 * @param {URL} base
 * @returns {import("./bundle.js").Files}
 */
export function remoteFiles(base) {
  const folder = new URL(base.pathname.endsWith("/") ? base : `${base.href.split(/[?#]/)[0]}/`);
  const place = folder.href.replace(/\/$/, "");
  /** @type {Map<string, Uint8Array>} */
  const fetched = new Map();

  /** @param {string} name */
  const bytes = async (name) => {
    const known = fetched.get(name);
    if (known) return known;
    const kind = name === MANIFEST ? ModelNotFoundError : BundleError;
    let answer;
    try {
      answer = await fetch(new URL(name, folder));
    } catch (error) {
      throw new kind(`${place}/${name} cannot be fetched (${error})`, { cause: error });
    }
    if (!answer.ok) throw new kind(`${place}/${name} cannot be fetched: status ${answer.status}`);
    const found = new Uint8Array(await answer.arrayBuffer());
    fetched.set(name, found);
    return found;
  };

  return {
    place,
    text: async (name) => new TextDecoder().decode(await bytes(name)),
    record: async (name) => {
      const content = await bytes(name);
      return { sha256: await sha256(content), bytes: content.length };
    },
    graph: async (names) => {
      const graph = /** @type {string} */ (names.find((name) => name.endsWith(GRAPH)));
      const data = [];
      for (const name of names) {
        if (name !== graph) data.push({ path: name.slice(name.lastIndexOf("/") + 1), data: await bytes(name) });
      }
      const content = await bytes(graph);
      fetched.clear();
      return { graph: content, data };
    },
  };
}
