"""The record of a search: evaluations, generations, what was chosen and finished, in one SQLite file."""
