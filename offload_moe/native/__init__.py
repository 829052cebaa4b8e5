"""The native library: C sources, the bindings to it, and the kernels as Python calls them."""
