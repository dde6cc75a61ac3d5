"""Numbers: what a format is, how to round into it, how to choose its scales, how to store it."""
