import { BundleError } from "../errors.js";
import { unsupported } from "./unsupported.js";

/**
 * Turns a word into tokens: their ids, and the UTF-16 units of the word that each ends at.
 *
 * @typedef {(word: string) => { ids: number[], ends: number[] }} Model
 */

/** Words whose tokens are kept. */
const CACHED = 10_000;
const LONGEST_CACHED = 64;

/**
 * @param {any} config `model` of tokenizer.json
 * @param {boolean} bytes whether the words' UTF-8 bytes are what the vocabulary is of
 * @returns {Model}
 */
export function model(config, bytes) {
  if (bytes && config.type !== "BPE") throw unsupported("model", `${config.type} of bytes`);
  switch (config.type) {
    case "WordPiece":
      return cached(wordPiece(config));
    case "Unigram":
      return cached(unigram(config));
    case "BPE":
      return cached(bytes ? ofBytes(bpe(config)) : bpe(config));
    default:
      throw unsupported("model", config.type);
  }
}

/**
 * @param {any} config
 * @returns {Model}
 */
function wordPiece(config) {
  const vocabulary = new Map(Object.entries(config.vocab));
  const unknown = vocabulary.get(config.unk_token);
  if (unknown === undefined) throw new BundleError("tokenizer.json: its unk_token is not in its vocabulary");
  const longest = longestOf(vocabulary.keys());
  const prefix = config.continuing_subword_prefix;
  return (word) => {
    const whole = { ids: [unknown], ends: [word.length] };
    // A code point has at most two units.
    if (word.length > config.max_input_chars_per_word && [...word].length > config.max_input_chars_per_word) {
      return whole;
    }
    const ids = [];
    const ends = [];
    for (let start = 0; start < word.length; ) {
      let end = Math.min(word.length, start + longest);
      let id;
      for (; end > start; end--) {
        const piece = word.slice(start, end);
        id = vocabulary.get(start ? prefix + piece : piece);
        if (id !== undefined) break;
      }
      if (id === undefined) return whole;
      ids.push(id);
      ends.push(end);
      start = end;
    }
    return { ids, ends };
  };
}

/** How much less likely than the rarest piece an unknown character is, in `tokenizers`. */
const UNKNOWN_PENALTY = 10;

/**
 * @param {any} config
 * @returns {Model}
 */
function unigram(config) {
  /** @type {[string, number][]} */
  const pieces = config.vocab;
  /** @type {Map<string, number>} */
  const vocabulary = new Map(pieces.map(([piece], id) => [piece, id]));
  const scores = Float64Array.from(pieces, ([, score]) => score);
  const unknown = config.unk_id;
  const unknownScore = scores.reduce((a, b) => Math.min(a, b), Infinity) - UNKNOWN_PENALTY;
  const fallback = config.byte_fallback ? byteTokens(vocabulary) : undefined;
  /** By a piece's first unit, the longest piece: bounds the search without a trie of all. */
  const longest = new Uint16Array(0x10000);
  for (const piece of vocabulary.keys()) {
    const first = piece.charCodeAt(0);
    if (piece) longest[first] = Math.max(longest[first], piece.length);
  }
  return (word) => {
    const size = word.length;
    const best = new Float64Array(size + 1);
    const from = new Int32Array(size + 1).fill(-1);
    const by = new Int32Array(size + 1);
    const offer = (/** @type {number} */ start, /** @type {number} */ end, /** @type {number} */ id, /** @type {number} */ score) => {
      const total = score + best[start];
      if (from[end] >= 0 && total <= best[end]) return;
      best[end] = total;
      from[end] = start;
      by[end] = id;
    };
    for (let start = 0; start < size; ) {
      const next = start + characterLength(word, start);
      const last = Math.min(size, start + longest[word.charCodeAt(start)]);
      let single = false;
      for (let end = next; end <= last; end++) {
        const id = vocabulary.get(word.slice(start, end));
        if (id === undefined) continue;
        offer(start, end, id, scores[id]);
        single ||= end === next;
      }
      if (!single) {
        if (unknown === null || unknown === undefined) {
          throw new BundleError("tokenizer.json: a character is not in the vocabulary, and there is no unk_id");
        }
        offer(start, next, unknown, unknownScore);
      }
      start = next;
    }
    const ids = [];
    const ends = [];
    for (let end = size; end > 0; ) {
      let start = from[end];
      if (by[end] === unknown) {
        // Neighbouring unknown characters are one token.
        while (start > 0 && by[start] === unknown) start = from[start];
        const text = word.slice(start, end);
        const id = vocabulary.get(text);
        const found = id === undefined ? (fallback?.(text) ?? [unknown]) : [id];
        for (const id of found.reverse()) {
          ids.push(id);
          ends.push(end);
        }
      } else {
        ids.push(by[end]);
        ends.push(end);
      }
      end = start;
    }
    return { ids: ids.reverse(), ends: ends.reverse() };
  };
}

