"""What scripts/bench.py measures, a file each: `add_arguments(parser)`; `run(args)` prints lines and gives a result."""
