"""What people read of the pruning bench: rows as sentences, and their table."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from jaxopt_models.report import empty_table


def row_line(row: dict[str, Any]) -> str:
    """A row as a sentence, for those who watch."""
    return (
        f"{row['axis']}, {row['method']}, seed {row['seed']}: {row['params']:,} parameters "
        f"({row['share']:.1%}); perplexity {row['ppl_pruned']:.2f} -> {row['ppl_distilled']:.2f} "
        f"of {row['ppl_teacher']:.2f}, {row['ppl_recovered']:.0%} of what pruning lost, KL "
        f"{row['kl_pruned']:.4f} -> {row['kl_distilled']:.4f} after {row['train_tokens']:,} "
        f"tokens; {row['minutes']:.1f} min"
    )


def pruning_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Figures before and after distillation, the uniform candidate beside the search's."""
    table = empty_table(
        "pruning and distillation", "back: share of what pruning lost that distillation recovers"
    )
    for column in ("axis", "method"):
        table.add_column(column, overflow="fold")
    stages = [f"{name} {stage}" for name in ("ppl", "KL") for stage in ("pruned", "taught")]
    for column in ("seed", "params", "ppl", *stages, "ppl back", "min"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["axis"],
            row["method"],
            str(row["seed"]),
            f"{row['params'] / 1e6:.1f} M",
            *(f"{row[f'ppl_{stage}']:.2f}" for stage in ("teacher", "pruned", "distilled")),
            *(f"{row[f'kl_{stage}']:.4f}" for stage in ("pruned", "distilled")),
            f"{row['ppl_recovered']:.0%}",
            f"{row['minutes']:.1f}",
        )
    return table
