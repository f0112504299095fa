"""Train the demonstration model, or check one that was trained before."""

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from kvstore_workers.demo_model import corpus, demo_model_dir
from kvstore_workers.demo_model.model import (
    LOSS_LIMIT,
    DemoModelError,
    HeldOut,
    Losses,
    batch_loss,
    build_model,
    final_losses,
    load_model,
    save_model,
)
from kvstore_workers.demo_model.plan import LR_PEAK, Phase, Plan, learning_rate

MODEL_BYTES_MAX = 8_000_000
LOG_EVERY_STEPS = 40
EVALUATIONS = 10
WEIGHT_DECAY = 0.1
GRADIENT_NORM_MAX = 1.0
LICENCE = "PSF-2.0 text; weights Apache-2.0"

DESCRIPTION = """\
Train a Llama of 3 million parameters on the sources of this interpreter's standard library.

Nothing is downloaded. The run first learns a byte-level BPE tokenizer (4096 tokens) from the
training files, then trains in three phases: short context for most of the time, then a middle
one, and a long one last. About one file in twenty is never trained on; the loss on those files,
at 256 and at 3000 tokens of context, is what the run is judged by.
"""

EPILOG = """\
files written to DIR, all at once when the run ends:
  config.json        the Llama configuration
  model.safetensors  the weights in bfloat16
  tokenizer.json     the tokenizer, for tokenizers.Tokenizer.from_file
  loss.jsonl         one JSON object per logged step
  digest.json        SHA-256 sums, held-out losses, corpus and licence

examples:
  python -m kvstore_workers.demo_model.train --out build/demo
  python -m kvstore_workers.demo_model.train --out /tmp/try --minutes 1
  python -m kvstore_workers.demo_model.train --check

Ctrl-C stops a run and leaves DIR as it was. The same seed, minutes, Python version, library
versions and number of threads give the same weights. Exit status: 0 when the held-out losses are
at most 3.6 nats per token, 1 when they are not or the check fails, 2 on a wrong command line,
130 after Ctrl-C.
"""


