"""Several images in one prompt: written by hand, and as a conversation of URLs."""

from PIL import Image
from vllm import LLM, SamplingParams
from vllm.multimodal.utils import encode_image_url, fetch_image

URLS = [encode_image_url(Image.new("RGB", (56, 56), color)) for color in ("red", "green")]
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
MARK = "<|vision_bos|><|IMAGE|><|vision_eos|>"


def run_generate(llm: LLM, params: SamplingParams) -> None:
    prompt = TURN.format(MARK * len(URLS) + "What differs?")
    outputs = llm.generate(
        {"prompt": prompt, "multi_modal_data": {"image": [fetch_image(url) for url in URLS]}}, sampling_params=params
    )
    for output in outputs:
        print(len(output.prompt_token_ids), output.outputs[0].token_ids)


def run_chat(llm: LLM, params: SamplingParams) -> None:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in URLS]
    content = [*parts, {"type": "text", "text": "What differs?"}]
    outputs = llm.chat([{"role": "user", "content": content}], sampling_params=params, use_tqdm=False)
    for output in outputs:
        print(output.outputs[0].token_ids)


if __name__ == "__main__":
    engine = LLM(model="Qwen/Qwen2.5-Omni-7B", limit_mm_per_prompt={"image": len(URLS)}, max_num_seqs=2)
    sampling = SamplingParams(temperature=0.0, max_tokens=4)
    run_generate(engine, sampling)
    run_chat(engine, sampling)
