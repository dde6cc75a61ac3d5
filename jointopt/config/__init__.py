"""A typed YAML config: what a run is asked for, checked before anything is loaded."""
