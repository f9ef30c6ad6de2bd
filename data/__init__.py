"""What a batch is and where it comes from. `grids` and `batch` are the shared vocabulary (torch and numpy only)."""
