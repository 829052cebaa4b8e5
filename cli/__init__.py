"""The command line of offload_moe: arguments in, text and one-line errors out."""
