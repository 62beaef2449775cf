"""What people read of the compression bench: rows as sentences, and their table."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from jaxopt_models.report import empty_table


def row_line(row: dict[str, Any]) -> str:
    """A row as a sentence, for those who watch."""
    return (
        f"{row['stage']}: {row['params']:,} parameters in {row['bytes'] / 2**20:.1f} MiB "
        f"({row['share']:.1%}); perplexity {row['perplexity']:.2f}, KL {row['kl']:.4f}; "
        f"{row['tokens_per_s']:.0f} tokens/s at batch {row['batch']}; {row['minutes']:.1f} min"
    )


def compression_table(rows: Sequence[dict[str, Any]]) -> Table:
    """A row for each stage."""
    table = empty_table(
        "a model on its way to being small",
        "KL, in nats a token, and share of bytes: of the original",
    )
    table.add_column("stage", overflow="fold")
    for column in ("params", "MiB", "share", "ppl", "KL", "top-1", "tokens/s", "min"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["stage"],
            f"{row['params'] / 1e6:.1f} M",
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['share']:.1%}",
            f"{row['perplexity']:.2f}",
            f"{row['kl']:.4f}",
            f"{row['top1_agreement']:.1%}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['minutes']:.1f}",
        )
    return table
