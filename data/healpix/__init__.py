"""HEALPix: the sphere in 12 * 4**level cells of equal area, as index arithmetic on tensors.

Source: Gorski et al. 2005, ApJ 622, 759 (sections 4 and 5). Letters: n = 2**level cells along a face edge; (face, x, y)
a cell by its place in one of the 12 faces, x towards the north-east edge, y towards the north-west edge, the origin at
the south corner; i the ring of a cell, 1..4n-1 from the north; p the cells in a quarter of that ring (n between the
polar caps); t the longitude of a cell's centre in units of 45 / p degrees.

Orders of cells: `nest` (face by face, bits of y and x interleaved), `ring` (north to south, eastwards) and `padxy`
(face by face, rows from the north corner: face * n * n + (n-1-x) * n + (n-1-y)), in which faces are (n, n) images.

Everything is int64 and float64, runs on the device of its arguments and never waits for it. Levels 0..29. Ids outside
0..12*4**level-1 become -1.
"""

from data.healpix.cells import (
    ORDERS,
    angles_to_cell,
    cell_to_angles,
    convert,
    nest_to_padxy,
    nest_to_ring,
    num_cells,
    padxy_to_nest,
    ring_to_nest,
)
from data.healpix.faces import neighbours, pad_faces
from data.healpix.grid import HEALPixGrid
from data.healpix.interpolation import bilinear

__all__ = [
    "ORDERS",
    "HEALPixGrid",
    "angles_to_cell",
    "bilinear",
    "cell_to_angles",
    "convert",
    "neighbours",
    "nest_to_padxy",
    "nest_to_ring",
    "num_cells",
    "pad_faces",
    "padxy_to_nest",
    "ring_to_nest",
]
