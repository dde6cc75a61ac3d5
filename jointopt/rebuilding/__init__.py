"""What a library has to be told to build a sub-network again, and the code, of torch alone, that does as it is told."""
