"""agd-fast info: shows what is installed, and describes an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

import agd_fast as agd
from agd_fast.cli.console import console


def info(
    adapter: Annotated[str | None, typer.Argument(help="Folder or Hub repo of an adapter to describe.")] = None,
) -> None:
    """Show versions, devices, what is installed and what the Triton kernels do; with ADAPTER, what it is and was made for."""
    from agd_fast.reporting.tables import rich_table
    from agd_fast.sources import resolve

    tables = [
        rich_table("environment", ("", "found"), list(agd.info()["environment"].items()), "left"),
        rich_table("kernels", ("", "found"), describe_kernels(), "left"),
    ]
    if adapter is not None:
        tables.append(rich_table(escape(adapter), ("", "found"), describe(resolve(adapter)), "left"))
    for table in tables:
        console.print(table)


def describe_kernels() -> list[tuple[str, str]]:
    """Whether the Triton kernels run here, and what was measured for them, as rows of (name, text)."""
    from agd_fast import ops

    found = ops.kernels_info()
    rows = [
        ("policy", found["policy"]),
        ("can run", f"no: {found['missing']}" if found["missing"] else "yes"),
        ("ops", ", ".join(found["ops"])),
        *((f"{name} is left to torch", reason) for name, reason in found["failed"].items()),
    ]
    if "kept" in found:
        rows.append(("measured", f"{found['measured']} shapes on this card, kept in {found['kept']}"))
    return [(name, escape(text)) for name, text in rows]


def describe(adapter: Path) -> list[tuple[str, str]]:
    """What an adapter's config says, as rows of (name, text)."""
    from agd_fast.storage import read_config

    config = read_config(adapter)
    sites = [site["path"] for found in config["layout"]["sites"].values() for site in found]
    entries: dict[str, Any] = {
        "base": config["base_class"],
        **config["adapter"],
        "sites": len(sites),
        "first site": sites[0],
        **{name: value for name, value in config["about"].items() if not isinstance(value, dict) and value is not None},
        "library": config["library_version"],
        "format": config["format_version"],
    }
    return [(name, str(value)) for name, value in entries.items()]
