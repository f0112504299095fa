"""`kvstore plan`: how much memory and disk a hit rate takes, for a trace and a model."""

import json
import re
from pathlib import Path

import click
from rich.console import Console

from kvstore.policy.policies import DEFAULT, POLICIES
from kvstore.replay.model_size import ModelError, ModelSize, model_size
from kvstore.replay.options import FILE, progress, read_source, trace_options
from kvstore.replay.plan import Question, answer
from kvstore.replay.plan_report import draw, sentences, tables
from kvstore.replay.runs import Source, run_cells

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15,
          "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40, "pi": 2**50}  # fmt: skip


class Size(click.ParamType[int]):
    """A number of bytes, as people write it."""

    name = "size"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """`64GiB`, `1.5 TB`, `1000`."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgtp]?i?)b?", value.strip().lower())
        if found is None or found[2] not in _UNITS:
            self.fail(f"{value!r} is no size such as 64GiB, 1.5TiB or 1000000000", param, ctx)
        return int(float(found[1]) * _UNITS[found[2]])


@click.command(
    epilog="""\b
Examples:
  kvstore plan trace.jsonl --kv-bytes-per-token 131072
  kvstore plan trace.jsonl --model-config config.json --hit-rate 0.3
  kvstore plan trace.jsonl --model-config config.json --memory 256GiB --disk 4TiB --png plan.png
\b
131072 bytes per token: Llama-3.1-8B in 16 bit. Tensor parallelism divides them among ranks;
the whole model's bytes give the size for all ranks together. Of a model that mixes kinds of
layers, those with attention to the whole prompt count; the output says which were left out.
"""
)
@trace_options
@click.option(
    "--kv-bytes-per-token",
    type=click.IntRange(1),
    metavar="N",
    help="Bytes of keys and values that a token takes, all layers together.",
)
@click.option(
    "--model-config",
    type=FILE,
    help="The model's Hugging Face config.json, to compute that from. One of the two is needed.",
)
@click.option(
    "--hit-rate",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    default=0.3,
    show_default=True,
    help="The goal: the share of prompt tokens that come from memory or disk, 0 to 1.",
)
@click.option(
    "--memory", "memory_bytes", type=Size(), default="64GiB", show_default=True,
    help="Memory for blocks, such as 64GiB or 64GB.",
)  # fmt: skip
@click.option(
    "--disk", "disk_bytes", type=Size(), default="1TiB", show_default=True,
    help="Disk for blocks; 0: without.",
)  # fmt: skip
@click.option(
    "--policy", type=click.Choice(list(POLICIES)), default=DEFAULT, show_default=True,
    help="What memory evicts by.",
)  # fmt: skip
def plan(
    trace_file: Path,
    hints_file: Path | None,
    limit: int | None,
    jobs: int,
    json_file: Path | None,
    png_file: Path | None,
    kv_bytes_per_token: int | None,
    model_config: Path | None,
    hit_rate: float,
    memory_bytes: int,
    disk_bytes: int,
    policy: str,
) -> None:
    """Say how much memory and disk a hit rate takes, and what the next GiB buys.

    TRACE is a file as `kvstore replay` takes it. It is replayed through memory alone and through
    --memory over disk, at several sizes, by the code that a node runs: what memory evicts goes to
    disk, and a clean copy stays there when a block comes back. Answered are: what --memory and
    --disk are worth, and how much memory alone, or disk beside --memory, reaches --hit-rate.

    Each answer is the best that was found with at most so much memory and disk:
    with more room a policy may do worse, but who has more can use less of it. Between the sizes
    that were tried, answers are interpolated.
    """
    source = Source(trace_file, hints_file, limit)
    model = _model_size(kv_bytes_per_token, model_config)
    trace = read_source(source)
    question = Question(trace, model.bytes_per_token, memory_bytes, disk_bytes, hit_rate, policy)
    if memory_bytes < question.block_bytes:
        raise click.BadParameter(
            f"one block of this model takes {question.block_bytes:,} bytes", param_hint="--memory"
        )
    cells = question.cells()
    with progress("plan", len(cells) * len(trace.requests)) as tick:
        found = dict(run_cells(source, trace, cells, jobs, tick))
    result = answer(question, found)
    if json_file is not None:
        json_file.write_text(json.dumps(result.as_dict(), indent=1) + "\n")
    if png_file is not None:
        draw(result, png_file)
    console = Console()
    if model.counted:
        console.print(model.counted, highlight=False, markup=False)
    for table in tables(result):
        console.print(table)
    for sentence in sentences(result):
        console.print(sentence, highlight=False)


def _model_size(given: int | None, config: Path | None) -> ModelSize:
    if (given is None) == (config is None):
        raise click.UsageError("give either --kv-bytes-per-token or --model-config")
    if given is not None:
        return ModelSize(given, "")
    assert config is not None
    try:
        return model_size(config)
    except ModelError as error:
        raise click.ClickException(str(error)) from None
