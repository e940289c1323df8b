"""All that is done to a graph before it is cut, in its order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from agd_fast.graph.adapters import fuse_adapters
from agd_fast.graph.feed_forward import fuse_feed_forward
from agd_fast.graph.folding import drop_identities, fold_into_norms, share_equals
from agd_fast.graph.fusing import Fusing
from agd_fast.graph.joining import join_equal_cats
from agd_fast.graph.levels import Level, levels_of
from agd_fast.graph.projections import Concatenate, Wanted, join_projections, join_thin_projections
from agd_fast.graph.residuals import fuse_residuals
from agd_fast.ops import Kernels


@dataclass(frozen=True)
class Rewritten:
    """kept: nodes that belong into the step, whatever they depend on. joined: how many projections became parts of others.
    kernels: for a reader."""

    kept: frozenset[fx.Node]
    joined: int
    kernels: dict[str, Any]


def rewrite(
    graph: fx.Graph,
    placeholders: Mapping[fx.Node, Level],
    policy: Kernels,
    concatenate: Concatenate,
    *,
    fold: bool = True,
    join: Wanted | None = None,
) -> Rewritten:
    """placeholders: the levels of the inputs. fold: leave out what changes nothing, and let norms take rows. join: where
    projections of the same tokens become one; None for nowhere."""
    fusing, joined = Fusing(graph, {}, policy), 0
    if fold:
        drop_identities(graph)
        share_equals(graph)
        fold_into_norms(graph, levels_of(graph, placeholders), fusing if policy != "never" else None)
    if policy != "never":
        for fuse in (fuse_adapters, fuse_residuals, fuse_feed_forward):
            fusing.level = levels_of(graph, placeholders)
            fuse(fusing)
            graph.eliminate_dead_code()
        fusing.level = levels_of(graph, placeholders)
        joined = join_thin_projections(fusing, concatenate)
    if join is not None:
        graph.eliminate_dead_code()
        fusing.level = levels_of(graph, placeholders)
        joined += join_projections(fusing, concatenate, join)
    kept = join_equal_cats(graph, levels_of(graph, placeholders))
    graph.eliminate_dead_code()
    return Rewritten(kept, joined, fusing.info())