/**
 * @param {any} config
 * @returns {Model}
 */
function bpe(config) {
  if (config.continuing_subword_prefix || config.end_of_word_suffix) {
    throw unsupported("model", "BPE with a prefix or suffix of pieces");
  }
  /** @type {Map<string, number>} */
  const vocabulary = new Map(Object.entries(config.vocab));
  const names = new Map(Array.from(vocabulary, ([piece, id]) => [id, piece]));
  /** @type {Map<string, { rank: number, id: number }>} two ids -> how early they merge, and to what */
  const merges = new Map();
  config.merges.forEach((/** @type {string | string[]} */ merge, /** @type {number} */ rank) => {
    const [left, right] = typeof merge === "string" ? merge.split(" ") : merge;
    const id = vocabulary.get(left + right);
    if (id === undefined) throw new BundleError(`tokenizer.json: the merge ${left} ${right} gives no piece of its vocabulary`);
    merges.set(`${vocabulary.get(left)} ${vocabulary.get(right)}`, { rank, id });
  });
  const unknown = vocabulary.get(config.unk_token);
  const fallback = config.byte_fallback ? byteTokens(vocabulary) : undefined;

  return (word) => {
    const whole = config.ignore_merges ? vocabulary.get(word) : undefined;
    if (whole !== undefined) return { ids: [whole], ends: [word.length] };
    /** @type {number[]} */
    const ids = [];
    /** @type {number[]} */
    const ends = [];
    for (let start = 0, end; start < word.length; start = end) {
      end = start + characterLength(word, start);
      const character = word.slice(start, end);
      const id = vocabulary.get(character);
      const found = id !== undefined ? [id] : (fallback?.(character) ?? (unknown === undefined ? [] : [unknown]));
      if (config.fuse_unk && found[0] === unknown && ids.at(-1) === unknown && unknown !== undefined) {
        ends[ends.length - 1] = end;
        continue;
      }
      for (const each of found) {
        ids.push(each);
        ends.push(end);
      }
    }
    return merged(ids, ends, merges);
  };
}

/**
 * Merge neighbours, the earliest learnt merge first, the leftmost of these first.
 *
 * @param {number[]} ids changed
 * @param {number[]} ends changed
 * @param {Map<string, { rank: number, id: number }>} merges
 */
