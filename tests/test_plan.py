"""`kvstore plan`: sizes, models, two tiers, and what it answers."""

import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from kvstore.replay.model_size import ModelError, model_size
from kvstore.replay.plan import Plan, Question, answer
from kvstore.replay.plan_command import Size, plan
from kvstore.replay.plan_report import sentences, size_text, tables
from kvstore.replay.replay import no_progress
from kvstore.replay.runs import Cell
from kvstore.replay.trace import Trace, TraceBuilder
from kvstore.replay.two_tiers import Disk, TierRates, TiersCell

LLAMA: dict[str, Any] = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "hidden_size": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip


def model(path: Path, **config: Any) -> Path:
    """A model's configuration."""
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 131_072),
        ({"torch_dtype": "float32"}, 262_144),
        ({"head_dim": 64}, 65_536),
        ({"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 70_272),
        ({"num_key_value_heads": None}, 524_288),
        ({"layer_types": ["full_attention", "linear_attention"] * 16}, 65_536),
        ({"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, 4096),
        ({"layer_types": ["full_attention"] * 32, "num_kv_shared_layers": 30}, 8192),
        ({"hybrid_override_pattern": "M-M*M-ME*-"}, 8192),
        ({"full_attention_interval": 4}, 32_768),
        ({"sliding_window_pattern": 6}, 20_480),
    ],
)
def test_bytes_per_token_follow_from_the_model(
    tmp_path: Path, changes: dict[str, Any], expected: int
) -> None:
    """Grouped heads, head size, dtype, latent attention, layers that do not grow with a prompt."""
    plain = model(tmp_path / "config.json", **LLAMA | changes)
    assert model_size(plain).bytes_per_token == expected
    nested = model(tmp_path / "nested.json", text_config=LLAMA | changes)
    assert model_size(nested).bytes_per_token == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ["131,072 bytes per token: keys and values of all 32 layers."]),
        (
            {
                "layer_types": [*["sliding_attention"] * 5, "full_attention", "linear_attention"],
                "sliding_window": 512,
            },
            [
                "keys and values of 1 of 7 layers.",
                "Left out, because it does not grow with the prompt: ",
                "5 sliding_attention, the last 512 tokens, at most 10,485,760 bytes for each",
                "; 1 linear_attention.",
            ],
        ),
        ({"hybrid_override_pattern": "M-M*"}, ["of 1 of 4 layers.", ": 2 mamba; 1 mlp."]),
        ({"sliding_window": 4096}, ["sliding_window of 4096 tokens is not considered"]),
    ],
)
def test_it_says_which_layers_it_counted(
    tmp_path: Path, changes: dict[str, Any], said: list[str]
) -> None:
    """And which it left out, with what they take at most."""
    counted = model_size(model(tmp_path / "config.json", **LLAMA | changes)).counted
    for part in said:
        assert part in counted
    assert ("not considered" in counted) == (changes.keys() == {"sliding_window"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 2}, "none of them keeps keys and values of the"),
        ({"layer_types": ["brand_new"]}, "layer_types: holds 'brand_new', which is not known"),
        ({"hybrid_override_pattern": "M?"}, "hybrid_override_pattern: is 'M\\?'"),
        ({"attn_layer_period": 8}, "attn_layer_period: without layer_types does not tell"),
        ({"hidden_size": 5}, "hidden_size: is 5 for 32 heads"),
        ({"text_config": [1]}, "text_config: is no JSON object"),
    ],
)
def test_a_model_that_is_not_understood_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """A guess would be a plan for another model."""
    with pytest.raises(ModelError, match=message):
        model_size(model(tmp_path / "config.json", **LLAMA | changes))


def test_a_model_that_says_too_little_is_named(tmp_path: Path) -> None:
    """With the field, and the way around."""
    path = model(tmp_path / "config.json", num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"num_attention_heads: is missing; .*--kv-bytes"):
        model_size(path)


