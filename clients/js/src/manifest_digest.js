/**
 * The canonical JSON of a manifest without its digest: keys sorted, no spaces, only ASCII, as Python
 * writes it. Made from the text, because JavaScript's numbers forget how they were written (`1.0`).
 *
 * @param {string} text valid JSON of an object
 * @returns {string}
 */
export function canonicalWithoutDigest(text) {
  const tokens = text.match(/"(?:[^"\\]|\\.)*"|[{}[\],:]|[^\s{}[\],:"]+/g) ?? [];
  let place = 0;
  /**
   * @param {boolean} outermost
   * @returns {string}
   */
  const value = (outermost) => {
    const token = tokens[place++];
    if (token === "[") {
      const items = [];
      while (tokens[place] !== "]") {
        items.push(value(false));
        if (tokens[place] === ",") place++;
      }
      place++;
      return `[${items.join(",")}]`;
    }
    if (token !== "{") return token.startsWith('"') ? ascii(token) : token;
    /** @type {Map<string, string>} */
    const items = new Map();
    while (tokens[place] !== "}") {
      const key = ascii(tokens[place]);
      place += 2;
      items.set(key, value(false));
      if (tokens[place] === ",") place++;
    }
    place++;
    if (outermost) items.delete('"digest"');
    const keys = [...items.keys()].sort((a, b) => (JSON.parse(a) < JSON.parse(b) ? -1 : 1));
    return `{${keys.map((key) => `${key}:${items.get(key)}`).join(",")}}`;
  };
  return value(true);
}

/** @type {Record<string, string>} */
const SHORT = { '"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f" };

/** @param {string} literal of a string */
function ascii(literal) {
  const escaped = JSON.parse(literal).replace(
    /["\\]|[^ -~]/g,
    (/** @type {string} */ unit) => SHORT[unit] ?? `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
  return `"${escaped}"`;
}
