"""The chosen sub-network rounded anew, or trained alone, before it is exported."""
