// The npm clients against a running server. Reads {url, texts, vectors} from standard input, prints a line a check.
import { readFileSync } from "node:fs";
import { GoogleGenAI } from "@google/genai";
import { InferenceClient } from "@huggingface/inference";
import { Mistral } from "@mistralai/mistralai";
import { CohereClient, CohereClientV2 } from "cohere-ai";
import { Ollama } from "ollama";
import OpenAI, { AzureOpenAI } from "openai";
import { VoyageAIClient } from "voyageai";

const { url, texts, vectors } = JSON.parse(readFileSync(0, "utf8"));

function check(found, name) {
  if (found.length !== texts.length) throw new Error(`${name}: ${found.length} vectors`);
  found.forEach((vector, row) => {
    let dot = 0, one = 0, other = 0;
    vector.forEach((value, column) => {
      const wanted = vectors[row][column];
      dot += value * wanted; one += value * value; other += wanted * wanted;
    });
    const cosine = dot / Math.sqrt(one * other);
    if (!(cosine >= 0.99999)) throw new Error(`${name}: cosine ${cosine} of text ${row}`);
  });
  console.log(`ok ${name}`);
}

async function fails(promise, holds, name) {
  try { await promise; } catch (error) {
    if (!holds(error)) throw new Error(`${name}: ${error}`);
    console.log(`ok ${name}`);
    return;
  }
  throw new Error(`${name}: no error`);
}

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const model = "text-embedding-3-small";
const embed = async (more) => (await openai.embeddings.create({ model, input: texts, ...more })).data.map((one) => one.embedding);
check(await embed({}), "openai default");
check(await embed({ encoding_format: "float" }), "openai float");
check(await embed({ dimensions: 256 }), "openai dimensions");
const coded = await embed({ encoding_format: "base64" });
check(coded.map((text) => [...new Float32Array(new Uint8Array(Buffer.from(text, "base64")).buffer)]), "openai base64");
const names = [];
for await (const one of openai.models.list()) names.push(one.id);
if (!names.includes(model)) throw new Error(`openai models: ${names}`);
if ((await openai.models.retrieve(model)).id !== model) throw new Error("openai retrieve");
console.log("ok openai models");
await fails(openai.embeddings.create({ model: "no-such", input: "x" }), (e) => e.status === 404 && e.code === "model_not_found", "openai error");

const ollama = new Ollama({ host: url });
check((await ollama.embed({ model: "all-minilm", input: texts })).embeddings, "ollama embed");
check((await ollama.embed({ model: "all-minilm", input: texts, dimensions: 128, truncate: true })).embeddings, "ollama dimensions");
check(await Promise.all(texts.map(async (prompt) => (await ollama.embeddings({ model: "all-minilm", prompt })).embedding)), "ollama embeddings");
const listed = (await ollama.list()).models.map((one) => one.name);
const running = (await ollama.ps()).models.map((one) => one.name);
if (listed[0] !== "all-minilm:latest" || running[0] !== listed[0]) throw new Error(`ollama list: ${listed} ${running}`);
const shown = await ollama.show({ model: "all-minilm" });
if (shown.capabilities[0] !== "embedding" || !(await ollama.version()).version) throw new Error("ollama show");
console.log("ok ollama show");
await fails(ollama.embed({ model: "no-such", input: "x" }), (e) => e.status_code === 404, "ollama error");

const v2 = new CohereClientV2({ environment: url, token: "unused" });
const v1 = new CohereClient({ environment: url, token: "unused" });
const asked = { model: "embed-english-v3.0", texts, inputType: "search_document" };
check((await v2.embed({ ...asked, embeddingTypes: ["float"] })).embeddings.float, "cohere v2");
check((await v2.embed({ ...asked, embeddingTypes: ["float"], outputDimension: 256 })).embeddings.float, "cohere v2 dimensions");
check((await v1.embed(asked)).embeddings, "cohere v1");

const azure = new AzureOpenAI({ endpoint: url, apiKey: "unused", apiVersion: "2024-10-21", maxRetries: 0 });
check((await azure.embeddings.create({ model, input: texts })).data.map((one) => one.embedding), "azure");

const voyage = new VoyageAIClient({ apiKey: "unused", environment: `${url}/v1` });
check((await voyage.embed({ model, input: texts })).data.map((one) => one.embedding), "voyage");
check((await voyage.embed({ model, input: texts, inputType: "document", outputDimension: 256 })).data.map((one) => one.embedding), "voyage dimensions");

const mistral = new Mistral({ apiKey: "unused", serverURL: url });
check((await mistral.embeddings.create({ model, inputs: texts })).data.map((one) => one.embedding), "mistral");

const google = new GoogleGenAI({ apiKey: "unused", httpOptions: { baseUrl: url } });
const contents = await google.models.embedContent({ model, contents: texts });
check(contents.embeddings.map((one) => one.values), "google");

const hugging = new InferenceClient("unused", { endpointUrl: url });
check(await hugging.featureExtraction({ inputs: texts }), "hugging face");
const near = await hugging.sentenceSimilarity({ inputs: { source_sentence: texts[0], sentences: texts.slice(0, 2) } });
if (Math.abs(near[0] - 1) > 1e-5) throw new Error(`hugging face similarity: ${near}`);
console.log("ok hugging face similarity");
