"""``quality``: what attention, convolution and recurrence learn, at the same width, parameters, sequences and steps.

The other families time layers; this one says what the time buys (arXiv:1706.03762, table 1, compares costs alone).
"""
