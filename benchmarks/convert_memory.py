"""How much memory `mmjax convert` takes for a checkpoint in several files, and how long.

    python benchmarks/convert_memory.py [--layers 16] [--shards 8] [--dtype bfloat16]

The checkpoint is a Qwen2-VL with random float32 weights: 1.6 GB with 16 layers. The peak is what the operating system
counts for the process of `mmjax convert`, pages of mapped files included.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    "width": 1280, "mlp": 5120, "heads": 20, "kv_heads": 4,
    "tower_layers": 8, "tower_width": 384, "tower_mlp": 1536, "tower_heads": 6,
}  # fmt: skip


def make(folder: Path, layers: int, shards: int) -> None:
    sys.path.append(str(ROOT / "tests"))
    import tiny

    tiny.make("qwen2_vl", folder, shards=shards, layers=layers, **SIZES)


def convert(source: Path, made: Path, dtype: str | None) -> tuple[float, float]:
    """(seconds, peak MiB) of `mmjax convert`."""
    words = [sys.executable, "-m", "mmjax", "convert", str(source), str(made), *(["--dtype", dtype] if dtype else [])]
    begin = time.perf_counter()
    process = subprocess.Popen(words, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - begin, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=16, help="layers of the language model, 100 MB each")
    parser.add_argument("--shards", type=int, default=8, help="files of the checkpoint")
    parser.add_argument("--dtype", help="passed on to `mmjax convert`; default: as stored")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        # A process of its own: on Linux a child's peak is never told as less than its parent's.
        maker = multiprocessing.get_context("spawn").Process(
            target=make, args=(source, arguments.layers, arguments.shards)
        )
        maker.start()
        maker.join()
        stored = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        seconds, peak = convert(source, Path(folder) / "made", arguments.dtype)
    print(f"{stored / 1e6:.0f} MB in {arguments.shards} files: {seconds:.1f} s, peak {peak:.0f} MiB")


if __name__ == "__main__":
    main()
