"""`kvstore demo`: the whole path on this machine, and the proof that nothing changes but time."""

import json
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvstore.api.errors import KvstoreError
from kvstore_workers.demo.cluster import Cluster
from kvstore_workers.demo.documents import document_tokens, load_tokenizer
from kvstore_workers.demo.play import Played, Player
from kvstore_workers.demo.report import Report, draw_report, print_report
from kvstore_workers.demo.script import (
    AFTER_CRASH,
    BEFORE_CRASH,
    DOCUMENT_TOKENS,
    MODULES,
    Round,
)
from kvstore_workers.demo.textbook import NEW_TOKENS, decode_speedup
from kvstore_workers.demo_model import demo_model_dir
from kvstore_workers.layout import read_layout
from kvstore_workers.machine import describe_machine
from kvstore_workers.worker import WorkerConfig

VRAM_BLOCKS = 176
MEMORY_BLOCKS = 96


@click.command()
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Also write the report as JSON."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    help="Folder for the picture (ttft.png).",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A local Hugging Face checkpoint of the Llama family with tokenizer.json and at least "
    "4,096 positions, instead of the small model that comes along.",
)
def demo(json_file: Path | None, out: Path, model: Path | None) -> None:
    """Run tenants, two Ray workers, a store node, Redis and a crash on this machine.

    Three tenants talk about long documents. Every request runs twice, with the cache and without,
    and must give the same tokens and the same first logits to the bit. In between the store node
    is killed and comes back without Redis. Exits with 1 if an answer differs or a tier never
    served. Takes about two minutes on two cores.
    """
    console = Console()
    try:
        report = _run(model or demo_model_dir(), console)
    except KvstoreError as error:
        raise click.ClickException(str(error)) from None
    print_report(report, console)
    out.mkdir(parents=True, exist_ok=True)
    draw_report(report, out / "ttft.png")
    console.print(f"picture: {out / 'ttft.png'}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report.as_data(), indent=2) + "\n")
        console.print(f"data: {json_file}")
    if report.shortcomings():
        raise SystemExit(1)


def _run(checkpoint: Path, console: Console) -> Report:
    tokenizer = load_tokenizer(checkpoint)
    documents = {
        tenant: document_tokens(tokenizer, module, tenant, DOCUMENT_TOKENS[tenant])
        for tenant, module in MODULES.items()
    }
    worker = WorkerConfig(
        checkpoint=checkpoint,
        threads=1,
        vram_blocks=VRAM_BLOCKS,
        tokens=dict.fromkeys(MODULES, ""),
        record_spill_digests=True,
        # So small a model computes sooner than it loads; here the path is to be seen.
        restore_gate=False,
    )
    layout = read_layout(checkpoint, worker.block_tokens, worker.dtype)
    requests = sum(len(act.turns) for act in (*BEFORE_CRASH, *AFTER_CRASH))
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    with tempfile.TemporaryDirectory(prefix="kvstore-demo-") as home, progress:
        steps = progress.add_task("starting Ray, Redis, the store and two workers", total=requests)
        with Cluster(
            Path(home), worker, layout.block_bytes, memory_blocks=MEMORY_BLOCKS
        ) as cluster:
            player = Player(
                cluster,
                tokenizer,
                documents,
                worker.block_tokens,
                advance=lambda: progress.advance(steps),
            )

            def play(acts: tuple[Round, ...]) -> list[Played]:
                played = []
                for act in acts:
                    progress.update(steps, description=f"worker {act.worker}: {act.shows}")
                    played += player.play(act)
                return played

            before = play(BEFORE_CRASH)
            counted = cluster.counters()["node"]
            progress.update(steps, description="SIGKILL, and a start without Redis")
            cluster.crash_and_restart()
            after = play(AFTER_CRASH)
            progress.update(steps, description="all requests answered")
            tokens = progress.add_task("the textbook: no KV cache at all", total=NEW_TOKENS)
            speedup = decode_speedup(
                lambda asked: cluster.generate("A", asked),
                "acme",
                documents["acme"],
                advance=lambda: progress.advance(tokens),
            )
            counters = {**cluster.counters(), "node before the crash": counted}
    return Report(describe_machine(), before, after, speedup, counters)
