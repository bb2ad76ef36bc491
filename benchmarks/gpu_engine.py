"""The engine on an accelerator: a Qwen2-VL of published 2B sizes with random weights, made on the device.

    python3 benchmarks/gpu_engine.py [--quick]

Run it twice to see a cold and a warm start. Needs no checkpoint: the tokenizer is that of the tests' tiny model.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
from mmjax.bench import Bench, Workload  # noqa: E402

SIZES = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 1536,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip

WORK = {
    "batch 1, text 128 in, 128 out": Workload(prompts=1, text=128, output=128),
    "batch 32, text 128 in, 128 out": Workload(prompts=32, text=128, output=128),
    "batch 128, text 128 in, 128 out": Workload(prompts=128, text=128, output=128),
    "64 images of 640x480, 32 out": Workload(prompts=64, text=32, images=((640, 480),), output=32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first two cases only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiny.make("qwen2_vl", Path(folder))
        engine = {
            "load_format": "dummy", "hf_overrides": SIZES, "max_model_len": 4096, "max_num_seqs": 128,
            "max_num_batched_tokens": 8192, "enable_prefix_caching": False,
        }  # fmt: skip
        bench = Bench(folder, engine)
        print("parts", json.dumps({k: round(v, 2) for k, v in bench.llm.get_metrics().items()}), flush=True)
        for name, work in list(WORK.items())[: 2 if args.quick else None]:
            bench.warm_up(work)
            before = bench.llm.get_metrics()
            report = bench.run(work, seed=1)
            now = bench.llm.get_metrics()
            shares = {
                part: (now[part] - before[part]) / report.wall_s for part in ("call_s", "wait_s", "host_s", "idle_s")
            }
            print(f"== {name}\n{report.as_table()}", flush=True)
            print("of wall time", {part: f"{share:.1%}" for part, share in shares.items()}, flush=True)
            print(json.dumps({"case": name, **dataclasses.asdict(report)}), flush=True)


if __name__ == "__main__":
    main()
