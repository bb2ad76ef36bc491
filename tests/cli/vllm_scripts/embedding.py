"""Vectors of texts and of an image, and how alike they are."""

from argparse import Namespace

from PIL import Image
from vllm import LLM, EngineArgs, PoolingParams
from vllm.config import PoolerConfig
from vllm.entrypoints.pooling.score.utils import ScoreMultiModalParam  # noqa: F401
from vllm.outputs import EmbeddingRequestOutput, ScoringRequestOutput
from vllm.utils.argparse_utils import FlexibleArgumentParser

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def parse_args() -> Namespace:
    parser = FlexibleArgumentParser()
    parser = EngineArgs.add_cli_args(parser)
    parser.set_defaults(
        model="Qwen/Qwen2-VL-2B-Instruct",
        runner="pooling",
        enforce_eager=True,
        pooler_config=PoolerConfig(seq_pooling_type="LAST", use_activation=True),
    )
    return parser.parse_args()


def main(args: Namespace) -> None:
    llm = LLM(**vars(args))
    picture = {"prompt": IMAGE + "Represent this.", "multi_modal_data": {"image": Image.new("RGB", (56, 56), "red")}}
    outputs = llm.embed(["Hello, my name is", picture], use_tqdm=False)
    for output in outputs:
        assert isinstance(output, EmbeddingRequestOutput)
        vector = output.outputs.embedding
        print(len(vector), round(sum(x * x for x in vector), 3))
    (output,) = llm.encode("Hello", PoolingParams(dimensions=8), pooling_task="embed", use_tqdm=False)
    print(output.outputs.data.shape)
    scores = llm.score("Hello, my name is", ["Hello, my name is", "Goodbye"], use_tqdm=False)
    assert isinstance(scores[0], ScoringRequestOutput)
    print(round(scores[0].outputs.score, 3), scores[1].outputs.score < 1)


if __name__ == "__main__":
    main(parse_args())
