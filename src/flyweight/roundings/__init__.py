"""How the entries of a weight are picked from a grid: one file, one rounding; each works with every code.

A rounding file is a plug-in of three names:

    class Options                                         # checked when built; plain JSON values
    NEEDS: "nothing" | "energy" | "gram"                  # what of Seen must be there
    def pick(weight, grid, seen, options) -> (integers, Grid)

pick gets a finite weight (O, I) and a grid that fits it, and returns int16 integers (O, I) in [grid.low, grid.high] with the
grid that they are points of: the given one, or one with other scales, zeros and factors of columns. The weight is never
changed. `ROWS = True` says that it has use for Seen.rows; one that needs a certain kind of grid refuses others. It raises
ModelError for a weight with NaN or infinite entries, UsageError for a grid that does not fit the weight, and DataError
where what was seen is missing, of another shape or not finite. Equal arguments give equal integers.
"""

from __future__ import annotations

from flyweight.roundings._parts import pick_parts as pick_parts
from flyweight.roundings._seen import Seen as Seen
