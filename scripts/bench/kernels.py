"""Our kernels beside the reference, torchao and compressed-tensors: fake_quantization.py under the name it goes by.

    python scripts/bench/kernels.py --json kernels.json

Whatever runs in this folder imports this file where it looks for the package `kernels`, as transformers does. So it
does nothing then, and has a version that is too old to be used.
"""

__version__ = "0"

if __name__ == "__main__":
    from fake_quantization import main

    main()
