"""Which memory holds what: prefixes of every layer's neurons in vram and ram, and the dense parts' memories.

`place` minimises the expected time per token (or maximises the paper's impact) within byte budgets: `program` prices
the budgets and proves bounds, `search` takes the best of the plans that `family` and `fill` make. A `Machine`, measured
or read from a file, gives the bandwidths.
"""

from powerinfer_tools.placement.costs import Costs, artifact_costs
from powerinfer_tools.placement.file import read_placement, write_placement
from powerinfer_tools.placement.machine import Machine, Tier, read_machine, write_machine
from powerinfer_tools.placement.measure import cached_machine, keep_machine, measure_machine
from powerinfer_tools.placement.place import Placement, let_through, place

__all__ = [
    "Costs",
    "Machine",
    "Placement",
    "Tier",
    "artifact_costs",
    "cached_machine",
    "keep_machine",
    "let_through",
    "measure_machine",
    "place",
    "read_machine",
    "read_placement",
    "write_machine",
    "write_placement",
]
