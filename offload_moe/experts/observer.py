"""Forward hooks that only observe."""


class HookObserver:
    """A forward hook that changes nothing, on a place where a token pass calls it although it calls no module there.

    The places, and what such a hook is given beside the module: before a decoder layer, nothing; before the norm in
    front of its MLP, the residual ``[1, 1, H]``; behind its router, what that returns.
    """