function merged(ids, ends, merges) {
  const count = ids.length;
  const after = Int32Array.from(ids, (_, i) => (i + 1 < count ? i + 1 : -1));
  const before = Int32Array.from(ids, (_, i) => i - 1);
  /** @type {{ rank: number, place: number, left: number, right: number, id: number }[]} */
  const heap = [];
  const earlier = (/** @type {number} */ a, /** @type {number} */ b) =>
    heap[a].rank - heap[b].rank || heap[a].place - heap[b].place;
  const swap = (/** @type {number} */ a, /** @type {number} */ b) => {
    [heap[a], heap[b]] = [heap[b], heap[a]];
  };
  const offer = (/** @type {number} */ place) => {
    const next = after[place];
    const merge = next < 0 ? undefined : merges.get(`${ids[place]} ${ids[next]}`);
    if (!merge) return;
    let at = heap.push({ rank: merge.rank, place, left: ids[place], right: ids[next], id: merge.id }) - 1;
    for (let parent; at > 0 && earlier(at, (parent = (at - 1) >> 1)) < 0; at = parent) swap(at, parent);
  };
  const take = () => {
    swap(0, heap.length - 1);
    const top = heap.pop();
    for (let at = 0; ; ) {
      let least = at;
      for (const child of [2 * at + 1, 2 * at + 2]) {
        if (child < heap.length && earlier(child, least) < 0) least = child;
      }
      if (least === at) return top;
      swap(at, least);
      at = least;
    }
  };
  for (let place = 0; place < count; place++) offer(place);
  const gone = new Uint8Array(count);
  while (heap.length) {
    const top = /** @type {NonNullable<ReturnType<typeof take>>} */ (take());
    const { place } = top;
    const next = after[place];
    // Merged with another neighbour meanwhile.
    if (gone[place] || next < 0 || ids[place] !== top.left || ids[next] !== top.right) continue;
    ids[place] = top.id;
    ends[place] = ends[next];
    gone[next] = 1;
    after[place] = after[next];
    if (after[next] >= 0) before[after[next]] = place;
    if (before[place] >= 0) offer(before[place]);
    offer(place);
  }
  const kept = ids.map((_, i) => i).filter((i) => !gone[i]);
  return { ids: kept.map((i) => ids[i]), ends: kept.map((i) => ends[i]) };
}

/**
 * GPT-2's characters for bytes: printable ones for themselves, the others from U+0100 on.
 *
 * @type {string[]}
 */
const BYTE_CHARACTERS = (() => {
  const printable = (/** @type {number} */ b) => (b > 32 && b < 127) || (b > 160 && b !== 173);
  let others = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(printable(b) ? b : others++));
})();

const ENCODER = new TextEncoder();

/**
 * A model of bytes as a model of text; a token that ends within a character ends after it.
 *
 * @param {Model} inner
 * @returns {Model}
 */
function ofBytes(inner) {
  return (word) => {
    const bytes = ENCODER.encode(word);
    const { ids, ends } = inner(Array.from(bytes, (byte) => BYTE_CHARACTERS[byte]).join(""));
    const unit = new Int32Array(bytes.length + 1);
    let at = 0;
    let read = 0;
    for (const character of word) {
      at += character.length;
      const point = /** @type {number} */ (character.codePointAt(0));
      const width = point < 0x80 ? 1 : point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
      unit.fill(at, read + 1, read + width + 1);
      read += width;
    }
    return { ids, ends: ends.map((end) => unit[end]) };
  };
}

/**
 * @param {Map<string, number>} vocabulary with tokens such as `<0x0A>`
 * @returns {(text: string) => number[] | undefined} ids of a text's bytes, if there is one for each
 */
function byteTokens(vocabulary) {
  const ids = Array.from({ length: 256 }, (_, byte) =>
    vocabulary.get(`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`),
  );
  return (text) => {
    const found = Array.from(ENCODER.encode(text), (byte) => ids[byte]);
    return found.includes(undefined) ? undefined : /** @type {number[]} */ (found);
  };
}

/**
 * @param {Model} inner
 * @returns {Model} the same, which remembers short words
 */
function cached(inner) {
  /** @type {Map<string, ReturnType<Model>>} */
  const known = new Map();
  return (word) => {
    const found = known.get(word);
    if (found) return found;
    const tokens = inner(word);
    if (word.length <= LONGEST_CACHED && known.size < CACHED) known.set(word, tokens);
    return tokens;
  };
}

/** @param {Iterable<string>} texts */
function longestOf(texts) {
  let longest = 0;
  for (const text of texts) longest = Math.max(longest, text.length);
  return longest;
}

/**
 * @param {string} text
 * @param {number} place
 */
function characterLength(text, place) {
  return /** @type {number} */ (text.codePointAt(place)) > 0xffff ? 2 : 1;
}
