"""What operators and networks take on this machine: timed, kept to be looked up, and fitted."""
