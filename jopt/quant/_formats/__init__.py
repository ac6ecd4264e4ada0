"""Number formats: grids, small floats, tables, pieces, powers of two."""
