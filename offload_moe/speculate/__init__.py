"""Speculation: several tokens per pass, of which all but the first are guesses, and the choice of how many pay.

A pass of a few rows reads most weights once. A source guesses the next tokens, one pass computes the logits behind each
of them, and the step loop (`offload_moe.chat.steps`) chooses every token from those logits as it does without guesses:
with the same processors, grammar and random draw. A guess is right if it is the token that was chosen. So the tokens
are those of a loop without guesses, whether greedy or sampled, and a wrong guess costs time only.
"""
