"""Functions of scores and of pairs (``score_mod``, ``mask_mod``): traced, differentiated, and written as Triton."""
