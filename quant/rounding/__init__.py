"""Rounding of weights that looks at what the layer computes: error-compensating and learned."""
