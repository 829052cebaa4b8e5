"""The native library: C sources, the bindings to it, and the kernels as Python calls them.

Importing it raises NativeLibraryError where the library is not built, or is built from other sources.
"""

from offload_moe.native.library import load_library

load_library()