def build_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices only."""
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    scales = [weight for weight in model.parameters() if weight.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR_PEAK, betas=(0.9, 0.98), fused=True)


class Run:
    """One training run: its model, its optimizer, its log and how far it has come."""

    def __init__(
        self, model: LlamaForCausalLM, held_out: HeldOut, log: TextIO, console: Console
    ) -> None:
        """Make a run that has not begun; `log` gets one JSON object per logged step."""
        self.model = model
        self.held_out = held_out
        self.log = log
        self.console = console
        self.optimizer = build_optimizer(model)
        self.tokens_seen = 0
        self.last_loss = math.nan
        self.recent_losses: list[float] = []
        self.started = time.monotonic()

    def train(self, stream: Tensor, plan: Plan) -> None:
        """Train through all phases, showing a progress bar on the console."""
        steps = sum(phase.steps(plan.minutes) for phase in plan.phases)
        with progress_bar(self.console) as progress:
            task = progress.add_task("", total=steps, loss="")
            for step, (phase, batch) in enumerate(schedule(stream, plan)):
                self.take_step(batch, learning_rate(step, steps, plan.lr_peak))
                self.report(step + 1, steps, phase)
                progress.update(
                    task,
                    advance=1,
                    description=f"{phase.name} context, {phase.context_tokens}",
                    loss=f"{self.last_loss:.3f}",
                )

    def take_step(self, batch: Tensor, lr: float) -> None:
        """Change the weights by one step of the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = batch_loss(self.model, batch)
        torch.autograd.backward([loss])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM_MAX)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens_seen += batch.shape[0] * (batch.shape[1] - 1)
        self.last_loss = float(loss.detach())
        self.recent_losses.append(self.last_loss)
        if not math.isfinite(self.last_loss):
            raise DemoModelError("the loss is no longer a number: try another --seed")

    def report(self, step: int, steps: int, phase: Phase) -> None:
        """Log the step where one is due, with held-out losses at every tenth of the run."""
        evaluating = step == steps or step % max(1, steps // EVALUATIONS) == 0
        if not evaluating and step % LOG_EVERY_STEPS and step != 1:
            return
        record: dict[str, Any] = {
            "step": step,
            "phase": phase.name,
            "context_tokens": phase.context_tokens,
            "tokens_seen": self.tokens_seen,
            "train_loss": round(sum(self.recent_losses) / len(self.recent_losses), 4),
            "seconds": round(time.monotonic() - self.started, 1),
        }
        self.recent_losses.clear()
        if evaluating:
            losses = self.held_out.losses(self.model)
            record |= {name: round(loss, 4) for name, loss in asdict(losses).items()}
            self.console.print(f"step {step} of {steps}: {losses.describe()}")
        self.log.write(json.dumps(record) + "\n")
        self.log.flush()


def schedule(stream: Tensor, plan: Plan) -> Iterator[tuple[Phase, Tensor]]:
    """Yield the batches of a whole run in order, each with its phase."""
    for number, phase in enumerate(plan.phases):
        batches = corpus.training_batches(
            stream, phase.context_tokens, phase.windows_per_batch, plan.seed + number
        )
        for _ in range(phase.steps(plan.minutes)):
            yield phase, next(batches)


def progress_bar(console: Console) -> Progress:
    """Return a bar with the phase, the steps, the loss and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 sum of a file in hexadecimal."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DemoModelError(f"{path} cannot be read: {error.strerror}") from error


def write_digest(folder: Path, losses: Losses, run: Run, split: corpus.Split) -> None:
    """Write digest.json for the files that already lie in `folder`."""
    digest = {
        "sha256": sha256_of(folder / "model.safetensors"),
        "tokenizer_sha256": sha256_of(folder / "tokenizer.json"),
        "parameters": sum(weight.numel() for weight in run.model.parameters()),
        **{name: round(loss, 4) for name, loss in asdict(losses).items()},
        "tokens_trained": run.tokens_seen,
        "corpus": split.describe(),
        "licence": LICENCE,
    }
    (folder / "digest.json").write_text(json.dumps(digest, indent=2) + "\n", encoding="utf-8")


def train_into(folder: Path, plan: Plan, console: Console) -> Losses:
    """Train a model, write its files to `folder` and return its final losses."""
    split = corpus.load_split()
    console.print(split.describe())
    tokenizer = begin_tokenizer(plan, split)
    tokenizer.save(str(folder / "tokenizer.json"))
    stream = corpus.join_documents(corpus.encode_documents(tokenizer, split.training), plan.seed)
    documents = corpus.encode_documents(tokenizer, split.held_out)
    console.print(f"{len(stream)} tokens to train on, {sum(map(len, documents))} held out")
    model = begin_model(plan, tokenizer)
    with (folder / "loss.jsonl").open("w", encoding="utf-8") as log:
        run = Run(model, HeldOut.cut(documents, limit_256=64, limit_3000=6), log, console)
        if plan.more_from is not None:
            log.write((plan.more_from / "loss.jsonl").read_text(encoding="utf-8"))
            run.tokens_seen = read_digest(plan.more_from)["tokens_trained"]
        run.train(stream, plan)
    save_model(model, folder)
    if (folder / "model.safetensors").stat().st_size > MODEL_BYTES_MAX:
        raise DemoModelError(f"model.safetensors is larger than {MODEL_BYTES_MAX} bytes")
    losses = final_losses(load_model(folder), documents)
    write_digest(folder, losses, run, split)
    return losses


def begin_tokenizer(plan: Plan, split: corpus.Split) -> Tokenizer:
    """Return the tokenizer that the run goes on with, or a new one."""
    if plan.more_from is None:
        return corpus.train_tokenizer(split.training)
    tokenizer: Tokenizer = Tokenizer.from_file(str(plan.more_from / "tokenizer.json"))
    return tokenizer


def begin_model(plan: Plan, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Return the model that the run begins with, in float32."""
    if plan.more_from is None:
        return build_model(corpus.end_id(tokenizer), plan.seed)
    model: LlamaForCausalLM = load_model(plan.more_from).float()
    return model.train()


def train_command(out: Path, plan: Plan, console: Console) -> int:
    """Train into `out` and return the exit status; `out` changes only when the run is complete."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".training-", dir=out) as scratch:
        losses = train_into(Path(scratch), plan, console)
        # The digest goes last: while it is the old one, --check notices a half-made change.
        for path in sorted(Path(scratch).iterdir(), key=lambda path: path.name == "digest.json"):
            path.chmod(0o644)
            path.replace(out / path.name)
    console.print(f"{losses.describe()}; {time.monotonic() - started:.0f} seconds in all")
    if not losses.good():
        console.print(
            f"That is above {LOSS_LIMIT}: go on with --more-from {out}, or give more --minutes."
        )
    return 0 if losses.good() else 1


def read_digest(folder: Path) -> dict[str, Any]:
    """Return what digest.json in `folder` says."""
    try:
        digest: dict[str, Any] = json.loads((folder / "digest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DemoModelError(f"{folder} holds no readable digest.json: {error}") from error
    return digest


def check_command(folder: Path, console: Console) -> int:
    """Check the files in `folder` against their digest and limits; return the exit status."""
    digest = read_digest(folder)
    for key, name in (("sha256", "model.safetensors"), ("tokenizer_sha256", "tokenizer.json")):
        if sha256_of(folder / name) != digest.get(key):
            raise DemoModelError(f"{name} is not the file that digest.json names: train again")
    console.print("model.safetensors and tokenizer.json match digest.json")
    split = corpus.load_split()
    if split.describe() != digest.get("corpus"):
        console.print("Note: trained on another standard library; the figures may differ a little.")
    tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    losses = final_losses(load_model(folder), corpus.encode_documents(tokenizer, split.held_out))
    console.print(losses.describe())
    if not losses.good():
        console.print(f"That is above the limit of {LOSS_LIMIT}.")
    return 0 if losses.good() else 1


def positive_minutes(text: str) -> float:
    """Return `text` as a number of minutes above zero."""
    minutes = float(text)
    if not (math.isfinite(minutes) and minutes > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes above zero")
    return minutes


def positive_threads(text: str) -> int:
    """Return `text` as a whole number of threads above zero."""
    threads = int(text)
    if threads < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of threads above zero")
    return threads


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kvstore_workers.demo_model.train",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=demo_model_dir(),
        help="folder to write to, or to check (default: the package's own folder)",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=positive_minutes, metavar="N", default=25.0,
        help="how much to train, in minutes of two cores with bfloat16 matrix units; a slower or "
        "busier machine takes longer for the same steps (default: 25)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S",
        help="draws the first weights and the order of the text (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=positive_threads, metavar="T", default=torch.get_num_threads(),
        help="processor threads to compute with (default here: %(default)s); on a machine that "
        "others keep busy, 1 is often the fastest, as no thread waits for a delayed one",
    )  # fmt: skip
    parser.add_argument(
        "--more-from", type=Path, metavar="DIR",
        help="go on from the model in DIR, at a context of 3072 tokens alone",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true",
        help="train nothing: verify the digest in DIR and evaluate the held-out losses again",
    )  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = parse_arguments(arguments)
    console = Console(highlight=False)
    torch.set_num_threads(options.threads)
    try:
        if options.check:
            return check_command(options.out, console)
        plan = Plan(options.minutes, options.seed, options.more_from)
        return train_command(options.out, plan, console)
    except KeyboardInterrupt:
        console.print(f"Stopped; {options.out} holds what it held before.")
        return 130
    except (DemoModelError, corpus.CorpusError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1


if __name__ == "__main__":
    sys.exit(main())
