"""The device pass: kernels compiled for the card of this machine."""
