"""What a sub-network costs, computed without running it."""
