"""What `kvstore replay` found: as JSON, as a table, as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from kvstore.replay.picture import new_picture
from kvstore.replay.runs import OPTIMUM, Cell, PolicyCell
from kvstore.replay.trace import Trace


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """Token hit rates by policy and capacity."""

    trace: Trace
    policies: Sequence[str]
    capacities: Mapping[int, float]
    """Blocks, from few to many, and the share of the trace's blocks that they are."""
    rates: Mapping[Cell[float], float]

    def as_dict(self) -> dict[str, object]:
        """For JSON; rates and shares are fractions."""
        return {
            "trace": self.trace.name,
            "requests": len(self.trace.requests),
            "unique_blocks": self.trace.unique_blocks,
            "infinite_token_hit_rate": self.trace.infinite_token_hit_rate,
            "rows": [
                {
                    "policy": policy,
                    "capacity_fraction": self.capacities[blocks],
                    "capacity_blocks": blocks,
                    "token_hit_rate": self.rates[PolicyCell(policy, blocks)],
                }
                for policy in self.policies
                for blocks in self.capacities
            ],
        }

    def table(self) -> Table:
        """One line for each policy; the best that is no optimum in bold."""
        trace = self.trace
        table = Table(
            title=f"Token hit rate in %: {trace.name}",
            caption=(
                f"{len(trace.requests):,} requests, {trace.unique_blocks:,} blocks of "
                f"{trace.block_tokens} tokens; a cache that forgets nothing: "
                f"{100 * trace.infinite_token_hit_rate:.2f} %"
            ),
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("policy")
        for blocks in self.capacities:
            share = f"{100 * self.capacities[blocks]:.3g} %"
            table.add_column(f"{share}\n{blocks:,}", justify="right")
        for policy in self.policies:
            if policy == OPTIMUM:
                table.add_section()
            table.add_row(policy, *(self._text(policy, blocks) for blocks in self.capacities))
        return table

    def draw(self, file: Path) -> None:
        """Hit rate over capacity, one line for each policy, the optimum dashed."""
        figure, axes = new_picture(f"{self.trace.name}: what a cache is worth")
        for policy in self.policies:
            best = policy == OPTIMUM
            axes.plot(
                [100 * self.capacities[blocks] for blocks in self.capacities],
                [100 * self.rates[PolicyCell(policy, blocks)] for blocks in self.capacities],
                label="optimum" if best else policy,
                color="black" if best else None,
                linestyle="--" if best else "-",
                linewidth=2.6 if policy == "default" else 1.6,
                marker="o",
                markersize=4,
            )
        limit = 100 * self.trace.infinite_token_hit_rate
        axes.axhline(limit, color="0.7", linewidth=1, label="forgets nothing")
        axes.set_xscale("log")
        ticks = [100 * self.capacities[blocks] for blocks in self.capacities]
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"capacity, % of the {self.trace.unique_blocks:,} blocks of the trace")
        axes.set_ylabel("token hit rate, %")
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right")
        figure.savefig(file)

    def _text(self, policy: str, blocks: int) -> str:
        online = [self.rates[PolicyCell(each, blocks)] for each in self.policies if each != OPTIMUM]
        rate = self.rates[PolicyCell(policy, blocks)]
        text = f"{100 * rate:.2f}"
        return f"[bold]{text}[/]" if policy != OPTIMUM and rate == max(online) else text
