"""The recorder in training loops that are not your own; each module needs its own extra."""
