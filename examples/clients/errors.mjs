// Errors arrive as the package's own exceptions, with the server's words.
//
//   npm install --no-save openai
//   OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none node errors.mjs
import OpenAI from "openai";

const client = new OpenAI({ maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "Hello" }];
const broken = { type: "image_url", image_url: { url: "data:image/png;base64,AAAA" } };

const wrong = {
  "no such model": { model: "another", messages },
  "an impossible value": { model, messages, temperature: -1 },
  "not a picture": { model, messages: [{ role: "user", content: [broken] }] },
  "more than the context": { model, messages, max_tokens: 1_000_000 },
};

for (const [what, body] of Object.entries(wrong)) {
  for (const stream of [false, true]) {
    try {
      await client.chat.completions.create({ ...body, stream });
      throw new Error(`${what}: answered nevertheless`);
    } catch (error) {
      if (!(error instanceof OpenAI.APIError)) throw error;
      console.log(`${what}: ${error.constructor.name} (status ${error.status}, param ${error.param}): ${error.message}`);
    }
  }
}

try {
  await new OpenAI({ apiKey: "surely-another", maxRetries: 0 }).models.list();
  console.log("a wrong key: this server accepts any");
} catch (error) {
  if (!(error instanceof OpenAI.AuthenticationError)) throw error;
  console.log(`a wrong key: ${error.constructor.name} (status ${error.status})`);
}
