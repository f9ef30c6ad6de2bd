"""Everything that touches files: `location.locate`, the `catalogue`, the `synthetic` default and
`netcdf.open_series`."""
