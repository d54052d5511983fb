"""One page per method: what its loop must do, in plain Python from the paper, and nothing else."""
