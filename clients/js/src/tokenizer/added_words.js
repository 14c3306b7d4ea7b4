/**
 * A stretch of a text: an added word, or text between added words (`id` undefined).
 *
 * @typedef {object} Stretch
 * @property {string} text
 * @property {number} start in UTF-16 units
 * @property {number} [id] the added word's
 */

const WORD = "[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}]";
const ENDS_WITH_WORD = new RegExp(`${WORD}$`, "u");
const STARTS_WITH_WORD = new RegExp(`^${WORD}`, "u");

/**
 * Finds added words in a text: the leftmost, and of these the longest.
 *
 * @param {any[]} tokens `added_tokens` of tokenizer.json
 * @param {(content: string) => string} spelled how a word is spelled in the text
 * @returns {(text: string) => Stretch[]}
 */
export function addedWords(tokens, spelled) {
  const words = new Map(tokens.map((token) => [spelled(token.content), token]));
  words.delete("");
  if (!words.size) return (text) => (text ? [{ text, start: 0 }] : []);
  const longestFirst = [...words.keys()].sort((a, b) => b.length - a.length);
  const pattern = new RegExp(longestFirst.map(escaped).join("|"), "gu");
  return (text) => {
    const found = [];
    let done = 0;
    for (const match of text.matchAll(pattern)) {
      const { id, single_word: single, lstrip, rstrip } = words.get(match[0]);
      let start = match.index;
      let end = start + match[0].length;
      if (single && (ENDS_WITH_WORD.test(text.slice(0, start)) || STARTS_WITH_WORD.test(text.slice(end)))) continue;
      if (lstrip) start = Math.max(start - spaces(text.slice(done, start), /\p{White_Space}*$/u), done);
      if (rstrip) end += spaces(text.slice(end), /^\p{White_Space}*/u);
      if (done < start) found.push({ text: text.slice(done, start), start: done });
      found.push({ text: text.slice(start, end), start, id });
      done = end;
    }
    if (done < text.length) found.push({ text: text.slice(done), start: done });
    return found;
  };
}

/** @param {string} text */
function escaped(text) {
  return text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
}

/**
 * @param {string} text
 * @param {RegExp} pattern
 */
function spaces(text, pattern) {
  return /** @type {RegExpMatchArray} */ (text.match(pattern))[0].length;
}
