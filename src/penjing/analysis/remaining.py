"""How much of a network Edits have left: the shares that schedules go by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penjing.analysis.footprint import footprint
from penjing.analysis.residuals import find_residuals
from penjing.analysis.sensitivity import selected_groups
from penjing.network import Edit, Network, RemoveChannels, ReplaceLayer
from penjing.network.channels.groups import units_of


def remaining(start: Network, now: Network, edits: Sequence[Edit], chosen: Callable[[str], bool]) -> dict[str, float]:
    """The shares of `start` that are left in `now`, which `edits` made of it: of its "macs" and "parameters", and of
    what "goes", if that can be told: the channels, heads or residual blocks that are all `chosen` by name.

    Counts are whole numbers, so that what has gone is never quite what was asked for; a schedule that goes by what is
    really left does not add these differences up.
    """
    size, left = footprint(start), footprint(now)
    shares = {"macs": left.macs / max(size.macs, 1), "parameters": left.parameters / max(size.parameters, 1)}
    shape = [e for e in edits if isinstance(e, RemoveChannels | ReplaceLayer)]
    removals = [e for e in shape if isinstance(e, RemoveChannels)]
    blocks = [e for e in shape if isinstance(e, ReplaceLayer) and not e.calls]
    if not shape:
        shares["goes"] = 1.0
    elif blocks and len(blocks) == len(shape):
        there = sum(all(chosen(w) for w in b.weights) for b in find_residuals(start))
        shares["goes"] = 1 - len(blocks) / max(there, len(blocks))
    elif removals == list(edits[: len(shape)]) and {e.heads for e in removals} == {"heads"}:
        shares["goes"] = _units(start, removals, chosen)
    return shares


def _units(start: Network, removals: Sequence[RemoveChannels], chosen: Callable[[str], bool]) -> float:
    gone = units_of(start.groups(), [(e.parameter, e.dim, e.indices) for e in removals])
    # Where nothing but attention heads went, channels do not count, and were never meant to go.
    kinds = {g.heads for g in start.groups() if gone[g.classes].any()}
    counted = [g for g in selected_groups(start, chosen) if g.heads in kinds]
    return 1 - sum(int(gone[g.classes].sum()) for g in counted) / max(sum(g.size for g in counted), 1)
