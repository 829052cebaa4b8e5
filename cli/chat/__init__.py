"""The chat: at a terminal with prompt, history, completion and commands; from a pipe with one turn per line."""
