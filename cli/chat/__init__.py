"""The chat at a terminal: prompt, history, completion, commands; or over a pipe, a turn per line."""
