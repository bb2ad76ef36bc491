"""Trains the model that ships with mmjax. From the repository root, on one GPU:

    python3 examples/train_demo/train.py --out runs/demo --minutes 25
    python3 examples/train_demo/train.py --out runs/demo2 --minutes 10 --total-minutes 35 --resume runs/demo

or, where there is none, over a night: `--minutes 600`. Needs torch, transformers and espeak-ng (installed, or a folder
with its library and data: --espeak). The learning rate follows the share of --total-minutes gone by, so stop and resume
as needed. Writes model.safetensors (half precision), what resuming needs, and log.txt; everything else of the
checkpoint lies in mmjax/demo/model already.

Every step is of one kind and of a small batch, every question by itself (`Rows.row`): looking things up in a picture is
learnt by the number of steps, hardly by their size. 6 million pictures in 6000 steps, without hints, left questions
about sides at chance (48 %) and counts at 83 %. So what counts is how long a step takes; see replay.py.

What was seen, of `mmjax demo --eval`, each time from fresh weights:

- One H100, 24.5 minutes, 75 400 steps of 18 ms (`--shares 0.7 0.1 0.2`, voices not yet `varied`): 100 % of 100
  questions of every skill about pictures and clips, and of the words; 0.4 % of the digits' words wrong. The picture
  skills stood between 97 and 100 % after 8 minutes; digits take longest. Of the trainer's own recordings, which are
  noisier, 7 % of the words were wrong, and 5.7 % after 7 more minutes, mostly of sounds.
- Batches as small as two CPU cores take (--size 0.1, 16 pictures): 22 000 steps, on a GPU for the time's sake, gave 94
  to 100 % of colours, shapes, sides, descriptions and whether there is one, 80 % of counts, 82 % of comparisons, 64 %
  of motions, and hardly a word yet. On the two cores of an AMD EPYC without AVX-512 a step takes 0.7 s: a night of 10
  hours has 50 000. No whole night has been run.

The weights that ship are of an hour on one H100, in three runs of this script while it was written. Of the trainer's
recordings they get 3.1 % of the words wrong, and are kept for that.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from batches import Batch, Form, Makers, Rows, talk, tests  # noqa: E402
from espeak import Espeak  # noqa: E402
from forward import Fast, Tensors, published  # noqa: E402
from replay import Replay  # noqa: E402

from mmjax.demo import DIRECTORY, ask  # noqa: E402

KINDS = ("image", "video", "audio")
WEIGHTS = {"text": 0.2}  # of a batch's losses, where that is not 1
SIZES = {"image": 160, "video": 160, "audio": 4800}  # of a batch: pictures, pictures' worth of tokens, mel frames


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of this run, all included")
    parser.add_argument("--total-minutes", type=float, help="of all runs together (default: --minutes)")
    parser.add_argument("--resume", type=Path, help="the --out of an earlier run")
    parser.add_argument("--espeak", type=Path, default=Path(__file__).parent / "espeak", help="folder of the library")
    parser.add_argument("--workers", type=int, default=max(3, (os.cpu_count() or 1) - 2))
    parser.add_argument("--size", type=float, help="batch sizes relative to a GPU's (default there: 1, else 0.1)")
    parser.add_argument(
        "--shares", nargs=3, type=float, default=(0.55, 0.1, 0.35), metavar=("IMAGE", "VIDEO", "AUDIO"),
        help="of the steps; workers follow",
    )  # fmt: skip
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--hints", type=float, default=0.3, help="weight of what is where, beside the answers")
    parser.add_argument("--steps", type=int, help="stop after so many")
    parser.add_argument("--test-size", type=int, default=128, help="rows of a test batch; two per skill")
    parser.add_argument("--test-minutes", type=float, default=2.0, help="between tests")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    return parser.parse_args()


def build(device: str) -> Any:
    """The thinker of mmjax/demo/model's configuration, with fresh weights that start well at this width."""
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    config = Qwen2_5OmniThinkerConfig(**json.loads((DIRECTORY / "config.json").read_text())["thinker_config"])
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config).float()
    depth = 4  # of every stack
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim < 2:
                continue
            if "embed_tokens" in name or "bos_eos" in name:
                value.normal_(std=0.3)
                continue
            std = 0.9 / math.sqrt(value[0].numel())
            if name.endswith(
                ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "out_proj.weight", "fc2.weight")
            ):
                std /= math.sqrt(2 * depth)
            value.normal_(std=std)
    return model.to(device)


