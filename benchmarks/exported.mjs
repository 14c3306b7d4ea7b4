// transformers.js on an exported folder: run by exported.py, answers like peer.py.
//
//     node exported.mjs FOLDER

import fs from "node:fs";
import path from "node:path";
import readline from "node:readline";
import { AutoModelForSequenceClassification, AutoTokenizer, env } from "@huggingface/transformers";

const DTYPES = { "": "fp32", _fp16: "fp16", _quantized: "q8", _q4: "q4" };

env.allowRemoteModels = false;
const folder = process.argv[2];
const [file] = fs.readdirSync(path.join(folder, "onnx"));
const dtype = DTYPES[path.basename(file, ".onnx").replace("model", "")];
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const model = await AutoModelForSequenceClassification.from_pretrained(folder, { dtype });

for await (const line of readline.createInterface({ input: process.stdin })) {
  const { query, documents } = JSON.parse(line);
  const scores = [];
  for (const document of documents) {
    const inputs = tokenizer([query], { text_pair: [document], padding: true, truncation: true });
    const { logits } = await model(inputs);
    scores.push(logits.data[0]);
  }
  console.log(JSON.stringify({ scores }));
}
