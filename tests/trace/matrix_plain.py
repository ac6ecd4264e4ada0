"""The matrix in plain functions on a dict of arrays."""

from matrix_cells import RAW

MAKERS = {name: lambda cell=cell: cell for name, cell in RAW.items()}
