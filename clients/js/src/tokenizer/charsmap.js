import { BundleError } from "../errors.js";

const ENCODER = new TextEncoder();
const DECODER = new TextDecoder();
const ASCII = /^[\0-\x7f]*$/;

/** A cluster of more bytes is read character by character, as `tokenizers` does. */
const LONGEST_CLUSTER = 5;

/** UTF-16 units. */
const WINDOW = 512;

/** sentencepiece's map of characters: a trie of bytes (a double array), and the replacements. */
export class CharsMap {
  /** @param {string} base64 `precompiled_charsmap` of a tokenizer.json */
  constructor(base64) {
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    const size = bytes.length < 4 ? Number.NaN : view.getUint32(0, true);
    if (!(size % 4 === 0 && 4 + size <= bytes.length)) {
      throw new BundleError("tokenizer.json: precompiled_charsmap is cut short");
    }
    this._trie = Uint32Array.from({ length: size / 4 }, (_, i) => view.getUint32(4 + 4 * i, true));
    this._texts = bytes.subarray(4 + size);
    this._segmenter = new Intl.Segmenter("en", { granularity: "grapheme" });
    /** @type {Map<string, string | undefined>} */
    this._known = new Map();
  }

  /**
   * @param {string} text
   * @returns {string}
   */
  normalize(text) {
    let out = "";
    if (ASCII.test(text)) {
      for (const cluster of text.match(/\r\n|[^]/g) ?? []) out += this._cluster(cluster);
    } else {
      for (const cluster of this._clustersOf(text)) out += this._cluster(cluster);
    }
    return out;
  }

  /**
   * A text's grapheme clusters. V8's time per cluster grows with the text, so it gets a window at a
   * time; the last cluster of a window may go on in the next.
   *
   * @param {string} text
   * @returns {Iterable<string>}
   */
  *_clustersOf(text) {
    for (let start = 0, size = WINDOW; start < text.length; ) {
      const end = start + size;
      const found = Array.from(this._segmenter.segment(text.slice(start, end)), ({ segment }) => segment);
      if (end < text.length) found.pop();
      yield* found;
      for (const cluster of found) start += cluster.length;
      size = found.length ? WINDOW : 2 * size;
    }
  }

  /** @param {string} cluster */
  _cluster(cluster) {
    if (cluster.length <= LONGEST_CLUSTER) {
      const whole = this._replacement(cluster);
      if (whole !== undefined) return whole;
      if (cluster.length === 1) return cluster;
    }
    let out = "";
    for (const character of cluster) out += this._replacement(character) ?? character;
    return out;
  }

  /**
   * The replacement of a text's shortest beginning that is in the trie. (sentencepiece takes the
   * longest; the bundle's reference is `tokenizers`.)
   *
   * @param {string} text
   */
  _replacement(text) {
    if (!this._known.has(text)) {
      // Texts differ without end; characters do not.
      if (this._known.size > 20_000) this._known.clear();
      this._known.set(text, this._find(text));
    }
    return this._known.get(text);
  }

  /** @param {string} text */
  _find(text) {
    const bytes = ENCODER.encode(text);
    const character = /** @type {number} */ (text.codePointAt(0));
    if (bytes.length > LONGEST_CLUSTER && text !== String.fromCodePoint(character)) return undefined;
    let place = offset(this._trie[0]);
    for (const byte of bytes) {
      if (byte === 0) return undefined;
      place ^= byte;
      const unit = this._trie[place];
      if (unit === undefined || (unit & 0x800000ff) >>> 0 !== byte) return undefined;
      place ^= offset(unit);
      if ((unit >>> 8) & 1) return this._text(this._trie[place] & 0x7fffffff);
    }
    return undefined;
  }

  /** @param {number} start */
  _text(start) {
    const end = this._texts.indexOf(0, start);
    return DECODER.decode(this._texts.subarray(start, end < 0 ? undefined : end));
  }
}

/** @param {number} unit of a double array */
function offset(unit) {
  return (unit >>> 10) << ((unit & 0x200) >>> 6);
}
