"""What the demo leaves behind: data for machines, a table and a picture for people."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kvstore_workers.demo.play import TIERS, Played

LONG_PROMPT_TOKENS = 1000


@dataclass(frozen=True, slots=True)
class Report:
    """All that was measured."""

    machine: dict[str, Any]
    before: Sequence[Played]
    after: Sequence[Played]
    decode_speedup: float
    counters: dict[str, dict[str, float]]
    """Of both workers, and of the node before the crash and at the end."""

    @property
    def requests(self) -> list[Played]:
        """All requests in the order in which they were asked."""
        return [*self.before, *self.after]

    @property
    def cross_worker_restored_tokens(self) -> int:
        """Tokens whose blocks one worker computed and the other restored."""
        return sum(played.cross_worker_tokens for played in self.requests)

    @property
    def restored_after_kill_tokens(self) -> int:
        """Tokens that came from disk after the crash."""
        return sum(played.restored_tokens["disk"] for played in self.after)

    @property
    def ttft_speedup_median(self) -> float:
        """Over all requests with long prompts, the cold ones included."""
        return statistics.median(
            played.ttft_nocache_ms / played.ttft_ms
            for played in self.requests
            if played.prompt_tokens >= LONG_PROMPT_TOKENS
        )

    def shortcomings(self) -> list[str]:
        """Why the demo is not in order; empty if it is."""
        wrong = [
            f"{played.tenant}/{played.person} on worker {played.worker} differs: {played.proof}"
            for played in self.requests
            if not played.proof.identical
        ]
        for tier in TIERS:
            if not any(played.restored_tokens[tier] for played in self.requests):
                wrong.append(f"the tier {tier} never served")
        if not self.cross_worker_restored_tokens:
            wrong.append("no worker restored what another had computed")
        if not self.restored_after_kill_tokens:
            wrong.append("nothing was restored from disk after the crash")
        return wrong

    def as_data(self) -> dict[str, Any]:
        """The report for machines."""
        return {
            "ok": not self.shortcomings(),
            "shortcomings": self.shortcomings(),
            "machine": self.machine,
            "requests": [
                {
                    "tenant": played.tenant,
                    "person": played.person,
                    "worker": played.worker,
                    "prompt_tokens": played.prompt_tokens,
                    "computed_tokens": played.computed_tokens,
                    "restored_tokens": played.restored_tokens,
                    "ttft_ms": round(played.ttft_ms, 2),
                    "ttft_nocache_ms": round(played.ttft_nocache_ms, 2),
                    "identical": played.proof.identical,
                }
                for played in self.requests
            ],
            "cross_worker_restored_tokens": self.cross_worker_restored_tokens,
            "restored_after_kill_tokens": self.restored_after_kill_tokens,
            "ttft_speedup_median": round(self.ttft_speedup_median, 3),
            "decode_speedup_with_kv_cache": round(self.decode_speedup, 3),
            "counters": self.counters,
        }


def print_report(report: Report, console: Console) -> None:
    """The table, and the sums below it."""
    table = Table(
        title="What each request cost",
        caption="worker, tenant/person · prompt tokens: restored from each tier, or computed ·\n"
        "time to first token in ms, and plain: without cache · same: to the bit",
        padding=0,
        box=box.SIMPLE_HEAD,
    )
    table.add_column("request", no_wrap=True)
    for name in ("prompt", *TIERS, "computed", "TTFT", "plain", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("same", no_wrap=True)
    for index, played in enumerate(report.requests):
        if index == len(report.before):
            table.add_section()
        ratio = played.ttft_nocache_ms / played.ttft_ms
        restored = [str(played.restored_tokens[tier] or "·") for tier in TIERS]
        table.add_row(
            f"{played.worker} {played.tenant}/{played.person}",
            str(played.prompt_tokens),
            *restored,
            str(played.computed_tokens),
            f"{played.ttft_ms:.0f}",
            f"{played.ttft_nocache_ms:.0f}",
            f"[{'green' if ratio > 1 else 'yellow'}]{ratio:.1f}×[/]",
            "[green]yes[/]" if played.proof.identical else "[bold red]NO[/]",
        )
    console.print(table)
    console.print(
        f"restored from another worker: {report.cross_worker_restored_tokens} tokens · "
        f"from disk after SIGKILL: {report.restored_after_kill_tokens} tokens\n"
        f"median speed-up of the time to first token: {report.ttft_speedup_median:.2f}× · "
        f"300 tokens with a KV cache: {report.decode_speedup:.1f}× as fast as without"
    )
    for shortcoming in report.shortcomings():
        console.print(f"[bold red]not in order:[/] {shortcoming}")


def draw_report(report: Report, path: Path) -> None:
    """A picture of the time to first token of every request, with the cache and without."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    requests = report.requests
    colours = dict(zip(TIERS, ("#2a9d8f", "#4c78a8", "#e76f51", "#8d6a9f"), strict=True))
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(11, 7), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    places = range(len(requests))
    above.bar([x - 0.2 for x in places], [p.ttft_nocache_ms for p in requests], 0.4,
              label="without cache", color="#c9c9c9")  # fmt: skip
    above.bar([x + 0.2 for x in places], [p.ttft_ms for p in requests], 0.4,
              label="with kvstore", color="#264653")  # fmt: skip
    above.set_ylabel("time to first token, ms")
    above.legend(frameon=False)
    bottom = [0] * len(requests)
    for tier in TIERS:
        heights = [played.restored_tokens[tier] for played in requests]
        below.bar(places, heights, 0.8, bottom=bottom, label=tier, color=colours[tier])
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    computed = [played.computed_tokens for played in requests]
    below.bar(places, computed, 0.8, bottom=bottom, label="computed", color="#d9d9d9")
    below.set_ylabel("prompt tokens")
    below.legend(frameon=False, ncols=5, loc="upper left")
    below.set_ylim(0, below.get_ylim()[1] * 1.2)
    below.set_xticks(list(places), [f"{p.person}\n{p.worker}" for p in requests])
    for axes in (above, below):
        axes.axvline(len(report.before) - 0.5, color="#b00020", linestyle=":", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
    above.text(len(report.before) - 0.45, above.get_ylim()[1] * 0.95, "store killed,\nno Redis",
               color="#b00020", va="top", fontsize=8)  # fmt: skip
    figure.suptitle(
        f"Time to first token, {report.ttft_speedup_median:.1f}× median speed-up, "
        "every answer identical to the bit"
        if not report.shortcomings()
        else "Time to first token (the run was not in order)"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
