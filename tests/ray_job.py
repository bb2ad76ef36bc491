"""The batch job of tests/replicas/test_ray.py, and a program that starts it: python ray_job.py MEDIA OUT ADDRESS."""

import base64
import io
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from mmjax.ray import EngineProcessorConfig, build_processor

ENGINE = {"max_model_len": 512, "max_num_batched_tokens": 256, "max_num_seqs": 4, "enforce_eager": True}


def kill_once(mark: str) -> str:
    """End the process that unpickles a `Fatal`, unless an earlier one has been ended."""
    if not os.path.exists(mark):
        Path(mark).touch()
        os._exit(1)
    return "Hello"


class Fatal:
    """A text that ends the first process that reads it."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return kill_once, (self.mark,)


def question(row: dict[str, Any]) -> dict[str, Any]:
    """The conversation about a file: a picture, a recording or a text."""
    data, path = row["bytes"], Path(row["path"])
    content: Any = data.decode() if path.suffix == ".txt" else None
    if path.suffix == ".png":
        picture = {"type": "image_pil", "image_pil": Image.open(io.BytesIO(data))}
        content = [picture, {"type": "text", "text": "How many objects are there?"}]
    elif path.suffix == ".ogg":
        sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "ogg"}}
        content = [sound, {"type": "text", "text": "What do you hear?"}]
    elif path.suffix == ".fatal":
        content = Fatal(str(path.parent.with_suffix(".mark")))
    sampling_params = {"temperature": 0, "max_tokens": 16}
    return {"messages": [{"role": "user", "content": content}], "sampling_params": sampling_params}


def run(media: str, out: str, name: str, **settings: Any) -> None:
    """Answer the questions about all files, and write the answers with the name of this run."""
    import ray

    config = EngineProcessorConfig(
        "demo", ENGINE, batch_size=2, resources_per_actor={"num_cpus": 0}, should_continue_on_error=True, **settings
    )
    columns = ("path", "generated_text", "num_generated_tokens")
    processor = build_processor(config, question, lambda row: {"run": name, **{key: row[key] for key in columns}})
    processor.write(ray.data.read_binary_files(media, include_paths=True), out, id_column="path")


if __name__ == "__main__":
    import ray

    import ray_job  # what the actors import, instead of this program

    ray.init(address=sys.argv[3], log_to_driver=False)
    ray_job.run(sys.argv[1], sys.argv[2], "killed", max_concurrent_batches=1)
