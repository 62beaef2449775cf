"""What people read of the QAD bench: rows as sentences, and their table."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from jaxopt_models.report import empty_table


def row_line(row: dict[str, Any]) -> str:
    """A row as a sentence, for those who watch."""
    return (
        f"{_name(row)}, seed {row['seed']}: KL {row['kl_ptq']:.4f} after PTQ, "
        f"{row['kl_qat']:.4f} after QAT, {row['kl_qad']:.4f} after QAD of "
        f"{row['train_tokens']:,} tokens; QAD recovers {row['kl_recovered']:.0%} of KL and "
        f"{row['ppl_recovered']:.0%} of perplexity; {row['minutes']:.1f} min"
    )


def _name(row: dict[str, Any]) -> str:
    """The format, and what training began with if that is not the recipe itself."""
    begin = row["begin"]
    return row["format"] + ("" if begin == row["recipe"] else f" from {begin}")


def qad_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Figures before and after, a row for each recipe and seed."""
    table = empty_table(
        "quantization-aware training and distillation",
        "back: share of what PTQ lost that QAD recovers",
    )
    table.add_column("format", overflow="fold")
    stages = [f"{name} {stage}" for name in ("ppl", "KL") for stage in ("PTQ", "QAT", "QAD")]
    for column in ("seed", "ppl", *stages, "KL back", "ppl back", "min"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            _name(row),
            str(row["seed"]),
            *(f"{row[f'ppl_{stage}']:.2f}" for stage in ("teacher", "ptq", "qat", "qad")),
            *(f"{row[f'kl_{stage}']:.4f}" for stage in ("ptq", "qat", "qad")),
            f"{row['kl_recovered']:.0%}",
            f"{row['ppl_recovered']:.0%}",
            f"{row['minutes']:.1f}",
        )
    return table
