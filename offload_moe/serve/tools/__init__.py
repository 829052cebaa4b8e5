"""Tools: how a family's answers call them, and how calls are read while they stream."""
