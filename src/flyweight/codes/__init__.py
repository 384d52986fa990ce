"""How a weight is stored: one file, one code. Which integers it stores is a rounding's business, never a code's.

A weight is (O, I): output channels by inputs of one of them, kernel elements included. Its integers are (O, I), or
(O, I / v) on a grid whose `width` v is more than 1, where neighbouring inputs share one. A code's file holds

    class Options                                           # how fine, how grouped; checked when built
    LEVELS: Sequence[Options]                               # worth trying, from the gentlest to the smallest
    def refuse(rows, columns, options) -> str | None        # why it does not fit a weight of that shape, or None
    def nbytes(rows, columns, options) -> int               # of the stored tensors, to the byte
    def fit(weight, options, energy=None) -> Grid           # energy: (I,) mean square of each input; weighs the error
    def storable(grid, options) -> Grid                     # the same grid with scales as they can be stored
    def store(integers, grid, options) -> dict[str, Tensor] # packed: what lies in the file
    def restore(stored, columns, options) -> (integers, Grid)   # exact: integers int16, the grid bit for bit

A grid may give each input a further factor (`Grid.columns`, of the code entropy): value = (level - zero) * scale * column.
Where it has a mask (`Grid.mask`, of the code sparse), an integer outside is 0; a rounding may choose another of its pattern.
A code with `COMPRESSED = True` stores integers that a Huffman coder makes smaller on disk than `nbytes` says.

What `fit` returns is storable. A rounding that changes scales hands its grid through `storable` before `store`, which
raises UsageError for scales it would have to change. All of it is deterministic, and no input is changed. `fit` works in
float32 (a float64 weight is rounded first); it raises ModelError for entries that are NaN, infinite or beyond 1e30,
DataError for an energy of another length, negative or not finite, and UsageError with `refuse`'s reason. `restore` raises
ArtifactError for tensors of another name, shape or type.

Inputs without any energy count like all others where a whole group of them shares a scale. A group, channel or tensor of
zeros decodes to exact zeros, as does a channel of zeros among others; where no level is 0 its scale is 0, and nowhere else.
"""

from __future__ import annotations

from flyweight.codes._grid import Grid as Grid
