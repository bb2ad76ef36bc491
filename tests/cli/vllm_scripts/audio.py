"""No, one or two recordings in a prompt."""

from dataclasses import asdict

from vllm import LLM, EngineArgs, SamplingParams
from vllm.assets.audio import AudioAsset
from vllm.utils import FlexibleArgumentParser

MARY = AudioAsset("mary_had_lamb")


def second(start: int):
    samples, rate = MARY.audio_and_sample_rate
    return samples[start * int(rate) : (start + 1) * int(rate)], rate


if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    parser.add_argument("--num-audios", type=int, default=1, choices=[0, 1, 2])
    count = parser.parse_args().num_audios
    engine_args = EngineArgs("Qwen/Qwen2.5-Omni-7B", max_num_seqs=5, limit_mm_per_prompt={"audio": count})
    llm = LLM(**asdict(engine_args) | {"seed": 0})
    marks = "<|audio_bos|><|AUDIO|><|audio_eos|>" * count
    prompt = {"prompt": f"<|im_start|>user\n{marks}What is heard?<|im_end|>\n<|im_start|>assistant\n"}
    if count:
        prompt["multi_modal_data"] = {"audio": [second(i) for i in range(count)]}
    params = SamplingParams(temperature=0.2, seed=1, max_tokens=4)
    for output in llm.generate(prompt, params):
        print(len(output.prompt_token_ids), len(output.outputs[0].token_ids))
