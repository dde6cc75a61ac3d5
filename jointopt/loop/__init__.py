"""Ask -> evaluate -> record -> tell: `jointopt.search`."""
