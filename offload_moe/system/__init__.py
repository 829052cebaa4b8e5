"""The edges of the program: files, locks, names, sizes and text that come from outside."""
