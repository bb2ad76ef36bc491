#!/usr/bin/env bash
# The server by hand: bash examples/clients/curl.sh [ADDRESS [PICTURE]], by default http://127.0.0.1:8000 and a picture
# of its own. With keys: MMJAX_API_KEY=... bash examples/clients/curl.sh
set -euo pipefail

address=${1:-http://127.0.0.1:8000}
picture=${2:-}
ask=(curl --silent --show-error --fail-with-body --max-time 600)
if [ -n "${MMJAX_API_KEY:-}" ]; then
  ask+=(--header "Authorization: Bearer $MMJAX_API_KEY")
fi

post() { # ROUTE, with the JSON on standard input
  "${ask[@]}" "$address$1" --header "Content-Type: application/json" --data-binary @-
  echo
}

echo "== health, the model's name, requests in progress"
"${ask[@]}" "$address/health"
"${ask[@]}" "$address/v1/models"
echo
"${ask[@]}" "$address/load"
echo

echo "== a conversation"
post /v1/chat/completions <<'JSON'
{
  "messages": [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What is a cache?"}
  ],
  "max_tokens": 24, "temperature": 0
}
JSON

echo "== the same, streamed: one event per piece, [DONE] at the end"
post /v1/chat/completions <<'JSON'
{
  "messages": [{"role": "user", "content": "What is a cache?"}],
  "max_tokens": 24, "stream": true, "stream_options": {"include_usage": true}
}
JSON

echo "== a picture"
if [ -n "$picture" ]; then
  image="data:image/${picture##*.};base64,$(base64 -w 0 "$picture")"
else # 64 x 64 pixels, red
  image="data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAAUElEQVR42u3PQREAAAQAMATRP5QwUni42xospzs+q3hOQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBA4N4CCJ0BmOb2hBcAAAAASUVORK5CYII="
fi
post /v1/chat/completions <<JSON
{
  "messages": [{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": "$image"}},
    {"type": "text", "text": "Which colour is this?"}
  ]}],
  "max_tokens": 24
}
JSON

echo "== the same in the form of OpenAI's newer clients"
post /v1/responses <<JSON
{
  "instructions": "Answer in one sentence.",
  "input": [{"role": "user", "content": [
    {"type": "input_image", "image_url": "$image"},
    {"type": "input_text", "text": "Which colour is this?"}
  ]}],
  "max_output_tokens": 24
}
JSON

echo "== plain text, continued; two prompts in one request"
post /v1/completions <<'JSON'
{"prompt": ["Once upon a time", "It was a dark"], "max_tokens": 12, "temperature": 0}
JSON

echo "== an answer that must be one of two words"
post /v1/chat/completions <<'JSON' || echo "the server was installed without mmjax[structured]"
{
  "messages": [{"role": "user", "content": "Is the sky blue?"}],
  "structured_outputs": {"choice": ["yes", "no"]}
}
JSON

echo "== tokens of a conversation"
post /tokenize <<'JSON'
{"messages": [{"role": "user", "content": "Hello"}]}
JSON

echo "== figures for Prometheus"
"${ask[@]}" "$address/metrics" | grep '^vllm:generation_tokens_total'

echo "== an error: a status and a message that says what to change"
"${ask[@]}" "$address/v1/chat/completions" --header "Content-Type: application/json" \
  --data '{"messages": [{"role": "user", "content": "Hello"}], "temperature": -1}' || true
echo
