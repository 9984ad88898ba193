"""Channel groups: what must be removed together, and removing it.

`labels` runs the graph beside itself on labels by the `rules` of its operators; `solve` joins labels into classes;
`groups` is what planners read; `remove` and `resize` make the smaller graph.
"""

from penjing.network.channels.groups import Group, Groups, Member, analyse, kept_indices
from penjing.network.channels.remove import Removed, remove

__all__ = ["Group", "Groups", "Member", "Removed", "analyse", "kept_indices", "remove"]
