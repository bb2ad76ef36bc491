"""Ask one question about several photographs: `python examples/images.py MODEL "What changed?" a.jpg b.jpg`."""

import argparse

from PIL import Image

from mmjax import LLM, SamplingParams

TEMPLATES = {
    "qwen2_vl": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "llava": "USER: {}\nASSISTANT:",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="directory or hub id, such as Qwen/Qwen2-VL-2B-Instruct")
    parser.add_argument("question")
    parser.add_argument("images", nargs="+", help="image files, in the order in which the question refers to them")
    parser.add_argument(
        "--template", choices=TEMPLATES, default="qwen2_vl", help="prompt format that the model was trained with"
    )
    parser.add_argument("--max-tokens", type=int, default=128)
    arguments = parser.parse_args()

    llm = LLM(arguments.model, max_model_len="auto", limit_mm_per_prompt={"image": len(arguments.images)})
    content = "<image>" * len(arguments.images) + arguments.question
    prompt = TEMPLATES[arguments.template].format(content)
    (output,) = llm.generate(
        {"prompt": prompt, "multi_modal_data": {"image": [Image.open(path) for path in arguments.images]}},
        SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens),
    )
    print(output.outputs[0].text)


if __name__ == "__main__":
    main()
