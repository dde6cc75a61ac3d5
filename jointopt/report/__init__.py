"""The front to look at: one self-contained HTML page, and tables in the terminal."""
