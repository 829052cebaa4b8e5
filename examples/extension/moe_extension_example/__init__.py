"""One extension of offload-moe of each kind; `pyproject.toml` registers them."""
