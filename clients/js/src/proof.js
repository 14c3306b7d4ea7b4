import { TargetError } from "./errors.js";

/** @typedef {import("./bundle.js").Probes} Probes */
/** @typedef {import("./pairs.js").Input} Input */

/**
 * By precision, the largest difference of a logit from the original's, as a share of
 * max(1, spread of the original's logits); the same as in Python.
 *
 * @type {Record<string, number>}
 */
const TOLERANCES = { fp32: 1e-4, fp16: 1e-2, bf16: 5e-2, int8: 0.15, int4: 0.3 };

/** Least Kendall's tau; on few short probes it says little, but constant numbers have about 0. */
const LEAST_KENDALL = 0.5;

/** Tokens of the shortest probes to run, besides the longest one: they keep a start short. */
const PROBE_TOKENS = 512;
const LEAST_PROBES = 4;

/**
 * Check that a variant gives the original's logits on this machine, on the shortest probes and the
 * longest one: kernels differ by length.
 *
 * @param {Probes} probes of the bundle
 * @param {string} name the variant's
 * @param {string} precision
 * @param {string} runtime name and version, for the message
 * @param {(inputs: Omit<Input, "truncated">[]) => Promise<Float32Array>} compute
 * @throws {TargetError} it does not
 */
export async function prove(probes, name, precision, runtime, compute) {
  const places = some(probes.sequences.map((sequence) => sequence.length));
  const logits = await compute(
    places.map((i) => ({ ids: probes.sequences[i], segments: probes.segments && probes.segments[i] })),
  );
  const expected = places.map((i) => probes.logits[i]);
  const difference = Math.max(...expected.map((logit, i) => Math.abs(logit - logits[i])));
  const spread = Math.max(...probes.logits) - Math.min(...probes.logits);
  const bound = TOLERANCES[precision] * Math.max(1, spread);
  const tau = kendall(Array.from(logits), expected);
  const missed = [];
  // Written so that NaN fails.
  if (!(difference <= bound)) {
    missed.push(`max |Δlogit| is ${difference.toPrecision(4)}, at most ${bound.toPrecision(4)} allowed`);
  }
  if (!(tau >= LEAST_KENDALL)) {
    missed.push(`Kendall tau is ${tau.toFixed(3)}, at least ${LEAST_KENDALL.toFixed(3)} needed`);
  }
  if (missed.length) {
    throw new TargetError(
      `${name} computes wrongly on this machine (${runtime}): ${missed.join("; ")} against the probes of ` +
        "the bundle. Name another variant",
    );
  }
}

/**
 * @param {number[]} lengths of the probes
 * @returns {number[]} those to run
 */
function some(lengths) {
  const order = lengths.map((_, i) => i).sort((a, b) => lengths[a] - lengths[b] || a - b);
  let tokens = 0;
  const fitting = order.filter((i) => (tokens += lengths[i]) <= PROBE_TOKENS).length;
  const few = Math.max(fitting, LEAST_PROBES);
  return few >= order.length ? order : [...order.slice(0, few), order[order.length - 1]];
}

/**
 * Kendall's tau-b: the correlation of the signs of all pairwise differences.
 *
 * @param {number[]} a
 * @param {number[]} b
 */
function kendall(a, b) {
  let [both, left, right] = [0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    for (let j = i + 1; j < a.length; j++) {
      const [x, y] = [Math.sign(a[i] - a[j]), Math.sign(b[i] - b[j])];
      both += x * y;
      left += x * x;
      right += y * y;
    }
  }
  const norm = Math.sqrt(left * right);
  return norm ? both / norm : 0;
}
