"""Our loop and our sweeps timed beside the ones people write: contenders in turn, so that a drifting machine slows all."""
