"""All that is done to a graph before it is cut, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from agd_fast.graph.adapters import fuse_adapters
from agd_fast.graph.feed_forward import end_products_with_gelu, fuse_feed_forward
from agd_fast.graph.folding import drop_needless, fold_into_norms
from agd_fast.graph.fusing import Fusing
from agd_fast.graph.joining import join_equal_cats
from agd_fast.graph.levels import Level, levels_of
from agd_fast.graph.merging import merge_low_rank
from agd_fast.graph.projections import Concatenate, Wanted, join_projections, join_thin_projections
from agd_fast.graph.residuals import fuse_residuals
from agd_fast.ops import Kernels


@dataclass(frozen=True)
class Rewritten:
    """kept: nodes that belong in the step, whatever they depend on. joined: number of projections that became parts of others.
    merged: number of low-rank terms that became parts of weights. gelu_epilogues: number of products that end with their gelu.
    kernels: see `Fusing.info`."""

    kept: frozenset[fx.Node] = frozenset()
    joined: int = 0
    merged: int = 0
    gelu_epilogues: int = 0
    kernels: dict[str, Any] = field(default_factory=lambda: {"kernels": {}, "not_on_kernels": {}})


def rewrite(
    graph: fx.Graph,
    placeholders: Mapping[fx.Node, Level],
    policy: Kernels,
    concatenate: Concatenate | None = None,
    *,
    fold: bool = True,
    merge: bool = False,
    join: Wanted | None = None,
    gelu_epilogue: Kernels = "never",
) -> Rewritten:
    """placeholders: the levels of the inputs. concatenate: joins weights; without it no projections are joined. fold: leave out
    what changes nothing, and let norms take rows. merge: put low-rank terms into weights. join: where projections of the same
    tokens become one, apart from thin ones; None for nowhere. gelu_epilogue: where products end with their gelu."""
    fusing, joined = Fusing(graph, {}, policy), 0
    if fold:
        drop_needless(graph)
        fold_into_norms(graph, levels_of(graph, placeholders), fusing if policy != "never" else None)
    fusing.level = levels_of(graph, placeholders)
    merged = merge_low_rank(fusing) if merge else 0
    if policy != "never":
        for fuse in (fuse_adapters, fuse_residuals, fuse_feed_forward):
            fusing.level = levels_of(graph, placeholders)
            fuse(fusing)
            graph.eliminate_dead_code()
        fusing.level = levels_of(graph, placeholders)
        joined = join_thin_projections(fusing, concatenate) if concatenate else 0
    fusing.level = levels_of(graph, placeholders)
    gelu_epilogues = end_products_with_gelu(fusing, gelu_epilogue)
    graph.eliminate_dead_code()
    if concatenate and join:
        fusing.level = levels_of(graph, placeholders)
        joined += join_projections(fusing, concatenate, join)
    kept = join_equal_cats(graph, levels_of(graph, placeholders))
    graph.eliminate_dead_code()
    return Rewritten(kept, joined, merged, gelu_epilogues, fusing.info())
