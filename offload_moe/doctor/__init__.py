"""Is this machine ready, and does the engine compute right on it?"""