@pytest.mark.parametrize(
    ("text", "size"),
    [("64GiB", 64 << 30), ("1.5 TB", 1_500_000_000_000), ("1000", 1000), ("2k", 2000)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    """Binary and decimal units, with and without the B."""
    assert Size()(text) == size


def chats(rng: random.Random, requests: int) -> Trace:
    """Conversations that grow by a block or two with each turn."""
    builder = TraceBuilder("chats", 16)
    lengths = [1] * 30
    for now in range(requests):
        chat = min(29, int(rng.expovariate(0.1)))
        lengths[chat] = lengths[chat] + rng.randint(1, 2) if lengths[chat] < 20 else 1
        blocks = lengths[chat]
        builder.add(float(now), blocks * 16, ["system", *((chat, at) for at in range(blocks - 1))])
    return builder.finish()


def test_a_disk_never_takes_away(rng: random.Random) -> None:
    """Memory has the same with and without it; a disk for all has what nothing forgotten has."""
    trace = chats(rng, 400)
    alone = TiersCell("default", 20, 0).run(trace, no_progress)
    small = TiersCell("default", 20, 60).run(trace, no_progress)
    all_of_it = TiersCell("default", 20, trace.unique_blocks).run(trace, no_progress)
    assert alone.disk == alone.written_blocks == 0
    assert alone.memory == small.memory == all_of_it.memory
    assert alone.total <= small.total <= all_of_it.total
    assert all_of_it.total == pytest.approx(trace.infinite_token_hit_rate)
    # With room for all, every block is written at most once: its clean copy stays.
    assert all_of_it.written_blocks <= trace.unique_blocks


def test_a_disk_holds_ancestors_of_what_it_holds(rng: random.Random) -> None:
    """Whatever is demoted: no block lies there without its parent, and no more than fits."""
    parents: dict[int, int | None] = {0: None}
    for block in range(1, 60):
        parents[block] = rng.randrange(block)
    disk = Disk(15)
    for _ in range(300):
        disk.demote(rng.sample(range(60), rng.randint(0, 5)), parents)
        held = [block for block in range(60) if block in disk]
        assert len(held) <= 15
        for block in held:
            parent = parents[block]
            assert parent is None or parent in disk


def test_it_answers_in_words_and_json(tmp_path: Path, rng: random.Random) -> None:
    """Sizes in bytes, rates as fractions; a goal that no size reaches is null."""
    path = tmp_path / "trace.jsonl"
    seen: dict[tuple[Any, ...], int] = {}
    with path.open("w") as file:
        for now in range(100):
            chat, length = rng.randrange(20), rng.randint(1, 6)
            names = [seen.setdefault((chat, at), len(seen)) for at in range(length)]
            record = {
                "timestamp": now, "input_length": 512 * length, "output_length": 1,
                "hash_ids": names,
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
    out = tmp_path / "plan.json"
    arguments = [
        str(path), "--kv-bytes-per-token", "1024", "--memory", "10MiB", "--disk", "20MiB",
        "--jobs", "1", "--json", str(out),
    ]  # fmt: skip
    ran = CliRunner().invoke(plan, [*arguments, "--hit-rate", "0.3"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(out.read_text())
    assert found["block_bytes"] == 512 * 1024
    assert found["footprint_bytes"] == found["unique_blocks"] * found["block_bytes"]
    assert found["memory_alone"][-1]["token_hit_rate"] == pytest.approx(
        found["infinite_token_hit_rate"]
    )
    assert 0 < found["goal"]["memory_alone_bytes"] < found["footprint_bytes"]
    assert "30 %: about" in ran.output
    ran = CliRunner().invoke(plan, [*arguments, "--hit-rate", "0.999"])
    assert json.loads(out.read_text())["goal"]["memory_alone_bytes"] is None
    assert "no size of memory reaches it" in " ".join(ran.output.split())


def test_it_tells_what_a_model_was_taken_for(tmp_path: Path) -> None:
    """Before the tables that follow from it."""
    config = model(tmp_path / "config.json", **LLAMA)
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 512, "hash_ids": [1]}\n')
    ran = CliRunner().invoke(plan, [str(path), "--model-config", str(config), "--jobs", "1"])
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.startswith("config.json: 131,072 bytes per token: keys and values of all 32")


def worse_with_more(question: Question) -> Plan:
    """The plan of a policy that has the most at half of all blocks, and ever less above."""
    top = question.trace.unique_blocks // 2
    found: dict[Cell[TierRates], TierRates] = {
        cell: TierRates(0.3 * (1 - abs(cell.memory_blocks - top) / top), 0.0, 0)
        for cell in question.cells()
    }
    return answer(question, found)


def test_an_answer_never_falls_with_more_room(rng: random.Random) -> None:
    """Who has more can use less of it, also where the policy would do worse with all."""
    trace = chats(rng, 400)
    block = trace.block_tokens
    asked = int(trace.unique_blocks * 0.8) * block
    result = worse_with_more(Question(trace, 1, asked, 100 * block, 0.2, "default"))
    rates = [row.rates.total for row in result.memory_alone]
    assert rates == sorted(rates)
    assert result.asked.total >= max(
        row.rates.total for row in result.memory_alone if row.memory_bytes <= asked
    )
    assert result.per_gib_of_memory >= 0
    assert result.per_gib_of_disk >= 0
    assert all(row.per_gib >= 0 for row in [*result.memory_alone, *result.with_disk])
    assert result.used.memory_blocks < result.question.asked().memory_blocks
    assert f"default has that with {size_text(result.used_memory_bytes())} of the memory" in (
        " ".join(sentences(result))
    )


def test_no_step_has_two_signs(rng: random.Random) -> None:
    """Also a step down would be told as one."""
    trace = chats(rng, 100)
    result = worse_with_more(Question(trace, 1, 100 * trace.block_tokens, 0, 0.2, "default"))
    down = [replace(row, per_gib=-0.0004) for row in result.memory_alone]
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(next(tables(replace(result, memory_alone=down))))
    text = console.export_text()
    assert "-0.04" in text
    assert "+-" not in text


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_a_trace_of_a_few_blocks_has_a_plan(tmp_path: Path, blocks: int) -> None:
    """Sizes that are the same are tried once, and no step is divided by nothing."""
    path = tmp_path / "trace.jsonl"
    record = {
        "timestamp": 0, "input_length": 512 * blocks, "hash_ids": list(range(blocks)),
    }  # fmt: skip
    path.write_text((json.dumps(record) + "\n") * 2)
    ran = CliRunner().invoke(plan, [str(path), "--kv-bytes-per-token", "1024", "--jobs", "1"])
    assert ran.exit_code == 0, ran.output


def test_it_wants_the_model_one_way(tmp_path: Path) -> None:
    """Either bytes per token or a configuration, not both and not neither."""
    path = tmp_path / "trace.jsonl"
    path.write_text("")
    ran = CliRunner().invoke(plan, [str(path)])
    assert ran.exit_code == 2
    assert "either --kv-bytes-per-token or --model-config" in ran.output
