"""The record of what each Triton kernel takes of a GPU, as Markdown: a summary, then a table a target."""

from __future__ import annotations


def markdown(record: dict) -> str:
    """`record` is what `fastda.benchmarks.triton_resources` writes."""
    rows = record["kernels"]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    parts = [
        "# Registers, spills and shared memory of the Triton kernels",
        f"Compiled by Triton {record['triton']} without a GPU, at the block sizes that the cases choose; float32 "
        f"products at precision “{record['precision']}”. Registers and spilled bytes are those of a thread, shared "
        "bytes of a block.",
    ]
    if record["cases"]:
        parts.append(f"Of the cases that have one of these in their names: {', '.join(record['cases'])}.")
    if not record["complete"]:
        parts.append("**Cut short: more kernels or targets belong here.**")
    parts.append(_table(_SUMMARY, [_summary(target, rows) for target in targets]))
    for target in targets:
        parts += [f"## {target}", _table(_DETAILS, [_details(row) for row in rows if row["target"] == target])]
    return "\n\n".join(parts) + "\n"


_SUMMARY = ("target", "kernels", "that spill", "most registers", "most shared bytes", "matrix instructions")
_DETAILS = ("kernel", "case", "variant", "blocks", "warps, stages", "registers", "spilled", "shared", "instructions")


def _summary(target: str, rows: list[dict]) -> tuple[object, ...]:
    own = [row for row in rows if row["target"] == target]
    instructions = sorted({_kind(one) for row in own for one in row["matrix_instructions"]})
    return (
        target,
        len(own),
        sum(row["spills"] > 0 for row in own),
        max(row["registers"] for row in own),
        max(row["shared_bytes"] for row in own),
        ", ".join(instructions),
    )


def _details(row: dict) -> tuple[object, ...]:
    constants = row["constants"]
    blocks = {name: value for name, value in constants.items() if isinstance(value, int) and name != "SLOTS"}
    variant = [f"{name.lower()} {value}" if name == "SLOTS" else value for name, value in constants.items()]
    return (
        row["kernel"],
        row["case"],
        ", ".join(str(value) for name, value in zip(constants, variant) if name not in blocks),
        ", ".join(f"{name} {value}" for name, value in blocks.items()),
        f"{row['num_warps']}, {row['num_stages']}",
        row["registers"],
        row["spills"],
        row["shared_bytes"],
        ", ".join(row["matrix_instructions"]),
    )


def _kind(instruction: str) -> str:
    """mma.sync, wgmma.mma_async, tcgen05.mma or v_mfma, without shape and types."""
    if instruction.startswith("v_mfma"):
        return "v_mfma"
    return ".".join(instruction.split(".")[:2])


def _table(heading: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
