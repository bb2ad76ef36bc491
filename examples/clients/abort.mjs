// Leaving an answer early: the server stops generating at once, and what the request held is free for others.
//
//   npm install --no-save openai
//   OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none node abort.mjs
import OpenAI from "openai";

const client = new OpenAI();
const model = (await client.models.list()).data[0].id;
const ask = { model, messages: [{ role: "user", content: "Count without end." }], ignore_eos: true, stream: true };

// /load is outside /v1: how many requests the server has under way.
async function underWay() {
  const answer = await fetch(new URL("/load", client.baseURL));
  return (await answer.json()).server_load;
}

async function idle() {
  const end = Date.now() + 60_000;
  while ((await underWay()) > 0) {
    if (Date.now() > end) throw new Error("the server still works on a request that was left");
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

// One way: leave the loop. The package closes the connection.
const left = await client.chat.completions.create(ask);
for await (const chunk of left) {
  if (chunk.choices[0]?.delta?.content) {
    console.log("left with", await underWay(), "under way");
    break;
  }
}
await idle();
console.log("after leaving:", await underWay());

// The other: a signal, which also ends a request that has not answered yet.
const stop = new AbortController();
const waiting = client.chat.completions.create({ ...ask, stream: false }, { signal: stop.signal });
setTimeout(() => stop.abort(), 50);
try {
  await waiting;
  console.log("answered before it was aborted");
} catch (error) {
  if (!(error instanceof OpenAI.APIUserAbortError)) throw error;
  console.log("aborted:", error.constructor.name);
}
await idle();
console.log("after aborting:", await underWay());
