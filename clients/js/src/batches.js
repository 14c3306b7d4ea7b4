/**
 * Cut sequences into batches that cost at most `limit` tokens, padding included; the longest come
 * first. The same batches as in Python: int8 graphs scale activations over a whole batch, so logits
 * depend a little on who shares one.
 *
 * @param {number[]} lengths tokens of each sequence
 * @param {number} limit padded tokens of a batch; a longer sequence gets its own
 * @returns {number[][]} indices into `lengths`, each in exactly one batch
 */
export function cutPadded(lengths, limit) {
  const order = lengths.map((_, place) => place).sort((a, b) => lengths[b] - lengths[a] || a - b);
  const batches = [];
  for (let start = 0; start < order.length; ) {
    const longest = Math.max(lengths[order[start]], 1);
    const end = start + Math.max(Math.floor(limit / longest), 1);
    batches.push(order.slice(start, end));
    start = end;
  }
  return batches;
}

/**
 * Rows as one array of shape [rows, longest row], padded with 0.
 *
 * @param {number[][]} rows
 * @param {number} width
 */
export function padded(rows, width) {
  const data = new BigInt64Array(rows.length * width);
  rows.forEach((row, place) => row.forEach((value, i) => (data[place * width + i] = BigInt(value))));
  return data;
}
