// The openai package for JavaScript against mmjax: an answer, the same streamed, a question about a picture.
//
//   npm install --no-save openai
//   OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none node chat.mjs [PICTURE]
//
// The package reads both variables itself. Where the server was started without --api-key, any key will do.
import { readFile } from "node:fs/promises";
import { extname } from "node:path";
import OpenAI from "openai";

const RED = // 64 x 64 pixels
  "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAAUElEQVR42u3PQREAAAQAMATRP5QwUni42xospzs+q3hOQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBA4N4CCJ0BmOb2hBcAAAAASUVORK5CYII=";

const client = new OpenAI();
const model = (await client.models.list()).data[0].id;

async function pictureUrl(path) {
  if (!path) return RED;
  const kind = { ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp" }[extname(path).toLowerCase()] ?? "png";
  return `data:image/${kind};base64,${(await readFile(path)).toString("base64")}`;
}

const question = { model, messages: [{ role: "user", content: "What is a cache?" }], max_tokens: 24, temperature: 0 };
const whole = await client.chat.completions.create(question);
console.log("answer:", JSON.stringify(whole.choices[0].message.content));

let streamed = "";
let usage;
const stream = await client.chat.completions.create({
  ...question,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
console.log("streamed:", JSON.stringify(streamed));
console.log("usage:", JSON.stringify(usage));

const seen = await client.chat.completions.create({
  model,
  messages: [
    {
      role: "user",
      content: [
        { type: "image_url", image_url: { url: await pictureUrl(process.argv[2]) } },
        { type: "text", text: "Which colour is this?" },
      ],
    },
  ],
  max_tokens: 24,
  temperature: 0,
});
console.log("picture:", JSON.stringify(seen.choices[0].message.content), seen.usage.prompt_tokens, "tokens of prompt");
