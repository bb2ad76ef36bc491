"""An image or a video for one of several models, by the flags of the command line."""

from argparse import Namespace
from contextlib import contextmanager
from dataclasses import asdict
from time import perf_counter
from typing import NamedTuple

from vllm import LLM, EngineArgs, SamplingParams
from vllm.assets.image import ImageAsset
from vllm.assets.video import VideoAsset
from vllm.lora.request import LoRARequest
from vllm.multimodal.image import convert_image_mode
from vllm.utils.argparse_utils import FlexibleArgumentParser


class Setup(NamedTuple):
    engine_args: EngineArgs
    prompts: list[str]
    stop_token_ids: list[int] | None = None
    lora_requests: list[LoRARequest] | None = None


def omni(questions: list[str], modality: str) -> Setup:
    mark = {"image": "<|IMAGE|>", "video": "<|VIDEO|>"}[modality]
    engine_args = EngineArgs(
        model="Qwen/Qwen2.5-Omni-7B",
        max_model_len=4096,
        max_num_seqs=5,
        trust_remote_code=True,
        mm_processor_kwargs={"min_pixels": 28 * 28, "max_pixels": 56 * 56},
        limit_mm_per_prompt={modality: 1},
    )
    prompts = [
        f"<|im_start|>user\n<|vision_bos|>{mark}<|vision_eos|>{question}<|im_end|>\n<|im_start|>assistant\n"
        for question in questions
    ]
    return Setup(engine_args, prompts)


MODELS = {"omni": omni}


@contextmanager
def timed(label: str):
    start = perf_counter()
    yield
    print(label, perf_counter() - start > 0)


def main(args: Namespace) -> None:
    if args.modality == "image":
        data = convert_image_mode(ImageAsset("cherry_blossom").pil_image, "RGB")
    else:
        asset = VideoAsset(name="baby_reading", num_frames=args.num_frames)
        data = [(asset.np_ndarrays, asset.metadata)]
    setup = MODELS[args.model_type](["What is shown?", "What color is it?"], args.modality)
    default_limits = {"image": 0, "video": 0, "audio": 0}
    setup.engine_args.limit_mm_per_prompt = default_limits | dict(setup.engine_args.limit_mm_per_prompt or {})
    engine_args = asdict(setup.engine_args) | {"seed": args.seed, "mm_processor_cache_gb": 4}
    if args.tensor_parallel_size is not None:
        engine_args["tensor_parallel_size"] = args.tensor_parallel_size
    llm = LLM(**engine_args)
    params = SamplingParams(temperature=0.0, max_tokens=4, stop_token_ids=setup.stop_token_ids)
    inputs = [
        {
            "prompt": setup.prompts[i % len(setup.prompts)],
            "multi_modal_data": {args.modality: data},
            "multi_modal_uuids": {args.modality: "uuid_0"},
        }
        for i in range(args.num_prompts)
    ]
    with timed("elapsed"):
        outputs = llm.generate(inputs, sampling_params=params, lora_request=None, use_tqdm=False)
    for output in outputs:
        print(len(output.prompt_token_ids), repr(output.outputs[0].text))


def parse_args() -> Namespace:
    parser = FlexibleArgumentParser(description="Vision with one model")
    parser.add_argument("--model-type", "-m", choices=MODELS.keys(), default="omni")
    parser.add_argument("--num-prompts", type=int, default=2)
    parser.add_argument("--modality", choices=["image", "video"], default="image")
    parser.add_argument("--num-frames", type=int, default=4)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
