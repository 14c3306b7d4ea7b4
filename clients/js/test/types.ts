/** Checked by tsc, not run: how TypeScript sees the package. */
import { InputError, QrankError, Reranker, type Ranking } from "qrank";

export async function use(): Promise<Ranking[]> {
  const reranker: Reranker = await Reranker.load(new URL("https://example.org/mini/"), {
    variant: "onnx-int8",
    threads: 2,
    warn: (message: string) => message.length,
  });
  const scores: Float64Array = await reranker.score([["query", "document"]]);
  const logits: Float32Array = await reranker.score("query", ["document"], { raw: true });
  const error: QrankError = new InputError(`${scores.length} ${logits.length}`);
  // @ts-expect-error: there is no such option
  await reranker.rank(error.message, ["document"], { top_k: 1 });
  await reranker.close();
  return reranker.rank("query", new Set(["document"]), { topK: 1, returnDocuments: true });
}
