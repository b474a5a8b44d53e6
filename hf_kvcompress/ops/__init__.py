"""Hot operations: a torch reference each, beside its CUDA launcher where one exists."""
