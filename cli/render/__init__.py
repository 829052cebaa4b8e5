"""How an answer looks on a terminal: words wrapped whole, Markdown rendered block by block while it streams."""