class Gradients:
    """Where gradients are added up: tensors that stay, so that recorded steps find them."""

    def __init__(self, model: torch.nn.Module, hints: torch.nn.Module) -> None:
        named = [*model.named_parameters(), *hints.named_parameters("hints")]
        self.all = [(name, value, torch.zeros_like(value)) for name, value in named]

    def clear(self, kind: str) -> None:
        """For a step of one kind. What it cannot reach has no gradient, and the optimizer leaves it alone."""
        torch._foreach_zero_([gradient for *_, gradient in self.all])
        beyond = ("visual.", "hints.") if kind == "audio" else ("audio_tower.",)
        for name, value, gradient in self.all:
            value.grad = None if any(part in name for part in beyond) else gradient


class Training:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.start = time.monotonic()
        args.out.mkdir(parents=True, exist_ok=True)
        self.log = (args.out / "log.txt").open("a")
        self.before, self.step = 0.0, 0  # minutes and steps of earlier runs
        if args.resume:
            state = json.loads((args.resume / "state.json").read_text())
            self.before, self.step = state["minutes"], state["step"]
        self.total = args.total_minutes or args.minutes + self.before
        self.shares = {k: share for k, share in zip(KINDS, args.shares, strict=True) if k in args.kinds}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        size = args.size or (1.0 if self.device == "cuda" else 0.1)
        sizes = {kind: max(2, round(SIZES[kind] * size)) for kind in self.shares}
        total = sum(self.shares.values())
        self.shares = {kind: share / total for kind, share in self.shares.items()}
        speaks = "audio" in sizes
        self.makers = Makers(self.step, args.workers, sizes, args.espeak, self.shares)  # before the GPU is touched
        if self.device == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream())  # on the default one no step can be recorded
        self.tests = tests(Espeak(args.espeak) if speaks else None, args.test_size) if args.test_size else []
        self.rows = Rows()
        self.model = build(self.device)
        self.names = [published(name) for name, _ in self.model.named_parameters()]
        self.values = list(self.model.parameters())
        decayed = [p for p in self.values if p.ndim > 1]
        groups = [
            {"params": decayed, "weight_decay": 0.05},
            {"params": [p for p in self.values if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98), fused=self.device == "cuda")
        if args.resume:
            self.load(args.resume)
        self.fast = Fast(self.model, self.device, self.rows.encode("<|im_end|>")[0])
        self.optimizer.add_param_group({"params": list(self.fast.hints.parameters()), "weight_decay": 0.0})
        self.gradients = Gradients(self.model, self.fast.hints)
        self.replay = Replay(self.backward, self.device == "cuda")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        count = sum(p.numel() for p in self.values)
        self.say(f"{count / 1e6:.2f} M parameters on {self.device}, from step {self.step}, {self.before:.1f} minutes")

    def say(self, text: str) -> None:
        line = f"[{self.minutes():6.2f}] {text}"
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    def minutes(self) -> float:
        """Of this run so far."""
        return (time.monotonic() - self.start) / 60

    def rate(self, done: int) -> float:
        """Learning rate: up over the first 300 steps of all (100 of a resumed run), then down along a cosine."""
        gone = min(1.0, (self.before + self.minutes()) / self.total)
        warm = min(1.0, (self.step + 1) / 300, (done + 1) / 100 if self.args.resume else 1.0)
        return self.args.rate * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * gone)) / 2)

    def run(self) -> None:
        import numpy as np

        rng = np.random.default_rng([7, self.step])
        done, tested, told = 0, self.minutes(), time.monotonic()
        sums: dict[str, Any] = {}
        waited = 0.0
        every = 500 if self.device == "cuda" else 20
        reserve = 0.5 if self.args.minutes > 2 else 0.1
        while self.minutes() < self.args.minutes - reserve and done != self.args.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(done)
            begin = time.monotonic()
            batch = self.makers.take(rng.choice(list(self.shares), p=list(self.shares.values())))
            waited += time.monotonic() - begin
            self.gradients.clear(batch.kind)
            if done % 20 == 0:
                self.learn(talk(rng, self.rows, 16), sums)
            self.learn(batch, sums)
            norm = torch.nn.utils.clip_grad_norm_(self.values, 1.0)
            if torch.isfinite(norm):
                self.optimizer.step()
            else:
                self.say(f"step {self.step} of kind {batch.kind}: gradients of norm {float(norm)}, left out")
            done += 1
            self.step += 1
            if done % every == 0 or done == self.args.steps:
                now = time.monotonic()
                parts = [f"{k} {'/'.join(f'{x:.3f}' for x in (s / n).tolist())}" for k, (s, n) in sums.items()]
                speed = f"{(now - told) / every * 1000:.0f} ms/step, {waited / (now - told):.0%} waiting"
                lr = f"lr {self.rate(done):.1e}, {self.makers.again} sounds again"
                self.say(f"step {self.step} loss/right/hints: {', '.join(parts)}; {speed}, {lr}")
                sums, waited, told = {}, 0.0, now
            if self.minutes() - tested > self.args.test_minutes:
                self.save(self.args.out)
                self.test()
                tested = self.minutes()
                told = time.monotonic()
        self.makers.stop()
        self.save(self.args.out)
        self.test()
        self.say("done")

    def learn(self, batch: Batch, sums: dict[str, Any]) -> None:
        told = self.replay(batch.form, self.fast.given(batch))
        total, count = sums.get(batch.kind, (torch.zeros_like(told), 0))
        sums[batch.kind] = (total + told, count + 1)

    def backward(self, form: Form, given: Tensors) -> torch.Tensor:
        """Adds to the gradients; [loss of the answers, share of tokens predicted right, loss of the hints]."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss, hint, right = self.fast.loss(form, given)
        ((loss + self.args.hints * hint) * WEIGHTS.get(form.kind, 1.0)).backward()
        return torch.stack((loss.detach(), right, hint.detach()))

    def test(self) -> None:
        """Right answers per skill and word error rate on the held-out sets."""
        self.model.eval()
        right: dict[str, list[bool]] = {}
        wrong: list[str] = []
        errors = words = 0
        for batch in self.tests:
            if batch.kind not in self.args.kinds:
                continue
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                answers = self.fast.answer(batch)
            for asked, ids in zip(batch.asked, answers, strict=True):
                told = self.rows.backend.decode(ids)
                good = ask.correct(asked, told)
                right.setdefault(asked.skill, []).append(good)
                if not good and len(wrong) < 400 and sum(line.startswith(asked.skill) for line in wrong) < 3:
                    wrong.append(f"{asked.skill}: {asked.question} -> {told!r}, not {asked.answer!r}")
                if asked.skill == "digits" and asked.answer.split()[0] in ask.DIGITS:
                    errors += ask.word_errors(asked.answer, told)
                    words += len(asked.answer.split())
        self.model.train()
        parts = [f"{skill} {sum(hits) / len(hits):.1%}" for skill, hits in right.items()]
        self.say(f"HELD OUT: {', '.join(parts)}" + (f"; digit WER {errors / words:.1%}" if words else ""))
        for line in wrong:
            self.say(f"  {line}")

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, directory: Path) -> None:
        """model.safetensors in half precision; weights-*.safetensors, moments-*.safetensors, state.json to resume."""
        from safetensors.torch import save_file

        full = {name: value.detach().cpu() for name, value in zip(self.names, self.values, strict=True)}
        half = {name: value.half() for name, value in full.items()}
        save_file(half, directory / "model.safetensors", metadata={"format": "pt"})
        cut = len(full) // 2
        for part, names in enumerate((self.names[:cut], self.names[cut:])):
            save_file({name: full[name] for name in names}, directory / f"weights-{part}.safetensors")
        for key in ("exp_avg", "exp_avg_sq"):
            moments = {
                name: self.optimizer.state[value][key].bfloat16().cpu()
                for name, value in zip(self.names, self.values, strict=True)
                if value in self.optimizer.state
            }
            save_file(moments, directory / f"moments-{key}.safetensors")
        state = {"minutes": self.before + self.minutes(), "step": self.step}
        (directory / "state.json").write_text(json.dumps(state) + "\n")

    def load(self, directory: Path) -> None:
        from safetensors.torch import load_file

        full = {n: v for part in (0, 1) for n, v in load_file(directory / f"weights-{part}.safetensors").items()}
        moments = {key: load_file(directory / f"moments-{key}.safetensors") for key in ("exp_avg", "exp_avg_sq")}
        with torch.no_grad():
            for name, value in zip(self.names, self.values, strict=True):
                value.copy_(full[name].to(value.device))
                if name in moments["exp_avg"]:
                    self.optimizer.state[value] = {
                        "step": torch.tensor(float(self.step), device=value.device),
                        **{key: kept[name].to(value.device, value.dtype) for key, kept in moments.items()},
                    }


if __name__ == "__main__":
    Training(options()).run()
