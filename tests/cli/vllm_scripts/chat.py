"""Conversations, with every flag of the engine on the command line."""

from vllm import LLM, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser


def create_parser() -> FlexibleArgumentParser:
    parser = FlexibleArgumentParser()
    engine_group = parser.add_argument_group("Engine arguments")
    EngineArgs.add_cli_args(engine_group)
    engine_group.set_defaults(model="Qwen/Qwen2.5-Omni-7B")
    sampling_group = parser.add_argument_group("Sampling parameters")
    sampling_group.add_argument("--max-tokens", type=int)
    sampling_group.add_argument("--temperature", type=float)
    parser.add_argument("--chat-template-path", type=str)
    return parser


def main(args: dict) -> None:
    max_tokens, temperature = args.pop("max_tokens"), args.pop("temperature")
    template_path = args.pop("chat_template_path")
    llm = LLM(**args)
    params = llm.get_default_sampling_params()
    if max_tokens is not None:
        params.max_tokens = max_tokens
    if temperature is not None:
        params.temperature = temperature
    conversation = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": "Write a line."},
    ]
    for output in llm.chat([conversation] * 2, params, use_tqdm=True):
        print(repr(output.prompt[:12]), len(output.outputs[0].token_ids))
    if template_path is not None:
        with open(template_path) as file:
            template = file.read()
        print(repr(llm.chat(conversation, params, use_tqdm=False, chat_template=template)[0].prompt))


if __name__ == "__main__":
    main(vars(create_parser().parse_args()))
