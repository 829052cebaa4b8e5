"""Answers on a terminal: wrapped between words, Markdown rendered block by block while it streams."""
